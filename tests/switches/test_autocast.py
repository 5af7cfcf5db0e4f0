"""Autocast, gradient scaling, and deltas with more precision than the weights to which they are added."""

import copy

import pytest
import torch
from support.inside import attachment_of, mounted_deltas, weight_at
from support.models import loss_of
from support.slices import attached, gradients, slices
from support.tolerances import GEMM, relative_difference

import s2ft
from s2ft import S2ColumnLinear, S2RowLinear

HALVES = (torch.bfloat16, torch.float16)
halves = pytest.mark.parametrize("half", HALVES, ids=str)
layouts = pytest.mark.parametrize("layout", ("permuted", "indexed"))
# Without relu: its gradient jumps where rounding changes a sign.
CASES = ("llama-grouped", "phi3", "gpt2", "bert", "t5-gated", "qwen3-moe")


def by_projection(model):
    """The gradients of the slices in the base's coordinates. mounted_deltas converts them in place of the deltas."""
    record, kept = attachment_of(model), {}
    for path, mount in record.mounts.items():
        kept[path] = mount.layer.s2.data
        mount.layer.s2.data = mount.layer.s2.grad
    found = mounted_deltas(record)
    for path, mount in record.mounts.items():
        mount.layer.s2.data = kept[path]
    return found


def within(ours, theirs, tolerance):
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm()) <= tolerance


@halves
@layouts
@pytest.mark.parametrize("case", CASES)
def test_autocast(case, layout, half):
    """Outputs have the dtype of autocast and gradients that of the deltas. The gradients equal those of the merged
    model's full weights under autocast."""
    model = attached(case, layout=layout)
    seen = []
    for mount in attachment_of(model).mounts.values():
        if isinstance(mount.layer, (S2ColumnLinear, S2RowLinear)):  # expert layers have no output
            mount.layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    plain, projections = s2ft.merge(copy.deepcopy(model)).requires_grad_(False), attachment_of(model).projections
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
        full = handle.view(handle.tensor.grad)
        theirs[name] = full.index_select(delta.dim, delta.index)
    assert within(
        *(
            torch.cat([value.flatten() for value in values])
            for values in ([delta.values for delta in ours.values()], theirs.values())
        ),
        2 * GEMM[half][0],
    )


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
    with torch.no_grad():
        for path, module in reference.named_modules():  # the same half-precision values, computed in float32
            for name, p in module.named_parameters(recurse=False):
                p.copy_(model.get_submodule(path).get_parameter(name))
    ours = gradients(model)
    assert all(within(ours[name], gradient, 4 * GEMM[half][0]) for name, gradient in gradients(reference).items())
    optimizer = torch.optim.AdamW(slices(model).values(), lr=1e-3)
    optimizer.step()
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {dtype}


@halves
@layouts
@pytest.mark.parametrize("autocast", (False, True), ids=("base", "autocast"))
def test_tiny_updates_add_up(layout, half, autocast):
    """Each update is a ten-thousandth of the spacing of half precision. Twenty thousand of them move the effective
    weight by two spacings, both on a half-precision base and on a float32 base under autocast."""
    base = torch.float32 if autocast else half
    model = attached("llama-grouped", dtype=base, layout=layout)
    layer = model.model.layers[0].mlp.down_proj
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.s2)
    step = torch.finfo(half).eps  # from 1 to the next number
    optimizer = torch.optim.SGD([layer.s2], lr=1e-4 * step)
    x = torch.zeros(1, layer.in_features, dtype=base)
    x[0, layer.start if layer.index is None else layer.index[0]] = 1
    with torch.autocast("cpu", half, enabled=autocast), torch.no_grad():
        assert (layer(x) == 1).all()
        for _ in range(20_000):
            layer.s2.grad = torch.full_like(layer.s2, -1.0)
            optimizer.step()
        assert (layer(x) == 1 + 2 * step).all()


# ---- scaling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ("llama-grouped", "gpt2"))
def test_scaled_gradients_are_the_unscaled_ones(case):
    """Under float16 autocast, unscaled gradients and their norm equal those without scaling, except for the values
    that float16 loses without scaling."""
    model, other = attached(case), attached(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = []
    for one, scaled in ((model, True), (other, False)):
        optimizer = torch.optim.AdamW(slices(one).values(), lr=1e-3)
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(one)
        (scaler.scale(loss) if scaled else loss).backward()
        if scaled:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(slices(one).values(), 1e9)
        found.append((norm, {name: p.grad.clone() for name, p in slices(one).items()}))
        if scaled:
            scaler.step(optimizer)
            scaler.update()
    assert relative_difference(found[0][0], found[1][0]) <= 1e-2
    for name, gradient in found[0][1].items():
        assert within(gradient, found[1][1][name], 2e-2), name
    assert scaler.get_scale() == 1024.0


@layouts
@pytest.mark.parametrize("what", ("scale", "input"))
def test_infinite_gradients_are_skipped(what, layout):
    """If the scale or the input overflows float16, no slice moves and the scale is halved."""
    model = attached("llama-grouped", layout=layout)
    optimizer = torch.optim.AdamW(slices(model).values(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40 if what == "scale" else 4.0, growth_interval=1000)
    before, frozen = (
        {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad is trained}
        for trained in (True, False)
    )
    layer, steps = model.model.layers[0].mlp.down_proj, 0
    overflow = layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1e6,)) if what == "input" else None
    while all(torch.equal(p, before[name]) for name, p in slices(model).items()):
        scale = scaler.get_scale()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model)
        scaler.scale(loss).backward()
        finite = all(p.grad.isfinite().all() for p in slices(model).values())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert finite == any(not torch.equal(p, before[name]) for name, p in slices(model).items())
        assert scaler.get_scale() == (scale if finite else scale / 2)
        if overflow is not None:
            overflow.remove()
        steps += 1
        assert steps < 60
    assert steps > 1
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
