"""Autocast, gradient scaling, and deltas with more precision than the weights to which they are added."""

import copy

import pytest
import torch
from support.inside import mounted_deltas, record_of, weight_at
from support.models import LAYOUTS, loss_of
from support.pairs import pairs_mostly_slow
from support.slices import attached, gradients, slices
from support.tolerances import GEMM

import s2ft
from s2ft import S2ColumnLinear, S2RowLinear

HALVES = (torch.bfloat16, torch.float16)
halves = pytest.mark.parametrize("half", HALVES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
# Without relu: its gradient jumps where rounding changes a sign.
CASES = ("llama-grouped", "phi3", "gpt2", "bert", "t5-gated", "qwen3-moe")


def by_projection(model):
    """The gradients of the slices in the base's coordinates. mounted_deltas converts them in place of the deltas."""
    record, kept = record_of(model), {}
    for path, mount in record.mounts.items():
        kept[path] = mount.layer.s2.data
        mount.layer.s2.data = mount.layer.s2.grad
    found = mounted_deltas(record)
    for path, mount in record.mounts.items():
        mount.layer.s2.data = kept[path]
    return found


def within(ours, theirs, tolerance):
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm()) <= tolerance


def joined(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("case, layout, half", pairs_mostly_slow(CASES, LAYOUTS, HALVES), ids=str)
def test_autocast(case, layout, half):
    """Outputs have the dtype of autocast and gradients that of the deltas. The gradients equal those of the merged
    model's full weights under autocast."""
    model = attached(case, layout=layout)
    seen = []
    for mount in record_of(model).mounts.values():
        if isinstance(mount.layer, (S2ColumnLinear, S2RowLinear)):  # expert layers have no output
            mount.layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    plain, projections = s2ft.merge(copy.deepcopy(model)).requires_grad_(False), record_of(model).projections
    for projection in projections.values():
        weight_at(plain, projection).tensor.requires_grad_(True)
    seen.clear()
    with torch.autocast("cpu", half):
        # The loss is scaled, because small gradients would underflow in float16.
        assert all(gradient.dtype is torch.float32 for gradient in gradients(model, scale=2.0**12).values())
        gradients(plain, scale=2.0**12)
    assert set(seen) == {half}
    ours, theirs = by_projection(model), {}
    for name, delta in ours.items():
        handle = weight_at(plain, projections[name])
        theirs[name] = handle.view(handle.tensor.grad).index_select(delta.dim, delta.index)
    assert within(joined(delta.values for delta in ours.values()), joined(theirs.values()), 2 * GEMM[half][0])


@halves
@pytest.mark.parametrize("reentrant", (False, True), ids=("inside", "reentrant"))
def test_autocast_with_checkpointing(reentrant, half):
    """The second forward rounds in the same way as the first."""
    model = attached("llama-grouped")
    with torch.autocast("cpu", half):
        expected = gradients(model)
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
        model.disable_input_require_grads()
        ours = gradients(model)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in ours.items())


@halves
@layouts
@pytest.mark.parametrize("delta", (None, "same"), ids=("float32", "same"))
def test_deltas_on_a_half_precision_base(layout, half, delta):
    """Deltas are float32 by default. Gradients and moments have the dtype of the delta, not that of the base."""
    model = attached("llama-grouped", dtype=half, layout=layout, delta_dtype=str(half).split(".")[1] if delta else None)
    dtype = half if delta else torch.float32
    for p, gradient in zip(slices(model).values(), gradients(model).values()):
        assert p.dtype is gradient.dtype is dtype and gradient.any()
    reference = attached("llama-grouped", layout=layout)
    for mount in record_of(model).mounts.values():
        mount.layer.unfuse()  # the values of the base
    with torch.no_grad():
        for path, module in reference.named_modules():  # the same half-precision values, computed in float32
            for name, p in module.named_parameters(recurse=False):
                p.copy_(model.get_submodule(path).get_parameter(name))
    ours = gradients(model)
    assert all(within(ours[name], gradient, 4 * GEMM[half][0]) for name, gradient in gradients(reference).items())
    optimizer = torch.optim.AdamW(slices(model).values(), lr=1e-3)
    optimizer.step()
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {dtype}


@layouts
@pytest.mark.parametrize("half, autocast", ((torch.bfloat16, False), (torch.float16, True)), ids=str)
def test_tiny_updates_add_up(layout, half, autocast):
    """Each update is a twentieth of the spacing of half precision. Forty of them move the effective weight by two
    spacings, both on a half-precision base and on a float32 base under autocast."""
    base = torch.float32 if autocast else half
    layer = attached("llama-grouped", dtype=base, layout=layout).model.layers[0].mlp.down_proj
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.s2)
    step = torch.finfo(half).eps  # from 1 to the next number
    optimizer = torch.optim.SGD([layer.s2], lr=5e-2 * step)
    x = torch.zeros(1, layer.in_features, dtype=base)
    x[0, layer.start if layer.index is None else layer.index[0]] = 1
    layer.s2.grad = torch.full_like(layer.s2, -1.0)
    with torch.autocast("cpu", half, enabled=autocast), torch.no_grad():
        assert (layer(x) == 1).all()
        for _ in range(40):
            optimizer.step()
        assert (layer(x) == 1 + 2 * step).all()


@layouts
def test_infinite_gradients_are_skipped(layout):
    """If the scale overflows float16, no slice moves and the scale is halved."""
    model = attached("llama-grouped", layout=layout)
    optimizer = torch.optim.AdamW(slices(model).values(), lr=1e-2)
    before, moved = copy.deepcopy(model.state_dict()), []
    for scale in (2.0**40, 4.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", torch.float16):
            scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append([name for name, value in model.state_dict().items() if not torch.equal(value, before[name])])
        assert scaler.get_scale() == (scale if moved[-1] else scale / 2)
    assert moved == [[], list(slices(model))]
