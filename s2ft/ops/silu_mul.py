"""silu(gate) * up, the elementwise middle of a gated FFN, each way in one pass."""
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s2ft.ops._library import define


def reference(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def reference_backward(grad: Tensor, gate: Tensor, up: Tensor) -> Tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate).contiguous(), (grad * F.silu(gate)).contiguous()


def fake(gate, up):
    return gate.new_empty(gate.shape)


def fake_backward(grad, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, grad):
    return torch.ops.s2ft.silu_mul_backward(grad, *ctx.saved_tensors)


_op = define("silu_mul(Tensor gate, Tensor up) -> Tensor", lambda gate, up: reference(gate, up).contiguous(),
             fake, setup_context, backward)
_backward = define("silu_mul_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
                   reference_backward, fake_backward)


def silu_mul(gate: Tensor,   # any shape
             up: Tensor      # gate's shape and dtype
             ) -> Tensor:    # the same
    """silu(gate) * up, keeping gate and up for the backward and nothing else.

    PyTorch's two operators keep silu(gate) too and read and write more in a step. Rounding is
    theirs: silu(gate) is rounded to the dtype before it is multiplied. Frozen inputs get no gradient.
    Raises: ValueError where shapes or dtypes differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"silu_mul: gate ({gate.dtype}, {tuple(gate.shape)}) and up ({up.dtype}, "
                         f"{tuple(up.shape)}) must have one shape and dtype")
    return _op(gate, up)
