"""effective="step": the weight holds base + s2 between optimizer steps, and all numbers are those of the default."""

import copy
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from state.models import fill_slices, ratios, tiny_model, tokens
from state.plain import same_bits
from state.threads import repeating
from support.inside import EXPERTS, BaseS2Layer as S2Layer, Projection, kind_of
from support.models import model_of
from torch import nn
from transformers.pytorch_utils import Conv1D

import s2ft
from s2ft import Coupling

CALL, STEP = "call", "step"
STEPS = s2ft.S2FTConfig(d_ratio=0.25, effective=STEP)
OFFSETS = torch.tensor([3, 3, 7], dtype=torch.int32)


# ---- layers of every kind: the same bits -------------------------------------------------------------


def experts(dim: int, effective: str, transposed: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A layer of three experts 16 → 8, the second without units."""
    shape = (3, 16, 8) if transposed else (3, 8, 16)
    weight = nn.Parameter(torch.randn(shape).to(dtype))
    index = {0: torch.tensor([0, 5]), 2: torch.tensor([1, 3, 2])}
    return EXPERTS.layers[dim](weight, index, torch.float32, transposed, effective)


def made_from(make, dim: int, effective: str, units: dict, dtype: torch.dtype = torch.float32) -> nn.Module:
    plain = make().to(dtype)
    return kind_of(plain).layers[dim].from_module(plain, **units, delta_dtype=torch.float32, effective=effective)


RANGE, SCATTERED = dict(start=2, end=5), dict(index=torch.tensor([6, 0, 3]))
MAKERS = {
    "linear": (partial(nn.Linear, 16, 8), (2, 3, 16)),
    "linear, no bias": (partial(nn.Linear, 16, 8, bias=False), (5, 16)),
    "Conv1D": (partial(Conv1D, 8, 16), (2, 3, 16)),
    "conv1d": (partial(nn.Conv1d, 16, 8, 3, padding=1), (2, 16, 6)),
    "conv2d, padded by hand": (partial(nn.Conv2d, 16, 8, 2, stride=2, padding_mode="reflect", padding=1), (16, 6, 7)),
}
LAYERS = {
    f"{name}, {('outputs', 'inputs')[dim]}, {where}": (
        lambda effective, dtype, make=make, dim=dim, units=units: made_from(make, dim, effective, units, dtype),
        shape,
        (),
    )
    for name, (make, shape) in MAKERS.items()
    for dim in (0, 1)
    for where, units in (("range", RANGE), ("index", SCATTERED))
} | {
    f"experts, {('outputs', 'inputs')[dim]}, {'transposed' if transposed else 'plain'}": (
        lambda effective, dtype, dim=dim, transposed=transposed: experts(dim, effective, transposed, dtype),
        (7, 16),
        (OFFSETS,),
    )
    for dim in (0, 1)
    for transposed in (False, True)
}


def pair(case: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Two layers with the same numbers, the default and one with effective="step"."""
    made = []
    for effective in (CALL, STEP):
        torch.manual_seed(0)
        layer = LAYERS[case][0](effective, dtype)
        with torch.no_grad():
            layer.s2.normal_(std=0.1)
        made.append(layer)
    return made[0], made[1]


def example(case: str, seed: int, dtype: torch.dtype) -> tuple:
    """Arguments of a layer's forward."""
    _, shape, more = LAYERS[case]
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_(), *more


def trained(layer: nn.Module, case: str, dtype: torch.dtype, autocast: bool) -> list[torch.Tensor]:
    """Outputs, gradients and values of s2 over steps of two micro-batches each."""
    optimizer, seen = torch.optim.AdamW([layer.s2], lr=1e-2), []
    for step in range(3):
        for micro in range(2):
            x, *more = example(case, 2 * step + micro, dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = layer(x, *more)
            y.float().pow(2).sum().backward()
            seen += [y.detach(), x.grad]
        seen.append(layer.s2.grad.clone())
        optimizer.step()
        optimizer.zero_grad()
        seen.append(layer.s2.detach().clone())
    return seen


NUMBERS = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False), "autocast": (torch.float32, True)}


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("case", LAYERS)
def test_training_a_layer_gives_the_same_bits(case, numbers):
    dtype, autocast = NUMBERS[numbers]
    default, held = pair(case, dtype)
    base = held.weight.detach().clone()
    for a, b in zip(trained(default, case, dtype, autocast), trained(held, case, dtype, autocast), strict=True):
        assert same_bits(a, b)
    assert same_bits(default.weight, base) and not same_bits(held.weight, base)
    default.fuse(), held.fuse()
    assert same_bits(default.weight, held.weight)
    held.unfuse()
    assert same_bits(held.weight, base)


def second_derivatives(layer: nn.Module, case: str) -> list[torch.Tensor]:
    x, *more = example(case, 0, torch.float64)
    y = layer(x, *more).pow(3).sum()
    first = torch.autograd.grad(y, (x, layer.s2), create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, layer.s2))]


@pytest.mark.parametrize("case", LAYERS)
def test_second_derivatives_of_a_layer(case):
    default, held = pair(case, torch.float64)
    for a, b in zip(second_derivatives(default, case), second_derivatives(held, case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ---- when the slice is written -----------------------------------------------------------------------


def writes(layer: nn.Module) -> list[None]:
    """A list that gets an entry whenever the layer writes base + s2."""
    seen, write = [], layer._effective
    layer._effective = lambda base: seen.append(None) or write(base)
    return seen


def linear_layer() -> tuple[nn.Module, torch.Tensor]:
    return pair("linear, inputs, range")[1], torch.randn(4, 16)


def test_the_slice_is_written_once_for_each_optimizer_step():
    layer, x = linear_layer()
    seen, optimizer = writes(layer), torch.optim.SGD([layer.s2], lr=0.1)
    for step in range(3):
        for _ in range(4):
            layer(x).sum().backward()
        with torch.no_grad():
            layer(x)
        assert len(seen) == step + 1
        optimizer.step()
        optimizer.zero_grad()


def through_data(s2: nn.Parameter) -> torch.optim.Optimizer:
    """An optimizer that writes where no version counts it, as many do that are not PyTorch's."""

    class Hidden(torch.optim.Optimizer):
        def step(self):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.sub_(0.5 * parameter.grad)

    return Hidden([s2], {})


OPTIMIZERS = {
    "SGD": lambda s2: torch.optim.SGD([s2], lr=0.5),
    "AdamW, foreach": lambda s2: torch.optim.AdamW([s2], lr=0.5, foreach=True),
    "AdamW, fused": lambda s2: torch.optim.AdamW([s2], lr=0.5, fused=True),
    "through .data": through_data,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_noticed(optimizer):
    layer, x = linear_layer()
    base, opt = layer.weight.detach().clone(), OPTIMIZERS[optimizer](layer.s2)
    layer(x).sum().backward()
    opt.step()
    y = layer(x)
    expected = nn.functional.linear(x, base.index_add(1, torch.arange(2, 5), layer.s2.detach()), layer.bias)
    assert torch.equal(y, expected)


def in_place(layer):
    with torch.no_grad():
        layer.s2.mul_(3)


def hidden(layer):
    layer.s2.data.mul_(2)
    layer.fuse()


CHANGES = {
    "in place": in_place,
    "loaded": lambda layer: layer.load_state_dict({**layer.state_dict(), "s2": torch.ones_like(layer.s2)}),
    "loaded alone": lambda layer: layer.load_state_dict({"s2": torch.ones_like(layer.s2)}, strict=False),
    "other memory": lambda layer: setattr(layer.s2, "data", torch.ones_like(layer.s2)),
    "other parameter": lambda layer: setattr(layer, "s2", nn.Parameter(torch.ones_like(layer.s2))),
    "hidden": hidden,
    "cast": lambda layer: layer.bfloat16(),
    "cast and back": lambda layer: layer.double().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_gives_what_the_default_gives(change):
    default, held = pair("linear, inputs, index")
    x = torch.randn(4, 16)
    for layer in (default, held):
        layer(x)
        CHANGES[change](layer)
    x = x.to(default.weight.dtype)
    if default.fused:
        default.unfuse()
    assert same_bits(default(x), held(x))
    held.unfuse()
    assert same_bits(default.weight, held.weight)


def with_state_of(layer: nn.Module) -> nn.Module:
    made = copy.deepcopy(layer)
    with torch.no_grad():
        made.s2.zero_(), made(torch.zeros(1, 16))
    made.load_state_dict(pickle.loads(pickle.dumps(layer.state_dict())))
    return made


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda layer: pickle.loads(pickle.dumps(layer)), "state": with_state_of}


@pytest.mark.parametrize("is_stale", (False, True), ids=("held", "stale"))
@pytest.mark.parametrize("way", COPIES)
def test_copies_compute_the_same_and_have_the_base(way, is_stale):
    layer, x = linear_layer()
    base = layer.weight.detach().clone()
    layer(x)
    if is_stale:
        in_place(layer)
    made = COPIES[way](layer)
    assert same_bits(made(x), layer(x))
    for one in (made, layer):
        one.unfuse()
        assert same_bits(one.weight, base)


def test_a_first_forward_in_inference_mode_does_not_spoil_the_base():
    layer, x = linear_layer()
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    layer.load_state_dict(layer.state_dict())
    assert not layer.base.is_inference()


# ---- a backward after the weight has changed ---------------------------------------------------------


def gradients(layer: nn.Module, between) -> list[torch.Tensor]:
    x = torch.ones(3, 16).requires_grad_()
    y = layer(x).pow(2).sum()
    between(layer)
    y.backward()
    return [x.grad, layer.s2.grad]


def switched_off(layer):
    layer.unfuse()
    layer.enabled = False


def evaluated(layer):
    with torch.no_grad():
        layer.eval()(torch.randn(2, 16))


@pytest.mark.parametrize("between", (switched_off, evaluated, S2Layer.unfuse, lambda layer: None))
def test_a_backward_does_not_need_the_weight_to_be_held(between):
    default, held = pair("linear, inputs, range")
    for a, b in zip(gradients(default, between), gradients(held, between), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("case", ("linear, inputs, range", "conv1d, outputs, index", "experts, inputs, plain"))
@pytest.mark.parametrize("effective", (CALL, STEP))
def test_a_backward_after_a_change_of_s2_raises(case, effective):
    layer = pair(case)[effective == STEP]
    x, *more = example(case, 0, torch.float32)
    y = layer(x, *more)
    in_place(layer)
    with torch.no_grad():
        layer(x, *more)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- models ------------------------------------------------------------------------------------------


def attached(case: str, effective: str, layout: str = "permuted", dtype=torch.float32, **options) -> nn.Module:
    model = tiny_model(case, layers=2, dtype=dtype)
    s2ft.attach(model, s2ft.S2FTConfig(**ratios(case, 0.25), layout=layout, effective=effective, **options))
    fill_slices(model, seed=3)
    return model


def slices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trained_model(model: nn.Module, adapter: s2ft.Adapter | None = None) -> list[torch.Tensor]:
    """What a run with accumulation, evaluation, switches and a copy in between shows of a model."""
    optimizer, seen = torch.optim.AdamW(slices(model), lr=1e-2), []
    for step in range(3):
        model.train()
        for micro in range(2):
            ids = tokens(model, seed=10 * step + micro)
            loss = model(input_ids=ids, labels=ids).loss
            with torch.no_grad():
                seen.append(model(input_ids=ids).logits)
            loss.backward()
            seen.append(loss.detach())
        seen += [parameter.grad.clone() for parameter in slices(model)]
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with s2ft.disable_adapters(model), torch.no_grad():
            seen.append(model(input_ids=ids).logits)
        if adapter is not None:
            name = s2ft.status(model).trainable
            for active in ({adapter.name: 1.0}, {adapter.name: 1.0, name: 1.0}, {name: 0.5}, {name: 1.0}):
                s2ft.set_adapter(model, active)
                seen.append(model(input_ids=ids).logits.detach())
    seen += [delta.values for delta in s2ft.get_adapter(model, s2ft.status(model).trainable).deltas.values()]
    return seen


def both(make) -> None:
    """What a run shows of a model is the same with both values of `effective`."""
    found = [make(effective) for effective in (CALL, STEP)]
    for a, b in zip(*found, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize(
    "case, layout, dtype, reentrant",
    [
        ("llama-tied", "permuted", torch.float32, None),
        ("llama-grouped", "indexed", torch.bfloat16, True),
        ("gpt2", "permuted", torch.bfloat16, False),
        ("qwen2", "indexed", torch.float32, False),
    ],
)
def test_training_a_model_gives_the_same_bits(case, layout, dtype, reentrant):
    def run(effective):
        model = attached(case, effective, layout, dtype)
        base = {name: value.clone() for name, value in s2ft.detach(copy.deepcopy(model)).state_dict().items()}
        other = s2ft.get_adapter(model, "default") * -1.0
        other.name = "other"
        s2ft.load_adapter(model, other, active=False)
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        seen = trained_model(model, other)
        for state in (model.state_dict(), s2ft.detach(copy.deepcopy(model)).state_dict()):
            assert all(same_bits(value, state[name]) for name, value in base.items())  # the base is in every state
            assert not any(name.endswith(".base") for name in state)
        return seen + list(s2ft.merge(model).state_dict().values())

    both(run)


@pytest.mark.parametrize("keys", ("u", "g", "ug"))
def test_gate_and_up_share_the_gradient_of_their_input(keys):
    def run(effective):
        model = tiny_model("llama", layers=2, dtype=torch.bfloat16)
        s2ft.attach(model, s2ft.S2FTConfig(**{f"{key}_ratio": 0.25 for key in keys}, effective=effective))
        return trained_model(fill_slices(model, seed=3) or model)

    both(run)


def test_training_a_mixture_gives_the_same_bits():
    def run(effective):
        model = copy.deepcopy(model_of("mixtral")).train()
        s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.25, u_ratio=0.25, o_ratio=0.25, effective=effective))
        fill_slices(model, seed=3)
        return trained_model(model) + list(s2ft.merge(model).state_dict().values())

    both(run)


def test_saving_and_resuming_gives_the_same_bits(tmp_path):
    model = attached("llama", STEP)
    trained_model(model)
    s2ft.save_adapter(model, tmp_path / "adapter")
    fresh = s2ft.detach(copy.deepcopy(model))
    s2ft.load_adapter(fresh, tmp_path / "adapter", trainable=True)
    assert s2ft.read_adapter(tmp_path / "adapter").config.effective == STEP
    ids = tokens(model)
    assert same_bits(model.eval()(input_ids=ids).logits, fresh.eval()(input_ids=ids).logits)
    for a, b in zip(trained_model(model), trained_model(fresh), strict=True):
        assert same_bits(a, b)


def test_a_checkpoint_of_the_merged_model_has_the_last_step(tmp_path):
    model = attached("llama", STEP)
    ids = tokens(model)
    model(input_ids=ids)
    in_place(next(module for module in model.modules() if isinstance(module, S2Layer)))
    s2ft.save_merged(model, tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").state_dict()
    expected = s2ft.merge(model).state_dict()
    assert all(same_bits(value, merged[name]) for name, value in expected.items())


def test_a_compiled_model_notices_every_step():
    torch._dynamo.reset()  # the limit of recompilations counts those of other tests

    def run(effective):
        model = attached("llama", effective, ffn_kernel=False)
        called = torch.compile(model, backend="eager") if effective == STEP else model
        optimizer, ids, losses = torch.optim.SGD(slices(model), lr=0.5), tokens(model), []
        for _ in range(3):
            losses.append(called(input_ids=ids, labels=ids).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        return [loss.detach() for loss in losses]

    both(run)
    torch._dynamo.reset()


# ---- readers -----------------------------------------------------------------------------------------


def reads_while(model: nn.Module, name: str, run, lock=s2ft.stable_weights) -> list[torch.Tensor]:
    """Clones of a weight that another thread makes while a function runs."""
    seen: list[torch.Tensor] = []

    def read() -> None:
        with lock():
            seen.append(model.get_parameter(name).detach().clone())

    with repeating(read):
        run()
    return seen


@pytest.mark.parametrize("lock", (nullcontext, s2ft.stable_weights))
def test_a_reader_sees_one_value_between_steps_without_any_lock_and_whole_steps_with_one(lock):
    model = attached("llama", STEP)
    name, ids, steps = "model.layers.1.mlp.down_proj.weight", tokens(model, batch=4, length=16), []
    optimizer = torch.optim.SGD(slices(model), lr=0.5 if lock is s2ft.stable_weights else 0.0)
    if lock is nullcontext:
        s2ft.fuse(model)
    steps.append(model.get_parameter(name).detach().clone())

    def train() -> None:
        for _ in range(6):
            model.train()(input_ids=ids, labels=ids).loss.backward()
            steps.append(model.get_parameter(name).detach().clone())
            optimizer.step()
            optimizer.zero_grad()

    seen = reads_while(model, name, train, lock)
    assert seen and all(any(same_bits(one, step) for step in steps) for one in seen)
    assert len({one.sum().item() for one in steps}) == (1 if lock is nullcontext else 7)


def test_all_layers_are_written_before_the_first_one_runs():
    model = attached("llama", STEP)
    ids = tokens(model)
    layers = [module for module in model.modules() if isinstance(module, S2Layer)]
    model.model.layers[0].register_forward_pre_hook(lambda *_: held.append([layer.is_held for layer in layers]))
    held: list[list[bool]] = []
    for _ in range(2):
        model(input_ids=ids)
        for layer in layers:
            in_place(layer)
    assert held == [[True] * len(layers)] * 2


def test_another_process_may_read_the_weights():
    plain = nn.Linear(16, 8)
    plain.weight.share_memory_()
    with pytest.raises(ValueError, match="shared with other processes"):
        s2ft.S2RowLinear.from_module(plain, 0, 4)
    layer = s2ft.S2RowLinear.from_module(plain, 0, 4, effective=STEP)
    layer(torch.randn(2, 16)).sum().backward()
    assert layer.weight.is_shared() and layer.fused


@pytest.mark.cuda
def test_a_layer_on_a_second_stream_waits_for_the_write():
    default, held = (layer.cuda() for layer in pair("linear, inputs, range"))
    x, other = torch.randn(4, 16, device="cuda"), torch.cuda.Stream()
    expected = default(x)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # the write on this stream comes long after the host
    held(x)
    with torch.cuda.stream(other):
        found = held(x)
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.cuda
def test_a_captured_step_writes_the_slice_at_every_replay():
    layer = pair("linear, inputs, range")[1].cuda()
    x, graph = torch.randn(4, 16, device="cuda"), torch.cuda.CUDAGraph()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="run the model once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            layer(x)
        layer(x)
        with torch.cuda.graph(graph):
            y = layer(x)
        layer.s2.mul_(2)
        graph.replay()
        captured = y.clone()
        assert torch.equal(captured, layer(x))


# ---- what is refused ---------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.third.weight = self.second.weight

    def forward(self, x):
        return self.third(self.second(self.first(x).relu()))


def test_a_tied_weight_is_refused_and_the_model_unchanged():
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    couplings = [Coupling("ffn", 0, (Projection("u", "first", 8, 1, 0),), Projection("d", "second", 8, 1, 1))]
    options = dict(d_ratio=0.5, layout="indexed")
    with pytest.raises(ValueError, match="second.weight and third.weight are one tied weight.*effective='call'"):
        s2ft.attach(model, s2ft.S2FTConfig(**options, effective=STEP), couplings=couplings, verify=False)
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    s2ft.attach(model, s2ft.S2FTConfig(**options), couplings=couplings, verify=False)


class Scaled(nn.Linear):
    """A class with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x) + 1


REFUSED = {
    "its own forward": lambda: made_from(partial(Scaled, 16, 8), 1, STEP, RANGE),
    "call step 'epoch'": lambda: s2ft.S2RowLinear.from_module(nn.Linear(4, 4), effective="epoch"),
    "effective 'epoch'": lambda: s2ft.S2FTConfig(effective="epoch"),
    "fsdp2": lambda: s2ft.estimate(tiny_model("llama"), STEPS, batch=1, length=4, strategy="fsdp2"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused(words):
    with pytest.raises(ValueError) as caught:
        REFUSED[words]()
    assert all(word in str(caught.value) for word in words.split())


def test_another_weight_is_refused_while_the_base_is_kept():
    layer, x = linear_layer()
    before, y = layer.weight.detach().clone(), layer(x)
    held, other = layer.weight, nn.Parameter(torch.ones_like(layer.weight), requires_grad=False)
    layer.weight = other
    for call in (lambda: layer(x), layer.fuse, layer.unfuse):
        with pytest.raises(RuntimeError, match="was replaced or sharded while it held base"):
            call()
    with pytest.raises(RuntimeError, match="was replaced"):
        torch.func.functional_call(layer, {"weight": torch.zeros_like(other)}, (x,))
    assert bool((other == 1).all())
    layer.weight = held
    assert same_bits(layer(x), y)
    layer.unfuse()
    assert same_bits(held, before)


def test_an_estimate_counts_the_copy_of_the_base():
    call, step = (
        s2ft.estimate(tiny_model("llama"), config, batch=1, length=4)
        for config in (s2ft.S2FTConfig(d_ratio=0.25), STEPS)
    )
    model = tiny_model("llama")
    s2ft.attach(model, STEPS)
    model(input_ids=tokens(model))
    bases = sum(m.base.numel() * m.base.itemsize for m in model.modules() if isinstance(m, S2Layer))
    assert step.buffers - call.buffers == bases > 0
