"""indexed_conv equals PyTorch's convolution with the effective weight."""

import pytest
import torch
import torch.nn.functional as F
from support.tolerances import relative_difference

import s2ft
from s2ft.layers import S2ColumnConv, S2RowConv
from s2ft.ops import effective_units, indexed_conv

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
GEOMETRIES = {"plain": {}, "strided": dict(stride=(2,), padding=(1,)), "dilated": dict(padding=(2,), dilation=(2,))}


def tensors(spatial, dim, dtype=torch.float32, delta_dtype=None, index=(4, 0, 3), channels_last=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, *[7] * spatial, generator=generator)
    weight = torch.randn(6, 5, *[3] * spatial, generator=generator)
    shape = [6, 5, 3**spatial]
    shape[dim] = len(index)
    delta, bias = torch.randn(shape, generator=generator), torch.randn(6, generator=generator)
    if channels_last:
        x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    return (x.to(dtype), weight.to(dtype), delta.to(delta_dtype or dtype), torch.tensor(index), dim, bias.to(dtype))


def effective(weight, delta, index, dim):
    """The weight with the delta added, by a loop over the channels."""
    weight = weight.clone()
    for k, channel in enumerate(index.tolist()):
        part = weight.select(dim, channel)
        part.copy_(effective_units(part, delta.select(dim, k).reshape(part.shape)))
    return weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize("spatial", (1, 2, 3))
def test_forward_equals_the_convolution_with_the_effective_weight(spatial, dim, geometry, dtype):
    x, weight, delta, index, dim, bias = tensors(spatial, dim, dtype, torch.promote_types(dtype, torch.float32))
    before = weight.clone()
    y = indexed_conv(x, weight, delta, index, dim, bias, **GEOMETRIES[geometry])
    expected = CONVOLUTIONS[spatial - 1](x, effective(weight, delta, index, dim), bias, **GEOMETRIES[geometry])
    assert y.dtype is dtype and torch.equal(y, expected) and torch.equal(weight, before)


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("dim", (0, 1))
def test_gradients(dim, channels_last):
    x, weight, delta, index, dim, bias = tensors(2, dim, channels_last=channels_last)
    x, delta, bias = (t.requires_grad_() for t in (x, delta, bias))
    full = weight.clone().requires_grad_()
    indexed_conv(x, weight, delta, index, dim, bias, stride=(2,), padding=(1, 2)).square().sum().backward()
    mine = [t.grad for t in (x, delta, bias)]
    x.grad = bias.grad = None
    summed = full + torch.zeros_like(full).flatten(2).index_add(dim, index, delta.detach()).view(full.shape)
    F.conv2d(x, summed, bias, stride=2, padding=(1, 2)).square().sum().backward()
    for found, expected in zip(mine, (x.grad, full.grad.flatten(2).index_select(dim, index), bias.grad)):
        assert relative_difference(found, expected) <= 1e-5


@pytest.mark.parametrize("spatial,dim", [(1, 0), (2, 1), (3, 0)])
def test_gradcheck(spatial, dim):
    x, weight, delta, index, dim, bias = tensors(spatial, dim, torch.float64)
    torch.autograd.gradcheck(
        lambda x, delta, bias: indexed_conv(x, weight, delta, index, dim, bias, padding=(1,)),
        [t.requires_grad_() for t in (x[:1, ..., :3], delta, bias)],
        fast_mode=True,
    )


@pytest.mark.parametrize("spatial,dim", [(1, 0), (2, 1)])
def test_second_derivatives(spatial, dim):
    x, weight, delta, index, dim, bias = tensors(spatial, dim, torch.float64)
    torch.autograd.gradgradcheck(
        lambda x, delta, bias: indexed_conv(x, weight, delta, index, dim, bias, padding=(1,)),
        [t.requires_grad_() for t in (x[:1, ..., :3], delta, bias)],
    )


@pytest.mark.parametrize("dim", (0, 1))
def test_opcheck(dim):
    x, weight, delta, index, dim, bias = tensors(2, dim)
    x, delta = x.requires_grad_(), delta.requires_grad_()
    kept = x.index_select(1, index) if dim == 1 else None
    torch.library.opcheck(
        torch.ops.s2ft.indexed_conv.default, (x, weight, delta, index, dim, bias, kept, [1, 1], [0, 1], [1, 1])
    )


def test_compiles_without_a_break():
    x, weight, delta, index, dim, bias = tensors(2, 1)
    delta.requires_grad_()

    def loss(x, delta):
        return indexed_conv(x, weight, delta, index, dim, bias, padding=(1,)).square().mean()

    torch.compile(loss, fullgraph=True, backend="aot_eager")(x, delta).backward()
    compiled, delta.grad = delta.grad, None
    loss(x, delta).backward()
    assert torch.equal(compiled, delta.grad)


@pytest.mark.parametrize("dim", (0, 1))
def test_backward_keeps_only_the_selected_channels_of_x(dim):
    """If input channels are trained (dim 1), it keeps their channels of x: 3 of 5."""
    x, weight, delta, index, dim, bias = tensors(2, dim)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        indexed_conv(x.requires_grad_(), weight, delta.requires_grad_(), index, dim, bias)
    assert ((3, 3 if dim else 5, 7, 7) in kept) and not (dim and (3, 5, 7, 7) in kept)


def test_autocast_rounds_the_sum_of_base_and_delta_once():
    x, weight, delta, index, dim, bias = tensors(2, 0)
    with torch.autocast("cpu", torch.bfloat16):
        y = indexed_conv(x, weight, delta * 1e-3, index, dim, bias)
    expected = F.conv2d(x.bfloat16(), effective(weight, delta * 1e-3, index, dim).bfloat16(), bias.bfloat16())
    assert torch.equal(y, expected)


BAD = {
    "dim": (dict(dim=2), "dim must be 0"),
    "channels": (dict(x=torch.randn(3, 4, 7, 7)), "x of shape"),
    "rank": (dict(x=torch.randn(5, 7, 7)), "x of shape"),
    "delta": (dict(delta=torch.randn(3, 5, 8)), "delta must have shape"),
    "bias": (dict(bias=torch.randn(5)), "bias must have shape"),
    "index": (dict(index=torch.tensor([0, 1, 6])), "index has 6"),
    "stride": (dict(stride=(1, 1, 1)), "stride must have 2 entries"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad):
    change, message = BAD[bad]
    good = dict(zip(("x", "weight", "delta", "index", "dim", "bias"), tensors(2, 0)))
    with pytest.raises(ValueError, match=message):
        indexed_conv(**{**good, **change})


def test_mixed_dtypes():
    x, *rest = tensors(2, 0)
    with pytest.raises(TypeError, match="x is torch.bfloat16"):
        indexed_conv(x.bfloat16(), *rest)


# ---- layers ----------------------------------------------------------------------------------------------

PLAIN = {
    "1d": lambda: torch.nn.Conv1d(5, 6, 3, stride=2, padding=1),
    "2d": lambda: torch.nn.Conv2d(5, 6, (3, 2), padding=(1, 0), dilation=(1, 2), bias=False),
    "3d": lambda: torch.nn.Conv3d(5, 6, 2),
    "same": lambda: torch.nn.Conv2d(5, 6, (3, 4), padding="same"),
    "valid": lambda: torch.nn.Conv2d(5, 6, 3, padding="valid"),
    "reflected": lambda: torch.nn.Conv2d(5, 6, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: torch.nn.Conv1d(5, 6, 3, padding=2, padding_mode="circular"),
}


@pytest.mark.parametrize("batched", (True, False))
@pytest.mark.parametrize("kind", (S2ColumnConv, S2RowConv))
@pytest.mark.parametrize("plain", PLAIN)
def test_layers_equal_the_convolution_they_replace(plain, kind, batched):
    torch.manual_seed(0)
    conv = PLAIN[plain]()
    x = torch.randn(*[2] * batched, 5, *[7] * len(conv.kernel_size))
    expected = conv(x).detach()
    for where in ({"start": 1, "end": 4}, {"index": torch.tensor([4, 1])}):
        layer = kind.from_module(conv, **where)
        assert relative_difference(layer(x), expected) <= 1e-6
        torch.nn.init.normal_(layer.s2)
        y = layer(x)
        assert relative_difference(y, expected) > 1e-2
        y.square().sum().backward()
        assert layer.s2.grad.shape == layer.s2.shape and layer.s2.grad.abs().sum() > 0
        weight = layer.weight.clone()
        layer.eval()
        layer.fuse()
        assert torch.equal(conv(x), layer(x)) and torch.equal(layer(x), y)  # conv and the layer share the weight
        layer.unfuse()
        assert torch.equal(layer.weight, weight)
        layer.enabled = False
        assert relative_difference(layer(x), expected) <= 1e-6
        assert "units" in repr(layer) or "start" in repr(layer)


def test_the_op_is_public():
    assert s2ft.ops.indexed_conv is indexed_conv


def test_a_model_may_change_the_output_in_place():
    x, weight, delta, index, dim, bias = tensors(1, 0)
    delta.requires_grad_()
    y = indexed_conv(x, weight, delta, index, dim, bias)
    y += 1.0
    y.sum().backward()
    assert delta.grad.abs().sum() > 0
