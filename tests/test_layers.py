"""S2ColumnLinear and S2RowLinear: one test for each property that the layers promise."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from support.inductor import skip_where_wrong
from support.pairs import in_turn
from support.tolerances import GEMM
from torch import nn

from s2ft import S2ColumnLinear, S2RowLinear

KINDS = (S2ColumnLinear, S2RowLinear)
UNITS = {"slice": dict(start=2, end=5), "scattered": dict(index=torch.tensor([6, 0, 3]))}
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture(params=UNITS)
def units(request):
    return UNITS[request.param]


def elements(units):
    return units["index"] if "index" in units else torch.arange(units["start"], units["end"])


def layer_of(kind, units, dtype=torch.float32, **more):
    layer = kind(11, 9, dtype=dtype, **units, **more)
    with torch.no_grad():
        layer.s2.normal_()
    return layer


def effective(layer, units):
    """base + s2 in the selected units, from an unfused layer."""
    weight = layer.weight.detach().clone()
    index = elements(units)
    return weight.index_copy(
        layer.dim, index, (weight.index_select(layer.dim, index) + layer.s2.detach()).to(weight.dtype)
    )


def step(layer, optimizer, scale=1.0):
    x = torch.randn(4, 3, 11, dtype=layer.weight.dtype)
    (layer(x).float().pow(2).mean() * scale).backward()
    optimizer.step()
    optimizer.zero_grad()


# ---- constructor -------------------------------------------------------------------------------------


def test_constructor_of_the_reference():
    layer = S2RowLinear(11, 9, True, 2, 5, torch.device("cpu"), torch.bfloat16)
    assert layer.s2.shape == (9, 3) and layer.weight.shape == (9, 11) and layer.bias.shape == (9,)
    assert S2ColumnLinear(11, 9, False, 2, 5).s2.shape == (3, 11)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["s2"]


@pytest.mark.parametrize("bias", (True, False, None, torch.arange(9.0)), ids=("true", "false", "none", "tensor"))
def test_bias_is_a_bool_or_a_tensor(kind, bias):
    layer = kind(11, 9, bias=bias, start=0, end=2)
    if isinstance(bias, torch.Tensor):
        assert torch.equal(layer.bias, bias) and not layer.bias.requires_grad
    else:
        assert (layer.bias is not None) == bool(bias)


def test_whole_dimension_by_default(kind):
    layer = kind(11, 9)
    assert layer.s2.shape == layer.weight.shape


@pytest.mark.parametrize(
    "bad,message",
    [
        (dict(start=5, end=2), "start=5, end=2"),
        (dict(start=3, end=3), "start=3, end=3"),
        (dict(start=-1, end=2), "start=-1"),
        (dict(start=0, end=12), "end=12"),
        (dict(index=torch.tensor([0, 11])), "index must be within"),
        (dict(index=torch.tensor([-1])), "index must be within"),
        (dict(index=torch.tensor([1, 1])), "twice"),
        (dict(index=torch.tensor([], dtype=torch.long)), "at least one"),
        (dict(start=0, end=1, index=torch.tensor([1])), "start and end must be None with an index"),
        (dict(start=0, end=1, bias=torch.zeros(3)), "bias must have shape"),
    ],
)
def test_bad_selection_raises(kind, bad, message):
    with pytest.raises(ValueError, match=message):
        kind(11, 9 if kind is S2RowLinear or "bias" in bad else 11, **bad)


def test_meta_device(kind):
    layer = kind(11, 9, start=2, end=5, device="meta", dtype=torch.bfloat16)
    assert layer.s2.is_meta and layer(torch.empty(3, 11, device="meta", dtype=torch.bfloat16)).shape == (3, 9)


# ---- forward and gradient ------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", ((), (4,), (2, 3), (2, 3, 4), (0,)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, *HALF))
def test_forward_is_one_linear_on_the_merged_weight(kind, units, dtype, leading):
    layer = layer_of(kind, units, dtype)
    x = torch.randn(*leading, 11).to(dtype)
    assert torch.equal(layer(x), F.linear(x, effective(layer, units), layer.bias))


def test_gradient_and_optimizer_state_have_the_slices_size(kind, units):
    layer = layer_of(kind, units)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(4, 11)).sum().backward()
    assert layer.s2.grad.shape == layer.s2.shape and layer.weight.grad is None and layer.bias.grad is None
    optimizer.step()
    assert [state["exp_avg"].shape for state in optimizer.state.values()] == [layer.s2.shape]


@pytest.mark.parametrize("optimizer", (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adafactor))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_frozen_entries_are_bit_identical_after_training_with_weight_decay(kind, units, optimizer, dtype):
    layer = layer_of(kind, units, dtype)
    weight, bias, s2 = layer.weight.clone(), layer.bias.clone(), layer.s2.detach().clone()
    trainer = optimizer(layer.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(5):
        step(layer, trainer)
    assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias)
    assert not torch.equal(layer.s2, s2)
    layer.fuse()
    frozen = torch.ones(weight.shape[layer.dim], dtype=torch.bool)
    frozen[elements(units)] = False
    keep = frozen.nonzero().squeeze(1)
    assert torch.equal(layer.weight.index_select(layer.dim, keep), weight.index_select(layer.dim, keep))


def test_gradient_accumulation_adds_up(kind, units):
    layer = layer_of(kind, units, torch.float64)
    x = torch.randn(4, 3, 11, dtype=torch.float64)
    layer(x).pow(2).sum().backward()
    whole = layer.s2.grad.clone()
    layer.zero_grad()
    assert layer.s2.grad is None
    for part in x:
        layer(part).pow(2).sum().backward()
    torch.testing.assert_close(layer.s2.grad, whole)


def test_clipping_sees_the_gradient(kind, units):
    layer = layer_of(kind, units)
    layer(torch.randn(4, 11)).pow(2).sum().backward()
    norm = layer.s2.grad.norm()
    assert torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.1) == norm
    torch.testing.assert_close(layer.s2.grad.norm(), torch.tensor(0.1))


def test_gradient_scaler(kind, units):
    layer = layer_of(kind, units)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = layer.s2.detach().clone()
    with torch.autocast("cpu", torch.float16):
        loss = layer(torch.randn(4, 11)).float().pow(2).mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(layer.s2, before)


def test_equals_masked_full_training(kind, units):
    """Ten AdamW steps give the same weight as full training with a masked gradient."""
    layer = layer_of(kind, units, torch.float64)
    nn.init.zeros_(layer.s2)
    base = layer.weight.detach().clone()
    full = nn.Parameter(base.clone())
    mask = torch.zeros_like(base).index_fill_(layer.dim, elements(units), 1)
    ours = torch.optim.AdamW([layer.s2], lr=0.05, weight_decay=0.0)
    theirs = torch.optim.AdamW([full], lr=0.05, weight_decay=0.0)
    for i in range(10):
        x = torch.randn(5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        layer(x).pow(2).mean().backward()
        F.linear(x, full, layer.bias).pow(2).mean().backward()
        full.grad *= mask
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(effective(layer, units), full.detach())


@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing_gives_the_same_gradient(kind, units, reentrant):
    layer = layer_of(kind, units)
    x = torch.randn(4, 11, requires_grad=True)
    layer(x).pow(2).sum().backward()
    expected = layer.s2.grad.clone()
    layer.zero_grad()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).pow(2).sum().backward()
    assert torch.equal(layer.s2.grad, expected)


def test_float32_s2_on_a_bfloat16_base_keeps_small_updates(kind, units):
    layer = kind(11, 9, dtype=torch.bfloat16, delta_dtype=torch.float32, **units)
    assert layer.s2.dtype is torch.float32 and layer.weight.dtype is torch.bfloat16
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-5)
    step(layer, optimizer)
    assert layer.s2.abs().max() > 0
    assert layer(torch.randn(2, 11, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_compiled_training_equals_eager(kind, units):
    check_compiled(kind, units, "aot_eager")


@pytest.mark.parametrize("kind, units", in_turn(KINDS, UNITS), indirect=True)
def test_training_compiled_by_inductor_equals_eager(kind, units):
    skip_where_wrong()
    check_compiled(kind, units, "inductor")


def check_compiled(kind, units, backend):
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layer = layer_of(kind, units, torch.bfloat16, delta_dtype=torch.float32)
        forward = torch.compile(layer, fullgraph=True, backend=backend) if compiled else layer
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)  # AdamW makes rounding errors full steps
        for _ in range(4):
            loss = forward(torch.randn(3, 11, dtype=torch.bfloat16)).float().pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:4] == pytest.approx(losses[4:], rel=GEMM[torch.bfloat16][0])


# ---- fuse, unfuse, state -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, *HALF))
def test_fused_weight_equals_the_weight_in_training(kind, units, dtype):
    layer = layer_of(kind, units, dtype, delta_dtype=torch.float32).eval()
    x, expected = torch.randn(4, 11).to(dtype), effective(layer, units)
    y = layer(x)
    layer.fuse_s2_weight()
    assert layer.fused and torch.equal(layer.weight, expected) and torch.equal(layer(x), y)


@pytest.mark.parametrize("dtype", (torch.float32, *HALF))
def test_a_thousand_fuse_and_unfuse_restore_the_base_exactly(kind, units, dtype):
    layer = layer_of(kind, units, dtype).eval()
    weight = layer.weight.clone()
    for _ in range(1000):
        layer.fuse()
        layer.unfuse_s2_weight()
    assert torch.equal(layer.weight, weight) and layer.weight.is_leaf and not layer.fused


def test_fusing_twice_uses_the_new_s2(kind, units):
    layer = layer_of(kind, units).eval()
    weight = layer.weight.clone()
    layer.fuse()
    with torch.no_grad():
        layer.s2.add_(1)
    layer.fuse()
    fused = layer.weight.clone()
    layer.unfuse()
    assert torch.equal(layer.weight, weight) and torch.equal(effective(layer, units), fused)


def test_a_change_of_s2_while_fused_is_noticed(kind, units):
    layer = layer_of(kind, units).eval()
    layer.fuse()
    with torch.no_grad():
        layer.s2.mul_(2)
    y = layer(x := torch.randn(4, 11))
    layer.unfuse()
    assert torch.equal(layer(x), y)


def test_training_a_fused_layer_raises(kind, units):
    layer = layer_of(kind, units)
    layer.fuse()
    with pytest.raises(RuntimeError, match="unfuse"):
        layer(torch.randn(4, 11))
    with torch.no_grad():
        layer(torch.randn(4, 11))
    layer.eval()(torch.randn(4, 11))


@pytest.mark.parametrize("ours", (False, True), ids=("unfused", "fused"))
@pytest.mark.parametrize("theirs", (False, True), ids=("into-unfused", "into-fused"))
def test_state_dict_round_trips_in_either_state(kind, units, ours, theirs):
    source, target = layer_of(kind, units).eval(), layer_of(kind, units).eval()
    base = source.weight.clone()
    if ours:
        source.fuse()
    if theirs:
        target.fuse()
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer))
    x = torch.randn(4, 11)
    assert target.fused == source.fused and torch.equal(target(x), source(x))
    target.unfuse()
    assert torch.equal(target.weight, base) and torch.equal(target.s2, source.s2)


def test_loading_only_s2_into_a_fused_layer(kind, units):
    layer = layer_of(kind, units).eval()
    base, s2 = layer.weight.clone(), torch.randn_like(layer.s2)
    layer.fuse()
    layer.load_state_dict({"s2": s2}, strict=False)
    layer.unfuse()
    assert torch.equal(layer.weight, base) and torch.equal(layer.s2, s2)


def test_deepcopy_and_pickle(kind, units):
    for fused in (False, True):
        layer = layer_of(kind, units).eval()
        if fused:
            layer.fuse()
        x = torch.randn(4, 11)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
            assert torch.equal(other(x), layer(x))
            other.unfuse()
            assert torch.equal(effective(other, units), effective_of(layer, units))


def effective_of(layer, units):
    layer = copy.deepcopy(layer)
    layer.unfuse()
    return effective(layer, units)


def test_changing_the_dtype_while_fused(kind, units):
    layer = layer_of(kind, units).eval()
    base = layer.weight.clone()
    layer.fuse()
    layer.to(torch.bfloat16)
    layer.unfuse()
    assert torch.equal(layer.weight, base.to(torch.bfloat16))


# ---- the steps of the reference code -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("leading", ((5,), (2, 5)), ids=("2d", "3d"))
@pytest.mark.parametrize("replace", ("data", "copy"))
def test_the_steps_of_the_reference_code(kind, dtype, leading, replace):
    """Construct, load_state_dict(strict=False), replace .weight.data by the permuted weight, train."""
    linear = nn.Linear(11, 9, dtype=dtype)
    layer = kind(
        in_features=11,
        out_features=9,
        bias=linear.bias,
        start=2,
        end=5,
        device=next(linear.parameters()).device,
        dtype=next(linear.parameters()).dtype,
    )
    layer.load_state_dict(copy.deepcopy(linear.state_dict()), strict=False)
    order = torch.randperm(linear.weight.shape[layer.dim])
    permuted = linear.weight.data.index_select(layer.dim, order)
    if replace == "data":
        layer.weight.data = permuted.clone()
    else:
        layer.weight.data.copy_(permuted)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    for _ in range(3):
        x = torch.randn(*leading, 11, dtype=dtype)
        loss = layer(x).float().pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(layer.weight, permuted) and layer.s2.abs().max() > 0
    assert torch.equal(layer(x), F.linear(x, effective(layer, UNITS["slice"]), layer.bias))


def test_weight_replaced_after_training_started(kind):
    """The layer uses the new weight only, even if no version counter changes."""
    layer = layer_of(kind, UNITS["slice"])
    step(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    new = torch.randn_like(layer.weight)
    layer.weight.data.copy_(new)
    x = torch.randn(4, 11)
    assert torch.equal(layer(x), F.linear(x, effective(layer, UNITS["slice"]), layer.bias))
    assert torch.equal(layer.weight, new)


def test_hooks_of_the_linear_layer_are_kept(kind):
    linear, seen = nn.Linear(11, 9), []
    handle = linear.register_forward_hook(lambda *args: seen.append(1))
    layer = kind.from_module(linear, 2, 5)
    layer(torch.randn(2, 11))
    handle.remove()
    layer(torch.randn(2, 11))
    assert seen == [1] and layer.weight is linear.weight
    linear.register_full_backward_hook(lambda *args: seen.append(2))
    kind.from_module(linear, 2, 5)(torch.randn(2, 11)).sum().backward()
    assert seen == [1, 2]
