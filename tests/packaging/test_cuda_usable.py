"""When CUDA kernels are registered, and the warning if they are not."""

import warnings
from unittest.mock import Mock

import pytest
import torch
from support.inside import _build, runs_on, why_unusable
from support.models import model_of

import s2ft

# architecture, capability, whether the driver compiles PTX, whether the code runs there
SERVES = [
    ("8.0", (8, 0), True, True),
    ("8.0", (8, 9), True, True),
    ("8.6", (8, 0), True, False),
    ("8.0", (9, 0), True, False),
    ("8.0", (7, 5), True, False),
    ("7.5", (7, 0), True, False),
    ("7.5", (7, 5), False, True),
    ("10.0", (10, 3), True, True),
    ("12.0", (12, 1), False, True),
    ("12.0", (1, 2), True, False),
    ("8.0+PTX", (9, 0), True, True),
    ("8.0+PTX", (9, 0), False, False),
    ("8.0+PTX", (7, 5), True, False),
    ("8.0+PTX", (8, 6), False, True),
    ("12.0+PTX", (11, 0), True, False),
    ("9.0a", (9, 0), True, True),
    ("9.0a+PTX", (10, 0), True, False),
    ("10.0a", (10, 3), True, False),
    ("10.0f", (10, 3), True, True),
    ("10.0f+PTX", (12, 0), True, False),
    ("Ampere", (8, 0), True, False),
]
T4, A100, H100, V100 = ("Tesla T4", (7, 5)), ("A100", (8, 0)), ("H100", (9, 0)), ("V100", (7, 0))
ARCHS = ("7.5", "8.0", "9.0", "10.0", "12.0+PTX")
# driver, CUDA of the build, architectures, devices, a part of the reason; it is empty if the kernels are used
DECISIONS = {
    "served": (13000, 13000, ARCHS, [H100], ""),
    "old GPU": (13000, 13000, ARCHS, [T4], ""),
    "newer driver": (13010, 12060, ("9.0",), [H100], ""),
    "older minor driver, machine code": (12040, 12080, ("9.0+PTX",), [H100], ""),
    "older minor driver, PTX": (12040, 12080, ("8.0+PTX",), [H100], "8.0+PTX, which does not support device 0 (H100"),
    "PTX": (13000, 13000, ("8.0+PTX",), [H100], ""),
    "no driver": (0, 13000, ARCHS, [], "there is no CUDA driver"),
    "old driver": (12080, 13000, ARCHS, [H100], "supports CUDA up to 12.8 and the kernels were built with CUDA 13.0"),
    "too old a GPU": (13000, 13000, ARCHS, [V100], "device 0 (V100, compute capability 7.0)"),
    "one of two": (13000, 13000, ("8.0",), [A100, T4], "device 1 (Tesla T4, compute capability 7.5)"),
    "no GPU": (13000, 13000, ARCHS, [], ""),
}


@pytest.mark.parametrize("arch, capability, jit, expected", SERVES, ids=str)
def test_which_code_runs_where(arch, capability, jit, expected):
    assert runs_on(arch, capability, jit) is expected


@pytest.mark.parametrize("case", DECISIONS)
def test_the_decision_and_its_reason(case):
    driver, built, archs, devices, expected = DECISIONS[case]
    reason = why_unusable(driver, built, archs, devices)
    assert expected in reason and bool(reason) == bool(expected)


def compiled(driver=13000, built=13000, with_cuda=True):
    """Replaces the compiled module."""
    info = {"with_cuda": with_cuda, "cuda_archs": "8.0;9.0" if with_cuda else ""}
    return Mock(**{"cuda_versions.return_value": (driver, built), "build_info.return_value": info})


@pytest.fixture
def fresh(monkeypatch):
    """load(module, device) prepares _build with this module, then simulates that PyTorch initialises CUDA.

    It returns the `cuda_reason` of build_info().
    """
    for name, value in (("_cuda_reason", ""), ("_cuda_registered", False), ("_silent", False)):
        monkeypatch.setattr(_build, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def load(module, device=H100, record=None):
        queued = []
        gpu = {"device_count": 1, "get_device_name": device[0], "get_device_capability": device[1]}
        for name, value in gpu.items():
            monkeypatch.setattr(torch.cuda, name, Mock(return_value=value))
        monkeypatch.setattr(torch.cuda, "_lazy_call", queued.append)
        monkeypatch.setattr(_build, "_module", module)
        monkeypatch.setattr(_build, "_reason", "the compiled kernels are loaded")
        _build._prepare_cuda(record or {})
        assert not module.register_cuda.called  # not before CUDA is initialised
        for call in queued:
            call()
        return _build.build_info()["cuda_reason"]

    return load


def warnings_of_two_calls():
    """The warnings for two models on CUDA: the second model must not warn again."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _build.warn_without_cuda_kernels()
        _build.warn_without_cuda_kernels()
    return [str(w.message) for w in caught]


def test_kernels_are_registered_with_cuda_without_a_warning(fresh):
    module = compiled()
    assert fresh(module) == "the CUDA kernels are registered" and module.register_cuda.call_count == 1
    assert s2ft.build_info()["cuda_version"] == "13.0" and s2ft.build_info()["cuda"] is True
    assert warnings_of_two_calls() == []


@pytest.mark.parametrize(
    "module, device, reason",
    (
        (compiled(driver=12080), H100, "the driver supports CUDA up to 12.8"),
        (compiled(), T4, "device 0 (Tesla T4, compute capability 7.5)"),
        (compiled(with_cuda=False), H100, "the CUDA kernels were not built"),
    ),
    ids=("driver", "device", "not built"),
)
def test_what_cannot_run_is_not_registered_and_said_once(fresh, monkeypatch, module, device, reason):
    assert reason in fresh(module, device)
    if not torch.cuda.is_initialized():
        assert s2ft.build_info()["cuda_ops"] == {}  # nothing is decided yet
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        assert set(s2ft.build_info()["cuda_ops"].values()) == {"PyTorch"}
    assert not module.register_cuda.called
    (message,) = warnings_of_two_calls()
    assert reason in message and "uses the PyTorch implementations" in message


def test_another_vendor_registers_nothing_a_failure_does_not_reach_pytorch_and_a_build_says_why(fresh, monkeypatch):
    assert (
        fresh(compiled(with_cuda=False), record={"cuda_reason": "CUDA kernels need nvcc"}) == "CUDA kernels need nvcc"
    )
    module = compiled()
    module.register_cuda.side_effect = ZeroDivisionError("division by zero")
    assert "could not be registered: division by zero" in fresh(module) and len(warnings_of_two_calls()) == 1
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "not built for CUDA" in fresh(compiled())


def test_attach_warns_for_a_model_on_cuda(monkeypatch):
    # the tensors are not on CUDA, so the rest of attach must not run
    monkeypatch.setattr("s2ft.api.warn_without_cuda_kernels", Mock(side_effect=InterruptedError))
    s2ft.attach(model_of("llama"), s2ft.S2FTConfig(d_ratio=0.2))
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True, raising=False)
    with pytest.raises(InterruptedError):
        s2ft.attach(model_of("llama"), s2ft.S2FTConfig(d_ratio=0.2))
