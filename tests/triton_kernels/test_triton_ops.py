"""Ops and a model that run in Triton through the dispatcher: gradients, checks of PyTorch, torch.compile, training."""

import os
import subprocess
import sys

import pytest
import torch
from support import triton_device
from support.models import model_of

import s2ft
from s2ft import ops
from s2ft.ops import _build, _triton
from s2ft.ops.act_mul import ACTIVATIONS

pytestmark = triton_device.marks


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Registers the kernels for the tests' device, in place of compiled kernels."""
    before = _build._triton_ops, _build._triton_reason
    library = torch.library.Library("s2ft", "IMPL")
    for op, kernel in _triton.kernels().items():
        library.impl(op, kernel, triton_device.DEVICE.upper(), allow_override=True)
    _build.report_triton(_triton.OPS, "")
    yield
    library._destroy()
    _build.report_triton(*before)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that run."""
    names, run = [], _triton._Kernel.__call__

    def call(self, *arguments):
        names.append(self.op)
        return run(self, *arguments)

    monkeypatch.setattr(_triton._Kernel, "__call__", call)
    return names


def randn(*shape, **options):
    return torch.randn(*shape, device=triton_device.DEVICE, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_and_compile_of_act_mul(activation):
    gate, up = (randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: ops.act_mul(a, b, activation), (gate, up))
    torch.library.opcheck(torch.ops.s2ft.act_mul.default, (gate, up, activation))
    compiled = torch.compile(lambda a, b: ops.act_mul(a, b, activation) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gate, up), ops.act_mul(gate, up, activation) + 1)
    compiled(gate, up).sum().backward()


@pytest.mark.parametrize("dim", (0, 1))
def test_gradients_and_compile_of_multi_adapter_linear(dim):
    deltas = [(torch.tensor([4, 1]), torch.randn([(2, 6), (7, 2)][dim], dtype=torch.float64))]
    bank = [t.to(triton_device.DEVICE) for t in ops.pack_adapters(deltas, dim)]
    x, y = (randn(3, 2, size, dtype=torch.float64, requires_grad=True) for size in (6, 7))
    adapter = torch.tensor([0, -1, 0], device=triton_device.DEVICE)

    def call(x, y):
        return ops.multi_adapter_linear(x, y, *bank, adapter, dim)

    assert torch.autograd.gradcheck(call, (x, y))
    torch.library.opcheck(torch.ops.s2ft.multi_adapter_linear.default, (x, y, *bank, adapter, dim))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, y), call(x, y))


def test_a_compiled_graph_has_one_opaque_operator(launches):
    graphs = []

    def backend(module, inputs):
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return module

    gate = randn(4)
    torch.compile(lambda g: ops.act_mul(g, g, "silu"), fullgraph=True, backend=backend)(gate)
    assert graphs == [["s2ft.act_mul.default"]] and launches == ["act_mul"]


def test_a_training_step_equals_that_of_the_reference(launches):
    def gradients():
        torch.manual_seed(0)
        model = model_of("llama").to(triton_device.DEVICE)
        s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.2, o_ratio=0.25, u_ratio=0.2))
        tokens = torch.arange(24, device=triton_device.DEVICE).view(2, 12)
        model(input_ids=tokens, labels=tokens).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    ours = gradients()
    assert {"act_mul", "act_mul_backward"} <= set(launches)
    _build.report_triton((), "the references, to compare with")
    try:
        theirs = gradients()
    finally:
        _build.report_triton(_triton.OPS, "")
    assert ours.keys() == theirs.keys() and ours
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)


AT_IMPORT = """
import sys
sys.modules["s2ft._C"] = None  # no compiled kernels
import torch
torch.cuda._lazy_call = lambda call: call()  # as if CUDA were initialised, without a GPU
torch.cuda.is_initialized = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_name = lambda number: "a GPU"
torch.cuda.get_device_capability = lambda number: (8, 0)
import s2ft
info = s2ft.build_info()
print(info["triton_reason"], "|", *sorted(op for op, name in info["cuda_ops"].items() if name == "Triton"))
"""


@pytest.mark.parametrize("switch", ("1", "0"))
def test_s2ft_imported_after_cuda_is_initialised(switch):
    environment = {**os.environ, "S2FT_TRITON": switch, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", AT_IMPORT]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    if switch == "0":
        assert printed.split("|") == ["S2FT_TRITON=0 switches it off ", "\n"]
    else:
        assert printed.strip().endswith("| act_mul act_mul_backward multi_adapter_linear")
