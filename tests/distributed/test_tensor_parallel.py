"""Models that tensor parallelism has split before attach: the same units, the same training, the same adapter."""



import pytest
import torch
from distributed.runs import batches, check_same_files, train
from support.models import ALL_RATIOS, model_of, ratios_for
from torch import nn
from transformers import AutoModelForCausalLM

import s2ft

# "llama" moves heads and channels, "llama-grouped" has heads that can't move and "phi3" weights whose units are on
# different ranks; "llama-biased" has biases on both sides, "qwen3" norms of heads that transformers runs by a style
CASES = [
    ("llama", "permuted"),
    ("llama-biased", "indexed"),
    ("qwen2-grouped-tied", "permuted"),
    ("phi3-grouped", "permuted"),
]
MORE_CASES = [("llama", "indexed"), ("llama-biased", "permuted"), ("qwen3", "permuted"), ("llama-odd", "permuted")]


def load(folder, tp=2, **sizes):
    """The model in `folder`, split over this process's ranks; tp of 1 and no sizes: whole."""
    from transformers.distributed import DistributedConfig

    config = {"distributed_config": DistributedConfig(tp_size=tp, **sizes)} if tp > 1 or sizes else {}
    return AutoModelForCausalLM.from_pretrained(folder, **config)


def config_of(case, layout="permuted", **changes):
    return s2ft.S2FTConfig(**ratios_for(case, ALL_RATIOS), layout=layout, **changes)


def logits(model):
    with torch.no_grad():
        return model(input_ids=batches(model, 1)[0]).logits.clone()


def train_and_save(rank, folder, case, layout, tp=2, sizes=()):
    model = load(folder, tp, **dict(sizes))
    before = logits(model)
    s2ft.attach(model, config_of(case, layout))
    unchanged = logits(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses = train(model)
    s2ft.save_adapter(model, folder / f"adapter-{tp}-{rank}")
    after = logits(model)
    slices = {name: p.detach().clone() for name, p in trained.items()}
    s2ft.detach(model)
    return before, unchanged, losses, after, slices, logits(model)


@pytest.mark.parametrize(
    "case, layout", [*CASES, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE_CASES)]
)
def test_training_equals_one_process(ranks, tmp_path, case, layout):
    model_of(case).save_pretrained(tmp_path)
    before, unchanged, losses, after, slices, restored = train_and_save(0, tmp_path, case, layout, tp=1)
    found = ranks(train_and_save, tmp_path, case, layout)
    for rank, (b, u, l, a, s, r) in enumerate(found):
        torch.testing.assert_close(b, before)
        torch.testing.assert_close(u, b)
        torch.testing.assert_close(l, losses)
        torch.testing.assert_close(a, after, rtol=1e-4, atol=1e-4)
        assert torch.equal(r, b)  # detach gives the base and its forwards back
        check_same_files(tmp_path / f"adapter-2-{rank}", tmp_path / "adapter-1-0", atol=1e-4)
        assert s.keys() == slices.keys()
        for name in s:  # s2 has the same order, so that an optimizer's state fits any number of ranks
            torch.testing.assert_close(s[name], slices[name], rtol=1e-4, atol=1e-4)
            assert torch.equal(s[name], found[0][4][name])  # the ranks have the same, bit for bit
