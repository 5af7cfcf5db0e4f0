"""Compiles every Triton kernel for GPUs that need not be here: python -m tests.triton_kernels.ahead_of_time

It prints a line for each kernel, dtype and target: registers, shared memory, spilled bytes and the width of memory accesses.
An error or a spill makes it fail. Triton's interpreter must be off, because its kernels can't be compiled.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from s2ft.ops._triton import act_mul, multi_adapter_linear as banks
from s2ft.ops.act_mul import ACTIVATIONS

NVIDIA = tuple(GPUTarget("cuda", capability, 32) for capability in (80, 90, 100))
AMD = (GPUTarget("hip", "gfx942", 64), GPUTarget("hip", "gfx1100", 32))
DTYPES = ("fp32", "fp64", "bf16", "fp16")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def cases():
    """Kernel, dtype, and its constants by name."""
    for dtype in DTYPES:
        for kernel in (act_mul._act_mul, act_mul._act_mul_backward):
            for activation in ACTIVATIONS:
                yield kernel, dtype, {"ACTIVATION": activation, "BLOCK": act_mul.BLOCK}
        for kernel in (banks._outputs_of_a_token, banks._inputs_of_a_token):
            yield kernel, dtype, {"UNITS": banks.UNITS, "COLUMNS": banks.COLUMNS}
        for kernel in (banks._outputs_of_a_tile, banks._inputs_of_a_tile):
            for rows in {"fp64": (), "fp32": banks.ROWS[:1]}.get(dtype, banks.ROWS):
                yield (
                    kernel,
                    dtype,
                    {"ROWS": rows, "UNITS": banks.TILE_UNITS, "COLUMNS": banks.TILE_COLUMNS, "WIDENED": False},
                )


def source(kernel, dtype: str, constants: dict) -> ASTSource:
    """The kernel for dense tensors that start at multiples of 16 bytes, with widths that are multiples of 16."""
    indices, sizes = ("index", "offsets", "adapter"), ("size", "tokens", "inputs", "outputs", "adapters", "units")
    signature, aligned = {}, {}
    for number, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "i32" if name in sizes else "*i64" if name in indices else f"*{dtype}"
        if name not in banks.VARIABLE:
            aligned[(number,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack, shared and local memory of the kernel, as NVIDIA's tool prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def widest_access(ptx: str) -> int:
    """Bytes of the widest access to global memory of one thread."""
    vectors = re.findall(r"(?:ld|st)\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+|\d+)", ptx)
    return max([int(count or 1) * int(bits) // 8 for count, bits in vectors] + [int(size, 0) for size in copies])


def main(targets) -> int:
    failures = 0
    for kernel, dtype, constants in cases():
        for target in targets:
            what = f"{kernel.__name__} {dtype} {' '.join(map(str, constants.values()))} {target.backend} {target.arch}"
            try:
                binary = triton.compile(
                    source(kernel, dtype, constants), target=target, options={"enable_fp_fusion": True}
                )
            except Exception as error:
                failures += 1
                print(f"{what}: {type(error).__name__}: {error}", flush=True)
                continue
            if "cubin" not in binary.asm:
                print(f"{what}: compiled", flush=True)
                continue
            used = resources(binary.asm["cubin"])
            spilled = used["STACK"] + used["LOCAL"]
            failures += spilled > 0
            print(f"{what}: {used['REG']} registers, {used['SHARED'] + binary.metadata.shared} B shared, {spilled} B "
                  f"spilled, {widest_access(binary.asm['ptx'])} B an access", flush=True)  # fmt: skip
    return failures


if __name__ == "__main__":
    sys.exit(min(1, main(AMD if "amd" in sys.argv[1:] else NVIDIA)))
