"""act(gate) * up, the elementwise middle of a gated FFN, in one pass each way."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s2ft.ops._library import below_autograd, define, runs_directly


class Activation(NamedTuple):
    """An activation that `act_mul` computes.

    Attributes:
        function: The activation.
        backward: Its backward, the one that PyTorch's autograd calls.
        hidden_acts: Its names in configs of transformers. Names of activations that only follow the same formula are
            left out: gelu_new, gelu_fast, gelu_accurate and the *_python ones compute it by single operators and round
            after each one, and in bfloat16 the result is far from gelu.
    """

    function: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    hidden_acts: tuple[str, ...]


# A new activation is a row here and, in csrc/core/activation.h, a struct and a row, in the same order.
ACTIVATIONS = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward, ("silu", "swish")),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward, ("gelu",)),
    "gelu_tanh": Activation(
        partial(F.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
        ("gelu_pytorch_tanh",),
    ),
    "relu": Activation(F.relu, lambda grad, gate: torch.ops.aten.threshold_backward(grad, gate, 0), ("relu",)),
}


def check(op: str, gate: Tensor, activation: str, **tensors: Tensor) -> None:
    """Check that the activation is known and that the other tensors have gate's shape and dtype."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    for name, other in tensors.items():
        if other.dtype != gate.dtype:
            raise ValueError(f"{op}: {name} must have gate's dtype {gate.dtype}, got {other.dtype}")
        if other.shape != gate.shape:
            raise ValueError(f"{op}: {name} must have gate's shape {tuple(gate.shape)}, got {tuple(other.shape)}")


def reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    check("act_mul", gate, activation, up=up)
    return (ACTIVATIONS[activation].function(gate) * up).contiguous()


def reference_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    check("act_mul_backward", gate, activation, up=up, grad=grad)
    act, act_backward, _ = ACTIVATIONS[activation]
    return act_backward(grad * up, gate).contiguous(), (grad * act(gate)).contiguous()


def fake(gate, up, activation):
    check("act_mul", gate, activation, up=up)
    return gate.new_empty(gate.shape)


def setup_context(ctx, inputs, output):
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def backward(ctx, grad):
    gate, up = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: autograd's own gradients can be differentiated again
        return *_differentiable_backward(grad, gate, up, ctx.activation), None
    if not ctx.needs_input_grad[0]:
        return None, below_autograd(_op, gate, grad, ctx.activation), None  # the same product, with grad as up
    return *below_autograd(_backward, grad, gate, up, ctx.activation), None


def _differentiable_backward(grad, gate, up, activation):
    act = ACTIVATIONS[activation].function
    inputs = [tensor for tensor in (gate, up) if tensor.requires_grad]
    found = iter(torch.autograd.grad(act(gate) * up, inputs, grad, create_graph=True))
    return [next(found) if tensor.requires_grad else None for tensor in (gate, up)]


_op = define("act_mul(Tensor gate, Tensor up, str activation) -> Tensor", reference, fake, setup_context, backward)
_backward = define(
    "act_mul_backward(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    reference_backward,
    lambda grad, gate, up, activation: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
)


class _Node(torch.autograd.Function):
    """The op as one node of the autograd graph, in less time of the host than the gradient of a registered op."""

    @staticmethod
    def forward(ctx, gate, up, activation):
        with torch._C._AutoDispatchBelowAutograd():
            y = _op(gate, up, activation)
        setup_context(ctx, (gate, up, activation), y)
        return y

    backward = staticmethod(backward)


def act_mul(
    gate: Tensor,  # any shape
    up: Tensor,  # gate's shape and dtype
    activation: str,  # a key of ACTIVATIONS
) -> Tensor:  # gate's shape and dtype
    """Compute ``activation(gate) * up``. The backward saves gate and up, and nothing else.

    PyTorch's two operators also save activation(gate), and read and write more memory per step. The rounding is
    PyTorch's: activation(gate) is rounded to the dtype before it is multiplied. On a GPU, activation(gate) of a 16-bit
    gate may be the number next to PyTorch's. Frozen inputs get no gradient.

    Args:
        gate: Output of the gate projection, any shape, float32, float64, bfloat16 or float16.
        up: Output of the up projection, with gate's shape and dtype.
        activation: "silu", "gelu" (the exact one), "gelu_tanh" or "relu".

    Returns:
        The product, with gate's shape and dtype.

    Raises:
        ValueError: The shapes or dtypes differ, or the activation is unknown.

    Example:
        >>> gate, up = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 3.0])
        >>> s2ft.ops.act_mul(gate, up, "relu")
        tensor([0., 6.])
    """
    if not runs_directly(gate, up):
        return _op(gate, up, activation)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Node.apply(gate, up, activation)
    return below_autograd(_op, gate, up, activation)
