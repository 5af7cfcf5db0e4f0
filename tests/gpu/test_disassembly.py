"""The command that counts the instructions of the CUDA kernels, on machine code written here and on real one."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).resolve().parents[2] / "bench" / "gpu" / "disassembly.py"


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("gpu_disassembly", COMMAND)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_disassembly"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_act_mul_is_not_bound_by_instructions(command):
    """An H100 issues 57 instructions in the time of an element's forward, and 95 in that of its backward."""
    try:
        home = command.toolkit()
        nvdisasm = command.find_nvdisasm(home)
    except SystemExit as missing:
        pytest.skip(str(missing))
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt")
    source = next(source for source in command.SOURCES if source.name == "act_mul.cu")
    found = {kernel.name: kernel for kernel in command.kernels(home, nvdisasm, source, 90)}
    assert not any(kernel.spills or kernel.local for kernel in found.values())
    for dtype in ("BFloat16", "Half"):
        assert found[f"act_mul_items<Silu, {dtype}>"].an_element <= 14
        assert found[f"act_mul_backward_items<Silu, {dtype}>"].an_element <= 22
