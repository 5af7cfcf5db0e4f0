"""examples/nano.py, the method in one file, makes the losses and the merged weights of the library."""

import ast
import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.tolerances import GEMM
from transformers import LlamaConfig, LlamaForCausalLM

import s2ft

FILE = Path(__file__).parents[1] / "examples" / "nano.py"
CHANNELS, HEADS = 5, 1


@pytest.fixture(scope="module")
def nano():
    return SimpleNamespace(**runpy.run_path(str(FILE)))


def tiny_llama(**changes):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def batches():
    """Three batches whose rows have different lengths and prompts without a loss."""
    made = []
    for seed in range(3):
        ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(seed))
        mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
        labels = torch.where(mask == 1, ids, -100)
        labels[:, :3] = -100
        made.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return made


def by_both(nano, model):
    """Losses and merged weights of the file and of the library, on the same rows and units, by the same optimizer."""
    chosen = nano.choose(model, HEADS, CHANNELS)
    queries = model.config.num_attention_heads // model.config.num_key_value_heads
    units = {
        **{f"{path}.down_proj": one.tolist() for path, one in chosen.items() if path.endswith("mlp")},
        **{
            f"{path}.o_proj": [head * queries + query for head in one.tolist() for query in range(queries)]
            for path, one in chosen.items()
            if path.endswith("self_attn")
        },
    }
    ours, library = copy.deepcopy(model), copy.deepcopy(model)
    orders = nano.attach(ours, chosen)
    own_losses = nano.train(ours, batches(), 1e-2)
    nano.merge(ours, orders)
    s2ft.attach(library, s2ft.S2FTConfig(units=units, ffn_kernel=False))  # the kernel rounds act(gate) * up once
    return (own_losses, ours.state_dict()), (nano.train(library, batches(), 1e-2), s2ft.merge(library).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_library_bit_for_bit(nano, dtype):
    model = tiny_llama().to(dtype)
    (own_losses, own), (losses, merged) = by_both(nano, model)
    assert own_losses == losses and len(set(losses)) == 3 and list(own) == list(merged)
    assert [name for name in merged if not torch.equal(own[name], merged[name])] == []
    assert [name for name, before in model.state_dict().items() if not torch.equal(before, merged[name])] == [
        f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")
    ]


def test_equals_the_library_with_grouped_heads(nano):
    """The library leaves these heads in place, so sums over heads have another order."""
    (own_losses, own), (losses, merged) = by_both(nano, tiny_llama(num_key_value_heads=2))
    torch.testing.assert_close(torch.tensor(own_losses), torch.tensor(losses), rtol=GEMM[torch.float32][0], atol=0)
    for name, weight in merged.items():
        rtol, atol = GEMM[torch.float32]
        torch.testing.assert_close(own[name], weight, rtol=rtol, atol=atol)


@torch.no_grad()
def test_permuting_and_merging_change_nothing(nano):
    model = tiny_llama(num_key_value_heads=2, attention_bias=True)
    before, inputs = copy.deepcopy(model.state_dict()), batches()[0]
    expected = model(**inputs).logits
    orders = nano.attach(model, nano.choose(model, HEADS, CHANNELS))
    rtol, atol = GEMM[torch.float32]
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=rtol, atol=atol)
    nano.merge(model, orders)
    assert [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])] == []


def test_it_is_short_and_does_not_import_s2ft():
    nodes = [node for node in ast.walk(ast.parse(FILE.read_text(encoding="utf-8"))) if isinstance(node, ast.stmt)]
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    docstrings = [
        node for node in nodes if isinstance(getattr(node, "value", None), ast.Constant) and isinstance(node, ast.Expr)
    ]
    assert not any("s2ft" in ast.unparse(node) for node in imports)
    assert len(nodes) - len(imports) - len(docstrings) <= 150
