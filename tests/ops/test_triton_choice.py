"""When CUDA tensors run act_mul and multi_adapter_linear in Triton, and what happens if that fails.

Neither a GPU nor Triton is needed: the devices and the kernels are fakes.
"""

import warnings

import pytest
import torch

import s2ft
from s2ft.ops import _build, _triton
from s2ft.ops.act_mul import reference

A100, T4 = ("NVIDIA A100", (8, 0)), ("Tesla T4", (7, 5))
INTERNAL = {"_cuda_registered": False, "_triton_ops": frozenset(), "_triton_reason": "", "_silent": False}


@pytest.fixture
def fresh(monkeypatch):
    """register(...) runs what PyTorch calls when it initialises CUDA. Returns what was registered, by op."""
    for name, value in INTERNAL.items():
        monkeypatch.setattr(_build, name, value)
    monkeypatch.setattr(_build, "_cuda_reason", "nvcc was not found")
    monkeypatch.delenv(_triton.SWITCH, raising=False)

    def register(device=A100, installed=True, kernels=lambda: dict.fromkeys(_triton.OPS)):
        registered = {}
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: device[0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: device[1])
        monkeypatch.setattr(_triton, "is_installed", lambda package: installed)
        monkeypatch.setattr(_triton, "kernels", kernels)
        library = type("Library", (), {"impl": lambda self, op, kernel, key: registered.update({op: key})})
        monkeypatch.setattr(_triton, "LIBRARY", library())
        _triton.register()
        return registered

    return register


def warning_at_attach():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _build.warn_without_cuda_kernels()
        _build.warn_without_cuda_kernels()
    (message,) = [str(warning.message) for warning in caught]
    return message


def test_triton_is_registered_for_cuda_and_reported(fresh):
    assert fresh() == dict.fromkeys(_triton.OPS, "CUDA")
    info = s2ft.build_info()
    assert info["triton_reason"] == "the CUDA kernels can't run, and Triton can"
    assert {op for op, name in info["cuda_ops"].items() if name == "Triton"} == set(_triton.OPS)
    assert info["cuda_ops"]["sliced_linear"] == "PyTorch"
    message = warning_at_attach()
    assert "runs act_mul and multi_adapter_linear in Triton" in message and "nvcc was not found" in message


def test_cuda_kernels_come_first(fresh, monkeypatch):
    monkeypatch.setattr(_build, "_cuda_registered", True)
    assert fresh() == {} and not _build.runs_in_triton("act_mul")


@pytest.mark.parametrize(
    "device, installed, switch, reason",
    (
        (T4, True, None, "it needs compute capability 8.0, which device 0 (Tesla T4, compute capability 7.5)"),
        (A100, False, None, "it is not installed; pip install triton"),
        (A100, True, "0", "S2FT_TRITON=0 switches it off"),
        (A100, True, "no", "S2FT_TRITON must be 0 or 1, got 'no'"),
    ),
)
def test_without_triton_the_references_stay(fresh, monkeypatch, device, installed, switch, reason):
    if switch is not None:
        monkeypatch.setenv(_triton.SWITCH, switch)
    assert fresh(device, installed) == {}
    info = s2ft.build_info()
    assert reason in info["triton_reason"] and set(info["cuda_ops"].values()) == {"PyTorch"}
    assert reason in warning_at_attach()


def test_amds_gpus_have_other_capabilities():
    assert _triton.why_unusable("1", True, True, [("AMD Instinct MI100", (9, 0)), ("a Radeon", (7, 0))]) == ""


def test_a_failure_does_not_reach_pytorch(fresh):
    assert fresh(kernels=lambda: 1 / 0) == {}
    assert s2ft.build_info()["triton_reason"] == "it could not be loaded: division by zero"


def test_nothing_is_decided_before_cuda_is_initialised(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert s2ft.build_info()["cuda_ops"] == {}


@pytest.fixture
def kernel(monkeypatch):
    """kernel(launch) is what the dispatcher calls for act_mul. `launch` stands for Triton."""
    for name, value in INTERNAL.items():
        monkeypatch.setattr(_build, name, value)
    _build.report_triton(_triton.OPS, "")
    return lambda launch: _triton._Kernel("act_mul", _triton.check_act_mul, launch)


def test_a_kernel_that_does_not_compile_gives_way_to_the_reference(kernel):
    calls = []

    def launch(*arguments):
        calls.append(arguments)
        raise RuntimeError("Failed to find C compiler")

    gate = torch.randn(5)
    call = kernel(launch)
    with pytest.warns(RuntimeWarning, match="act_mul failed: RuntimeError: Failed to find C compiler.*S2FT_TRITON=0"):
        assert torch.equal(call(gate, gate, "silu"), reference(gate, gate, "silu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(call(gate, gate, "silu"), reference(gate, gate, "silu"))
    assert len(calls) == 1 and not _build.runs_in_triton("act_mul") and _build.runs_in_triton("act_mul_backward")
    assert "Failed to find C compiler" in s2ft.build_info()["triton_reason"]


@pytest.mark.parametrize("error", (torch.OutOfMemoryError("out of memory"), torch.AcceleratorError("launch failure")))
def test_errors_of_the_gpu_are_not_triton_s(kernel, error):
    def launch(*arguments):
        raise error

    with pytest.raises(type(error)):
        kernel(launch)(torch.ones(1), torch.ones(1), "silu")
    assert _build.runs_in_triton("act_mul")


def test_errors_after_a_first_success_are_raised(kernel):
    results = iter((torch.ones(1),))
    call = kernel(lambda *arguments: next(results))
    call(torch.ones(1), torch.ones(1), "silu")
    with pytest.raises(StopIteration):
        call(torch.ones(1), torch.ones(1), "silu")


def test_every_form_of_a_kernel_has_a_first_call(kernel):
    """Decoding and prefill of multi_adapter_linear are kernels of their own, and the second may not compile."""

    def launch(gate, *others):
        if gate.numel() > 1:
            raise RuntimeError("no such instruction")
        return gate

    call = _triton._Kernel("act_mul", _triton.check_act_mul, launch, lambda gate, *others: gate.numel() > 1)
    call(torch.ones(1), torch.ones(1), "silu")
    with pytest.warns(RuntimeWarning, match="no such instruction"):
        assert torch.equal(call(torch.ones(3), torch.ones(3), "relu"), torch.ones(3))


def test_wrong_arguments_are_found_before_triton_sees_them(kernel):
    call = kernel(lambda *arguments: pytest.fail("launched"))
    with pytest.raises(ValueError, match="activation must be one of"):
        call(torch.ones(1), torch.ones(1), "tanh")
    with pytest.raises(ValueError, match="act_mul: all tensors must be on one device, got cpu and meta"):
        call(torch.ones(1), torch.ones(1, device="meta"), "silu")


def test_other_dtypes_run_the_reference(kernel):
    gate = torch.ones(2, dtype=torch.int32)
    assert kernel(lambda *arguments: pytest.fail("launched"))(gate, gate, "relu").tolist() == [1, 1]
