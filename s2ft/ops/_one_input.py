"""Linear layers of one input, whose input gradient is summed in one buffer.

Gate and up of a gated FFN share their input. As separate layers, each makes a gradient of the input's size, and
autograd adds them up: two more passes over memory. Here the second product adds to the result of the first.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s2ft.ops import _linear
from s2ft.ops._effective import Units
from s2ft.ops._library import own_output, runs_directly
from s2ft.ops.indexed_linear import _ops as INDEXED
from s2ft.ops.sliced_linear import _ops as SLICED


class Factors(NamedTuple):
    """What a linear layer multiplies its input by.

    Attributes:
        weight: Frozen weight [O, I].
        bias: Frozen bias [O], or None.
        delta: Trained update of some outputs [n, I], or None.
        units: These outputs: the first of a slice, or an index [n] int64. None without a delta.
        held: For a weight that holds base + delta (effective="step"): an object with `is_held`, whether it holds the
            present values, and `base()`, the matrix with the base's values. None for a weight that holds the base.
    """

    weight: Tensor
    bias: Tensor | None
    delta: Tensor | None = None
    units: Units | None = None
    held: Any = None


def can_share(x: Tensor, layers: Sequence[Factors]) -> bool:
    """Whether :func:`linears` can run these layers.

    It can if gradients flow to x and no compiler, mode, transform or subclass of Tensor has to see the single layers.
    Under autocast, weights and inputs are cast for each layer.
    """
    if not (torch.is_grad_enabled() and x.requires_grad and x.dim() > 0):
        return False
    if x.device.type == "meta" or torch.is_autocast_enabled(x.device.type):
        return False
    return all(
        runs_directly(x, layer.weight, layer.bias, layer.delta, _index(layer.units)) and _is_frozen(layer, x.dtype)
        for layer in layers
    )


def _is_frozen(layer: Factors, dtype: torch.dtype) -> bool:
    trains = layer.weight.requires_grad or layer.bias is not None and layer.bias.requires_grad
    return layer.weight.dtype is dtype and not trains


def linears(
    x: Tensor,  # [..., I]
    layers: Sequence[Factors],
) -> tuple[Tensor, ...]:  # each [..., O]
    """Run several linear layers on one input, which :func:`can_share` allows.

    The outputs are those of the single layers, bit for bit, and so are the gradients of the deltas. The gradient of x
    differs by rounding: a sum in the accumulator of a product replaces one between two rounded products.
    """
    tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias, layer.delta, _index(layer.units))]
    starts = tuple(layer.units if isinstance(layer.units, int) else None for layer in layers)
    return _Linears.apply(starts, tuple(layer.held for layer in layers), x, *tensors)


def _index(units: Units | None) -> Tensor | None:
    return units if isinstance(units, Tensor) else None


def _layers(starts: tuple[int | None, ...], held: tuple, tensors: Sequence[Tensor | None]) -> list[Factors]:
    """Undo the flattening of :func:`linears`."""
    return [
        Factors(*tensors[4 * i : 4 * i + 3], tensors[4 * i + 3] if start is None else start, held[i])
        for i, start in enumerate(starts)
    ]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, starts, held, x, *tensors):
        ctx.set_materialize_grads(False)
        outputs = []
        for layer in _layers(starts, held, tensors):
            if layer.held is not None:
                outputs.append(own_output(F.linear(x.contiguous(), layer.weight, layer.bias)))
            elif layer.delta is None:
                outputs.append(own_output(F.linear(x, layer.weight, layer.bias)))
            else:
                forward = _ops(layer).products.forward
                outputs.append(forward(x, layer.weight, layer.delta, layer.units, 0, layer.bias))
        ctx.starts, ctx.held = starts, held
        trains = any(ctx.needs_input_grad[3:])
        kept = [None if i % 4 == 1 else tensor for i, tensor in enumerate(tensors)]  # no bias is needed
        ctx.save_for_backward(x if trains else None, *kept)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        x, *tensors = ctx.saved_tensors
        plain = not torch.is_grad_enabled() and runs_directly(*grads, *tensors)
        found = [None] * len(tensors)
        layers = list(enumerate(_layers(ctx.starts, ctx.held, tensors)))
        total = None
        # Layers with a delta come first: their op makes the buffer, to which plain products can be added.
        for i, layer in sorted(layers, key=lambda pair: pair[1].delta is None):
            if grads[i] is None:
                continue
            if ctx.needs_input_grad[3 + 4 * i + 2]:
                found[4 * i + 2] = _linear._delta_gradient(grads[i], x, layer.delta, layer.units, 0, plain)
            if ctx.needs_input_grad[2]:
                total = _add_grad_x(total, grads[i].reshape(-1, grads[i].shape[-1]), layer, plain)
        if total is not None:
            leading = next(grad for grad in grads if grad is not None).shape[:-1]
            total = total.view(*leading, total.shape[-1])
        return None, None, total, *found


def _add_grad_x(total: Tensor | None, grad: Tensor, layer: Factors, plain: bool) -> Tensor:
    """Add the layer's gradient of x, [rows, I], to `total` in place, unless it must be differentiable."""
    if layer.delta is None:
        if total is None:
            return torch.mm(grad, layer.weight)
        in_place = not torch.is_grad_enabled()
        return total.addmm_(grad, layer.weight) if in_place else total.addmm(grad, layer.weight)
    if layer.held is not None and layer.held.is_held and not torch.is_grad_enabled():
        grad_x = torch.mm(grad, layer.weight)
    else:  # the base is in the weight again, or a second derivative has to see that the product depends on delta
        weight = layer.weight if layer.held is None else layer.held.base()
        grad_x = _ops(layer).products.grad_x(grad, weight, layer.delta, layer.units, 0, plain)
    if total is None:
        return grad_x
    return total + grad_x if torch.is_grad_enabled() else total.add_(grad_x)


def _ops(layer: Factors) -> _linear.LinearOps:
    return INDEXED if isinstance(layer.units, Tensor) else SLICED
