"""The command that counts the instructions of the CUDA kernels, on machine code written here and on real one."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).resolve().parents[2] / "bench" / "gpu" / "disassembly.py"
LOOP = """
\t.section\t.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/                   LDG.E R4, desc[UR4][R8.64] ;
.L_x_2:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R8.64] ;
        /*0030*/                   HMMA.16816.F32 R12, R4, R2, R12 ;
        /*0040*/                   STG.E.U16 desc[UR4][R8.64], R12 ;
        /*0050*/              @!P0 BRA `(.L_x_2) ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);
        /*0090*/                   NOP ;
\t.section\t.nv.constant0.kernel,"a",@progbits
"""
PTXAS = """
ptxas info    : Compiling entry function 'kernel' for 'sm_90'
    8 bytes stack frame, 16 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 38 registers, used 1 barriers, 8 bytes cumulative stack size, 128 bytes smem
"""


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("gpu_disassembly", COMMAND)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_disassembly"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_the_innermost_loop_and_the_bytes_that_it_moves(command):
    ((name, lines),) = command.functions(LOOP)
    assert name == "kernel"
    (loop,) = command.loops(lines)
    assert [line.split()[0] for line in loop] == ["LDG.E.128", "HMMA.16816.F32", "STG.E.U16", "@!P0"]
    assert command.moved(loop, "LDG") == 16 and command.moved(loop, "STG") == 2
    whole = [line for line in lines if not line.endswith(":")]
    assert command.moved(whole, "LDG") == 8 + 4 + 16


def test_registers_and_spills(command):
    assert command.resources(PTXAS) == {"kernel": (38, 20, 8, 128)}


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
