"""The command that counts the instructions of the CUDA kernels, on machine code written here and on real one."""

import shutil

import disassembly
import pytest


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_act_mul_is_not_bound_by_instructions():
    """An H100 issues 57 instructions in the time of an element's forward, and 95 in that of its backward."""
    try:
        home = disassembly.toolkit()
        nvdisasm = disassembly.find_nvdisasm(home)
    except SystemExit as missing:
        pytest.skip(str(missing))
    source = next(source for source in disassembly.SOURCES if source.name == "act_mul.cu")
    found = {kernel.name: kernel for kernel in disassembly.kernels(home, nvdisasm, source, 90)}
    assert not any(kernel.spills or kernel.local for kernel in found.values())
    for dtype in ("BFloat16", "Half"):
        assert found[f"act_mul_items<Silu, {dtype}>"].an_element <= 14
        assert found[f"act_mul_backward_items<Silu, {dtype}>"].an_element <= 22
