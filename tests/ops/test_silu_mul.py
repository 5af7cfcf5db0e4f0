"""silu_mul: PyTorch's two operators in one."""
import pytest
import torch
import torch.nn.functional as F
from support.tolerances import GEMM

from s2ft.ops import silu_mul
from s2ft.ops.silu_mul import reference, reference_backward

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((), (0,), (1,), (17,), (3, 5, 7), (129, 257))   # the last is more than one thread's share
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.cuda))


def inputs(shape, dtype, device="cpu"):
    return [(torch.randn(shape, device=device) * scale).to(dtype) for scale in (5, 1, 1)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, device):
    gate, up, grad = inputs(shape, dtype, device)
    rtol, atol = GEMM[dtype]
    torch.testing.assert_close(silu_mul(gate, up), F.silu(gate) * up, rtol=rtol, atol=atol)
    ours = torch.ops.s2ft.silu_mul_backward(grad, gate, up)
    gate.requires_grad_(), up.requires_grad_()
    for got, expected in zip(ours, torch.autograd.grad(F.silu(gate) * up, (gate, up), grad)):
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def test_bfloat16_is_rounded_as_pytorch_rounds_it():
    gate, up, grad = inputs((1000, 100), torch.bfloat16)
    assert torch.equal(silu_mul(gate, up), reference(gate, up))
    for got, expected in zip(torch.ops.s2ft.silu_mul_backward(grad, gate, up), reference_backward(grad, gate, up)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_extreme_values(dtype):
    gate = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 80, -80, 100, -100, 3e38, -3e38, float("inf"), float("nan")]).to(dtype)
    up = torch.full_like(gate, 0.5)
    for ours, theirs in ((silu_mul(gate, up), reference(gate, up)),
                         (torch.ops.s2ft.silu_mul_backward(up, gate, up)[1], reference_backward(up, gate, up)[1])):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-30)


def test_layouts():
    gate, up = torch.randn(6, 4).t(), torch.randn(8, 12)[::2, ::2]
    assert torch.allclose(silu_mul(gate, up), F.silu(gate) * up)


def test_gradcheck_opcheck_compile():
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(silu_mul, (gate, up))
    torch.library.opcheck(torch.ops.s2ft.silu_mul.default, (gate, up))
    torch.library.opcheck(torch.ops.s2ft.silu_mul_backward.default, (gate.detach(), gate.detach(), up.detach()))
    compiled = torch.compile(lambda a, b: silu_mul(a, b) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gate, up), silu_mul(gate, up) + 1)
    compiled(gate, up).sum().backward()


def test_keeps_gate_and_up_alone():
    gate, up, kept = torch.randn(8, requires_grad=True), torch.randn(8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        silu_mul(gate, up)
    assert sorted(kept) == sorted([gate.data_ptr(), up.data_ptr()])


@pytest.mark.parametrize("up", (torch.ones(3), torch.ones(2, dtype=torch.float64)))
def test_bad_arguments(up):
    with pytest.raises(ValueError, match="one shape and dtype"):
        silu_mul(torch.ones(2), up)
