"""act(gate) * up, the elementwise middle of a gated FFN, each way in one pass."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from s2ft.ops._library import define

# name → the function and its backward, the one that PyTorch's autograd calls
ACTIVATIONS = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")),
    "relu": (F.relu, lambda grad, gate: torch.ops.aten.threshold_backward(grad, gate, 0)),
}


def activation_of(name: str):
    """The entry of ACTIVATIONS. Raises: ValueError that names the known ones."""
    if name not in ACTIVATIONS:
        raise ValueError(f"act_mul: activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    act, _ = activation_of(activation)
    return (act(gate) * up).contiguous()


def reference_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    act, act_backward = activation_of(activation)
    return act_backward(grad * up, gate).contiguous(), (grad * act(gate)).contiguous()


def fake(gate, up, activation):
    return gate.new_empty(gate.shape)


def fake_backward(grad, gate, up, activation):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def setup_context(ctx, inputs, output):
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def backward(ctx, grad):
    gate, up = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: autograd's own gradients can be differentiated again
        return *_differentiable_backward(grad, gate, up, ctx.activation), None
    if not ctx.needs_input_grad[0]:
        return None, _op(gate, grad, ctx.activation), None  # the same product, with grad for up
    return *_backward(grad, gate, up, ctx.activation), None


def _differentiable_backward(grad, gate, up, activation):
    act, _ = activation_of(activation)
    inputs = [tensor for tensor in (gate, up) if tensor.requires_grad]
    found = iter(torch.autograd.grad(act(gate) * up, inputs, grad, create_graph=True))
    return [next(found) if tensor.requires_grad else None for tensor in (gate, up)]


_op = define("act_mul(Tensor gate, Tensor up, str activation) -> Tensor", reference, fake, setup_context, backward)
_backward = define(
    "act_mul_backward(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    reference_backward,
    fake_backward,
)


def act_mul(
    gate: Tensor,  # any shape
    up: Tensor,  # gate's shape and dtype
    activation: str,  # a key of ACTIVATIONS; "gelu" is the exact one
) -> Tensor:  # gate's shape and dtype
    """activation(gate) * up, keeping gate and up for the backward and nothing else.

    PyTorch's two operators keep activation(gate) too and read and write more in a step. Rounding is
    theirs: activation(gate) is rounded to the dtype before it is multiplied. Frozen inputs get no gradient.
    Raises: ValueError where shapes or dtypes differ, or for an unknown activation.
    """
    activation_of(activation)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"act_mul: gate ({gate.dtype}, {tuple(gate.shape)}) and up ({up.dtype}, "
            f"{tuple(up.shape)}) must have one shape and dtype"
        )
    return _op(gate, up, activation)
