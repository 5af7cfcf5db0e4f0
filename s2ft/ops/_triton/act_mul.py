"""Triton kernels of act_mul. The formulas and the rounding are those of csrc/core/activation.h, which explains them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of a program: eight for each thread, which are 16 bytes of a 16-bit dtype


@triton.jit
def _normal(g):
    """Phi(g) and Phi'(g) of the standard normal distribution, with the digits of the lower tail in float32."""
    if g.dtype == tl.float64:
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        density = tl.exp(-0.5 * g * g) * 0.3989422804014327
    else:
        a = tl.minimum(tl.abs(g), 14.0)
        high = (a.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        e = tl.exp(-0.5 * high * high) * tl.exp(-0.5 * (a - high) * (a + high))
        e = tl.where(a > 13.2, 0.0, e)  # so that infinity gives what PyTorch gives, also where denormals are zero
        t = 1.0 / (1.0 + 0.34 * a)
        p = -2.65232132e-02
        p = p * t + 1.41391639e-01
        p = p * t - 2.76895516e-01
        p = p * t + 2.06306691e-01
        p = p * t - 4.74343055e-02
        p = p * t + 1.16456034e-01
        p = p * t + 1.14933150e-01
        p = p * t + 1.36146927e-01
        p = p * t + 1.35618606e-01
        tail = e * (p * t)
        cdf = tl.where(g < 0.0, tail, 1.0 - tail)
        density = e * 0.398942280
    return cdf, density


@triton.jit
def _gradient(d, g, ACTIVATION: tl.constexpr):
    """d act'(g) and act(g). In the forward nothing uses the first, and the compiler leaves it out."""
    if ACTIVATION == "silu":
        below = 1.0 + tl.exp(-g)
        s = 1.0 / below
        value = g / below
        change = d * s * (1.0 + g * (1.0 - s))
    elif ACTIVATION == "gelu":
        cdf, density = _normal(g)
        value = g * cdf
        change = d * (cdf + g * density)
    elif ACTIVATION == "gelu_tanh":
        s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g)))
        value = g * s
        change = d * (s + g * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * (g * g))))
    else:
        tl.static_assert(ACTIVATION == "relu", "an activation without a Triton formula")
        value = tl.where(g <= 0.0, 0.0, g)  # NaN passes
        change = tl.where(g <= 0.0, 0.0, d)
    return change, value


@triton.jit
def _widened(value):
    """The value in the dtype of the computation."""
    return value if value.dtype == tl.float64 else value.to(tl.float32)


@triton.jit
def _act_mul(gate, up, out, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    g, u = tl.load(gate + at, mask=here, other=0.0), tl.load(up + at, mask=here, other=0.0)
    _, value = _gradient(_widened(u), _widened(g), ACTIVATION)
    product = _widened(value.to(g.dtype)) * _widened(u)
    tl.store(out + at, product.to(g.dtype), mask=here)


@triton.jit
def _act_mul_backward(grad, gate, up, grad_gate, grad_up, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    g, u = tl.load(gate + at, mask=here, other=0.0), tl.load(up + at, mask=here, other=0.0)
    d = _widened(tl.load(grad + at, mask=here, other=0.0))
    of_value = _widened((d * _widened(u)).to(g.dtype))
    change, value = _gradient(of_value, _widened(g), ACTIVATION)
    tl.store(grad_gate + at, change.to(g.dtype), mask=here)
    tl.store(grad_up + at, (d * _widened(value.to(g.dtype))).to(g.dtype), mask=here)


def act_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out, size = torch.empty_like(gate), gate.numel()
    if size:
        _act_mul[(triton.cdiv(size, BLOCK),)](gate, up, out, size, activation, BLOCK, enable_fp_fusion=True)
    return out


def act_mul_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up, size = torch.empty_like(gate), torch.empty_like(gate), gate.numel()
    if size:
        _act_mul_backward[(triton.cdiv(size, BLOCK),)](
            grad, gate, up, grad_gate, grad_up, size, activation, BLOCK, enable_fp_fusion=True
        )
    return grad_gate, grad_up
