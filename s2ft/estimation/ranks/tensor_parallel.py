"""Tensor parallelism: the shadow model becomes that of one device, whose layers have a part of their outputs or inputs.

The parts are those of the model's plan in transformers. A device has its own heads and channels, so that the model's
own forward runs on the parts. Outputs that the devices sum or gather are new tensors, as are summed gradients of
inputs.
Every device has the whole of `s2` and uses the units of its own part.
"""

import re
from collections import Counter
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft.attached.record import Attachment
from s2ft.layers import S2Layer
from s2ft.layers.linear import S2Linear
from s2ft.model.coupling import projections_of
from s2ft.ops import indexed_linear, sliced_linear

BY_OUTPUTS = ("colwise", "colwise_rep", "colwise_gather_output", "packed_colwise")
BY_INPUTS = ("rowwise", "rowwise_rep", "rowwise_split_input", "packed_rowwise")
BY_TOKENS = ("embedding_rowwise", "embedding_colwise")
GATHERS = ("colwise_gather_output", "colwise_rep", "embedding_colwise")
WHOLE = ("replicated_with_grad_allreduce", "replicate", None)


def split(shadow: nn.Module, record: Attachment, size: int) -> None:
    """Replace the layers of a shadow model on the meta device by the parts of one device.

    Args:
        shadow: Shadow model with trainable layers, without data.
        record: Its attachment.
        size: Number of devices that share a weight.

    Raises:
        ValueError: The model has no plan, or its plan splits something that can't be counted or divided.
    """
    if size == 1:
        return
    plan = getattr(shadow, "tp_plan", None)
    if not plan:
        raise ValueError(f"{type(shadow).__name__} has no plan for tensor parallelism in transformers")
    embedding, head = shadow.get_input_embeddings(), shadow.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    _check_heads(shadow, size)
    own = _own_units(shadow, record, size)
    for name, module in list(shadow.named_modules()):
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style in BY_TOKENS and isinstance(module, nn.Embedding):
            _split_embedding(module, style, size)
        elif style in BY_OUTPUTS or style in BY_INPUTS:
            _split_layer(name, module, style, size, own.get(name, 0))
        elif style not in WHOLE:
            raise ValueError(f"{name} is split by {style!r} in transformers' plan, which s2ft can't count")
        elif isinstance(module, S2Linear) and style is None:
            raise ValueError(f"{name} is not split by transformers' plan: s2ft can't count its training")
    if tied and head.weight.shape != embedding.weight.shape:
        raise ValueError("the tied embedding and output layer are split differently, which s2ft can't count")
    if tied:
        head.weight = embedding.weight


def _check_heads(shadow: nn.Module, size: int) -> None:
    config = shadow.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % size:
            raise ValueError(f"{type(shadow).__name__} has {name}={heads}, which {size} devices can't share")


def _own_units(shadow: nn.Module, record: Attachment, size: int) -> dict[str, int]:
    """Return how many elements of each trained dimension one device has: the device that has most in all layers."""
    counted: dict[str, Counter] = {}
    for projection in projections_of(record.couplings):
        units = record.selection.units.get(projection.name) if record.selection is not None else None
        if units is None:
            continue
        extent = shadow.get_submodule(projection.path).weight.shape[projection.dim]
        elements = projection.elements(units)
        blocks = torch.div(elements * size, extent, rounding_mode="floor").clamp(max=size - 1)
        counted.setdefault(projection.path, Counter()).update(blocks.tolist())
    total = sum(counted.values(), Counter())
    most = max(range(size), key=lambda device: total[device])
    return {path: blocks[most] for path, blocks in counted.items()}


def _split_layer(name: str, module: nn.Module, style: str, size: int, own: int) -> None:
    if not isinstance(module, nn.Linear) and not isinstance(module, S2Linear):
        raise ValueError(f"{name} ({type(module).__name__}) is split by tensor parallelism, which s2ft can't count")
    dim = 0 if style in BY_OUTPUTS else 1
    width = module.weight.shape[0]
    if module.weight.shape[dim] % size and style not in GATHERS:
        raise ValueError(f"{name} has {module.weight.shape[dim]} rows or columns, which {size} devices can't share")
    _cut(module, "weight", dim, size)
    if module.bias is not None and dim == 0:
        _cut(module, "bias", dim, size)
    module.forward = partial(_forward, module, dim, size, own, width if style in GATHERS else 0)


def _split_embedding(module: nn.Embedding, style: str, size: int) -> None:
    width = module.weight.shape[1]
    _cut(module, "weight", BY_TOKENS.index(style), size)
    forward = module.forward  # tensors without data have no bounds, so that any token will do
    module.forward = lambda ids: _Copied.apply(forward(ids), width)


def _cut(module: nn.Module, name: str, dim: int, size: int) -> None:
    """Replace a weight by the largest part of it, rounded up."""
    weight = getattr(module, name)
    shape = list(weight.shape)
    shape[dim] = -(-shape[dim] // size)
    made = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    setattr(module, name, nn.Parameter(made, requires_grad=False))


def _forward(layer: nn.Module, dim: int, size: int, own: int, gathered: int, x: Tensor) -> Tensor:
    x = _SummedBackward.apply(x) if dim == 0 else x
    y = _part(layer, dim, size, own, x)
    return _Copied.apply(y, gathered or y.shape[-1]) if dim == 1 or gathered else y


def _part(layer: nn.Module, dim: int, size: int, own: int, x: Tensor) -> Tensor:
    if not isinstance(layer, S2Layer) or not layer.enabled:
        return F.linear(x, layer.weight, layer.bias)
    whole = layer.delta.shape[dim]
    mine = min(own, whole) if dim == layer.dim else whole // size
    s2 = _OwnPart.apply(layer.delta, dim, mine)
    if mine == 0:  # the device sums the gradients of the others
        return _WithGradientOf.apply(F.linear(x, layer.weight, layer.bias), s2)
    if layer.index is None:
        return sliced_linear(x, layer.weight, s2, 0, layer.dim, layer.bias)
    index = layer.index[:mine] if dim == layer.dim else layer.index
    return indexed_linear(x, layer.weight, s2, index, layer.dim, layer.bias)


class _OwnPart(torch.autograd.Function):
    """The device's own part of s2; the gradient is that of the whole."""

    @staticmethod
    def forward(ctx, s2: Tensor, dim: int, mine: int) -> Tensor:
        ctx.shape, ctx.dim, ctx.mine = s2.shape, dim, mine
        return s2.narrow(dim, 0, mine).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        whole = gradient.new_zeros(ctx.shape)
        whole.narrow(ctx.dim, 0, ctx.mine).copy_(gradient)
        return whole, None, None


class _WithGradientOf(torch.autograd.Function):
    """Makes an output depend on a part of s2 that has no units."""

    @staticmethod
    def forward(ctx, y: Tensor, empty: Tensor) -> Tensor:
        ctx.save_for_backward(empty)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, torch.zeros_like(ctx.saved_tensors[0])


class _SummedBackward(torch.autograd.Function):
    """Passes an input on. Its gradient is summed into a new tensor."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.clone()


class _Copied(torch.autograd.Function):
    """Sums outputs of the devices into a new tensor, or gathers them along the last dimension."""

    @staticmethod
    def forward(ctx, y: Tensor, width: int) -> Tensor:
        ctx.width = y.shape[-1]
        return y.new_empty((*y.shape[:-1], width))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.narrow(-1, 0, ctx.width), None
