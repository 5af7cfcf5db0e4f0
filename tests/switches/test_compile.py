"""torch.compile of an attached model: one graph, the values of the uncompiled model, and nothing stale."""

import copy
import logging
import os

import pytest
import torch
from support.inside import Projection, record_of
from support.models import loss_of, output_of, token_batch
from support.slices import assert_same, attached, everything, gradients, plain_model
from support.states import randomize, with_adapter
from support.tolerances import GEMM, LOGITS, relative_difference
from torch import nn
from torch._dynamo.utils import counters

import s2ft
from s2ft import Coupling, S2FTConfig

BACKEND = "aot_eager"  # traces forward and backward as inductor does, in a fraction of the time
FORWARD = "eager"  # traces the forward only: what is in a graph, and when it is traced again
FAMILIES = ("phi3", "gpt2", "vit")  # packed and transposed weights, and no token ids; most other tests have a LLaMA
SCATTERED = ("phi3", "gpt2", "bert")
MORE = (
    "llama-grouped",
    "llama-biased",
    "llama-gelu-tanh",
    "qwen2",
    "gemma2",
    "gpt-neox",
    "bert",
    "t5",
    "t5-gated",
    "whisper",
    "clip",
    "opt",
    "gpt2-cross-attention",
    "stablelm-normed",
    "cohere",
    "starcoder2",
    "llama-relu",
    "llama-multi-query",
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(
        logging.getLogger("torch.__trace"), "propagate", False
    )  # otherwise pytest keeps every line of it
    torch._dynamo.reset()
    counters.clear()


def compiled(model, backend=BACKEND, **options):
    return torch.compile(model, fullgraph=True, backend=backend, **options)


def step(model, called=None, loss=loss_of):
    """The loss and the gradients of `model`, run as `called`."""
    seen = []
    found = gradients(model, lambda model: seen.append(loss(model if called is None else called)) or seen[0])
    return {"loss": seen[0].detach()} | found


def on_tokens(batch=2, length=9):
    """A loss for :func:`step`: that of a causal model on a batch of this size."""

    def loss(model):
        tokens = torch.randint(67, (batch, length), generator=torch.Generator().manual_seed(batch * length))
        return model(input_ids=tokens, labels=tokens).loss

    return loss


# ---- forward and backward ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case,layout,layers",
    [
        *((case, "indexed" if case in SCATTERED else "permuted", 1) for case in FAMILIES),
        *(pytest.param(case, "permuted", 1, marks=pytest.mark.slow) for case in SCATTERED),
        # how many tokens an expert gets stays on the device, so nothing breaks the graph
        pytest.param("qwen3-moe", "permuted", 1, marks=pytest.mark.slow),
        *(
            pytest.param(case, layout, None, marks=pytest.mark.slow)
            for case in MORE
            for layout in ("permuted", "indexed")
        ),
    ],
)
def test_one_graph_has_the_gradients_of_the_uncompiled_model(case, layout, layers):
    model = attached(case, layers, layout=layout)
    assert_same(step(model, compiled(model)), step(model), LOGITS)
    assert counters["stats"]["unique_graphs"] == 1


# The inductor of PyTorch 2.13 has an error if ATEN_CPU_CAPABILITY selects a smaller processor than the one it runs on.
# With ATEN_CPU_CAPABILITY=avx2 on a processor with AVX-512, ``torch.compile(lambda a, b: (a.t() @ b).float())`` of
# bfloat16 matrices [3, 3] and [3, 11] does not write elements 16 to 31 of the result. With "default" it does not compile.
@pytest.mark.skipif(bool(os.environ.get("ATEN_CPU_CAPABILITY")), reason="PyTorch's inductor is wrong with it")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", ("permuted", "indexed"))
def test_gradients_with_inductor(layout, dtype):
    """The kernels of the default compiler round differently, in bfloat16 by about its spacing."""
    model = attached("llama-grouped", layers=1, dtype=dtype, layout=layout)
    assert_same(step(model, torch.compile(model, fullgraph=True)), step(model), GEMM[dtype][0])


def test_convolutions_and_custom_couplings():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2), nn.Flatten())
    coupling = Coupling("ffn", 0, (Projection("u", "0", 16, 1, 0),), Projection("d", "2", 16, 1, 1))
    x = torch.randn(2, 3, 6, 6)
    s2ft.attach(model, S2FTConfig(u_ratio=0.25, d_ratio=0.25), couplings=[coupling], example=x)
    model(x)  # the hooks of a class of torch.nn are compiled too, and can't write there
    assert_same(*(step(model, called, lambda m: m(x).square().mean()) for called in (compiled(model), model)), LOGITS)


def test_batches_of_new_sizes_are_not_recompiled_each_time():
    """A second size makes batch size and length symbolic. Every size runs after that."""
    model = attached("llama-grouped", layers=1)
    called, graphs = compiled(model, FORWARD), []
    for size in ((2, 9), (3, 12), (5, 10)):
        assert_same(step(model, called, on_tokens(*size)), step(model, loss=on_tokens(*size)), LOGITS)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2]


# ---- with other switches -------------------------------------------------------------------------------------


@torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
@pytest.mark.parametrize("reentrant", (False, pytest.param(True, marks=pytest.mark.slow)), ids=("inside", "reentrant"))
def test_checkpointing(reentrant):
    """The hook of transformers is removed: an attached model does not need it, and a graph can't contain it.

    Where the package `kernels` is installed, transformers sets a context variable around each layer. PyTorch takes a
    checkpointed layer into a graph only if the backward need not set it again, also for a model without s2ft.
    """
    model = attached("llama-grouped", layers=1)
    expected = step(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    with pytest.raises(torch._dynamo.exc.Unsupported, match="requires_grad_"):
        loss_of(compiled(model))
    model.disable_input_require_grads()
    torch._dynamo.reset()
    assert_same(step(model, compiled(model)), expected, LOGITS)


@pytest.mark.parametrize("dtype", (torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)), ids=str)
def test_autocast(dtype):
    model = attached("llama-grouped", layers=1)
    with torch.autocast("cpu", dtype):
        assert_same(step(model, compiled(model)), step(model), GEMM[dtype][0])


@pytest.mark.parametrize("layout", ("permuted", pytest.param("indexed", marks=pytest.mark.slow)))
def test_optimizer_steps_leave_nothing_stale(layout):
    """After four steps, losses and merged weights equal the uncompiled ones, and the frozen weights are unchanged."""
    losses, merged = [], []
    for compile_it in (True, False):
        model = attached("llama-grouped", layers=1, layout=layout)
        frozen = {name: value.clone() for name, value in model.state_dict().items() if not name.endswith("s2")}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        called, seen = compiled(model) if compile_it else model, []
        for _ in range(4):
            seen.append(step(model, called)["loss"].item())
            optimizer.step()
        assert all(torch.equal(value, frozen[name]) for name, value in model.state_dict().items() if name in frozen)
        losses.append(seen)
        with torch.no_grad():
            output = output_of(called.eval())
            merged.append(s2ft.merge(model).state_dict())
            assert relative_difference(output_of(model), output) <= LOGITS
    assert losses[0] == pytest.approx(losses[1], rel=LOGITS) and losses[0][-1] < losses[0][0]
    assert all(relative_difference(value, merged[1][key]) <= 1e-4 for key, value in merged[0].items())
    assert counters["stats"]["unique_graphs"] <= 2  # one for training and one for evaluation


def test_switching_writing_and_merging_after_compiling():
    model = attached("llama-grouped", layers=1).eval()
    called = compiled(model, FORWARD)

    def same():
        return relative_difference(output_of(called), output_of(model)) <= LOGITS

    with torch.no_grad():
        trained = output_of(model)
        assert same()
        s2ft.set_adapter(model, None)
        assert same() and not torch.equal(output_of(called), trained)
        s2ft.set_adapter(model, "default")
        assert relative_difference(output_of(called), trained) <= LOGITS
        layer = record_of(model).mounts["model.layers.0.mlp.down_proj"].layer
        layer.s2.add_(0.1)
        found = output_of(called)  # before the uncompiled model runs, which would write the slice
        assert same() and torch.equal(output_of(called), found) and not torch.equal(found, trained)
        layer.s2.data.add_(0.1)
        layer.fuse()
        assert same() and not torch.equal(output_of(called), found)
        s2ft.merge(model)
        assert same()


@pytest.mark.parametrize("cache", ("static", pytest.param(None, marks=pytest.mark.slow)))
def test_generating(cache):
    model = attached("llama-grouped", layers=1).eval()
    model.config.use_cache = True
    tokens = token_batch(model)
    options = dict(
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        cache_implementation=cache,
    )
    expected = model.generate(tokens, **options)
    model.forward = compiled(model.forward)
    assert torch.equal(model.generate(tokens, **options), expected)
    assert counters["stats"]["unique_graphs"] in (2, 3)  # the prompt, a token, and perhaps a token at any position


# ---- compiled before attach ----------------------------------------------------------------------------------


def test_attaching_to_a_model_that_is_compiled_in_place():
    model = plain_model("llama-grouped", layers=1)
    model.compile(fullgraph=True, backend=FORWARD)
    other = attached("llama-grouped", layers=1)
    with torch.no_grad():
        base = output_of(model)
    randomize(with_adapter(model, everything("llama-grouped")))
    assert_same(step(model), step(other), LOGITS)
    s2ft.detach(model)
    with torch.no_grad():
        assert torch.equal(output_of(model), base)


def test_a_wrapper_stands_for_the_model_inside(tmp_path):
    """Every function that takes a model accepts the wrapper, and its outputs are those of the attached model."""
    model = plain_model("llama-grouped", layers=1)
    called = compiled(model, FORWARD)
    with torch.no_grad():
        base = output_of(called)
    config = everything("llama-grouped")
    assert s2ft.plan(called, config).rows == s2ft.attach(called, config).rows
    inside = attached("llama-grouped", layers=1)
    s2ft.set_adapter(called, None)
    s2ft.set_adapter(called, "default")
    for path, mount in record_of(model).mounts.items():
        mount.layer.s2.data.copy_(record_of(inside).mounts[path].layer.s2)
    assert_same(step(model, called), step(inside), LOGITS)
    assert s2ft.status(called).trainable == "default" and str(s2ft.status(called)) == str(s2ft.status(model))
    s2ft.save_adapter(called, tmp_path / "adapter")
    s2ft.export_lora(called, tmp_path / "lora")
    assert s2ft.get_adapter(called, "default").parameters == s2ft.get_adapter(model, "default").parameters
    with torch.no_grad(), s2ft.disable_adapters(called):
        assert relative_difference(output_of(called), base) <= LOGITS
    s2ft.load_adapter(called, tmp_path / "adapter", "second", active=False)
    s2ft.rename_adapter(called, "second", "other")
    assert s2ft.list_adapters(called) == ["default", "other"]
    s2ft.delete_adapter(called, "other")
    called.eval()
    assert s2ft.merge(called) is model
    with torch.no_grad():
        assert relative_difference(output_of(called), output_of(inside.eval())) <= LOGITS
    with pytest.raises(ValueError, match="LlamaForCausalLM has no S²FT adapter"):
        s2ft.detach(called)
    s2ft.import_lora(compiled(plain_model("llama-grouped", layers=1)), tmp_path / "lora")


@pytest.mark.parametrize("case", ["llama-grouped", "gpt2"])
def test_a_gradient_of_torch_func(case):
    model = attached(case)
    ids = token_batch(model)
    trained = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
    loss = lambda slices: torch.func.functional_call(model, slices, (ids,), {"labels": ids}).loss  # noqa: E731
    found = torch.func.grad(loss)(trained)
    model(ids, labels=ids).loss.backward()
    assert_same(found, {name: model.get_parameter(name).grad for name in trained}, 1e-5)


def test_layers_that_are_compiled_separately():
    """The wrappers are inside the model and part of module paths."""
    config = everything("llama-grouped")
    model, other = plain_model("llama-grouped", layers=2), attached("llama-grouped", layers=2)
    before = copy.deepcopy(model.state_dict())
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = compiled(layer, FORWARD)
    randomize(with_adapter(model, config))
    assert_same({name.replace("_orig_mod.", ""): grad for name, grad in step(model).items()}, step(other), LOGITS)
    s2ft.detach(model)
    after = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())
