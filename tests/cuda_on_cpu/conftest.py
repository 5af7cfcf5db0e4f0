"""Compiles csrc/cuda for the CPU, once for each session, and wraps the kernels as functions of tensors."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from filelock import FileLock  # PyTorch needs it too
from support import sanitizers
from support.inside import ACTIVATIONS as PYTHON_ACTIVATIONS

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
# csrc/core/activation.h has the same order
ACTIVATIONS = {name: number for number, name in enumerate(PYTHON_ACTIVATIONS)}


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def pointers(tensors):
    return (ctypes.c_void_p * len(tensors))(*map(pointer, tensors)) if tensors else None


def rows_of(gate, up):
    """Elements of a row, and from the start of a row of gate and of up to that of the next, as csrc/act_mul.h has them."""
    size, gaps = gate.numel(), not (gate.is_contiguous() and up.is_contiguous())
    found = (gate.shape[1], gate.stride(0), up.stride(0)) if gaps else (size, size, size)
    return (ctypes.c_int64 * 3)(*found)


def along(tensor, dim):
    """The numbers of the struct Along (csrc/core/along.h) for a tensor, as csrc/move.h computes them."""
    last, rank = tensor.dim() - 1, tensor.dim()
    others = [d for d in range(rank) if d != dim]
    sizes, strides = [1] * (3 - rank), [0] * (3 - rank)
    sizes, strides = sizes + [tensor.shape[d] for d in others], strides + [tensor.stride(d) for d in others]
    return (ctypes.c_int64 * 7)(tensor.shape[dim], *sizes, tensor.stride(dim), *strides, dim == last)


class Runner:
    """The kernels as functions of tensors. Tensors may be any strided views."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.permute_scratch_bytes.restype = ctypes.c_int64
        self.library.last_error.restype = ctypes.c_char_p

    def configure(self, seed=0, max_blocks=0):
        self.library.configure(seed, max_blocks)

    def approximate(self, exp2_error=0.0, reciprocal_error=0.0):
        """Set the relative errors of the approximate exponential and reciprocal."""
        self.library.approximate(ctypes.c_double(exp2_error), ctypes.c_double(reciprocal_error))

    def write_slices(self, *slices):
        """Each is (weight, base, delta, units, dim); units is the start of a slice or an index tensor."""
        weights, bases, deltas, units, dims = zip(*slices)
        indices = [index if isinstance(index, torch.Tensor) else None for index in units]
        numbers = [
            number
            for weight, _, delta, first, dim in slices
            for number in (0 if isinstance(first, torch.Tensor) else first, weight.shape[dim], *delta.shape,
                           *weight.stride(), dim == 0, CODES[weight.dtype], CODES[delta.dtype])
        ]  # fmt: skip
        numbers = (ctypes.c_int64 * len(numbers))(*numbers)
        arguments = map(pointers, (weights, bases, deltas, indices))
        self.check(self.library.write_slices(ctypes.c_int64(len(slices)), numbers, *arguments))

    def exchange(self, weight, index, values, dim):
        self.check(
            self.library.exchange(
                ctypes.c_int64(weight.element_size()),
                pointer(weight),
                along(weight, dim),
                pointer(values),
                along(values, dim),
                pointer(index),
            )
        )

    def permute(self, weight, order, dim, lines_at_once=None):
        """Permute with as much scratch memory as the op would use, or with memory for `lines_at_once` lines."""
        size = weight.element_size()
        bytes_ = self.library.permute_scratch_bytes(ctypes.c_int64(size), along(weight, dim))
        if lines_at_once is not None:
            bytes_ = lines_at_once * weight.shape[dim] * 16
        scratch = torch.empty(bytes_, dtype=torch.uint8)
        self.check(
            self.library.permute(
                ctypes.c_int64(size),
                pointer(weight),
                along(weight, dim),
                pointer(order),
                pointer(scratch),
                ctypes.c_int64(bytes_),
            )
        )

    def scatter_add(self, weight, index, delta, dim, alpha, replaced=()):
        def alongs(tensors):
            numbers = [number for values in tensors for number in along(values, dim)]
            return (ctypes.c_int64 * len(numbers))(*numbers)

        self.check(
            self.library.scatter_add(
                CODES[weight.dtype],
                CODES[delta[0].dtype],
                pointer(weight),
                along(weight, dim),
                ctypes.c_int64(len(delta)),
                pointers(delta),
                alongs(delta),
                pointers(index),
                (ctypes.c_double * len(alpha))(*alpha),
                pointers(replaced),
                alongs(replaced),
            )
        )

    def act_mul(self, gate, up, activation, out=None):
        out = torch.empty(gate.shape, dtype=gate.dtype) if out is None else out
        self.check(
            self.library.act_mul(
                ACTIVATIONS[activation],
                CODES[gate.dtype],
                ctypes.c_int64(gate.numel()),
                rows_of(gate, up),
                *map(pointer, (gate, up, out)),
            )
        )
        return out

    def act_mul_backward(self, grad, gate, up, activation, outs=None):
        outs = outs or [torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2)]
        self.check(
            self.library.act_mul_backward(
                ACTIVATIONS[activation],
                CODES[gate.dtype],
                ctypes.c_int64(gate.numel()),
                rows_of(gate, up),
                *map(pointer, (grad, gate, up, *outs)),
            )
        )
        return outs

    def add_adapters(self, x, y, values, index, offsets, adapter, dim):
        """x and y are [sequences, tokens, width]."""
        out = torch.full_like(y, float("nan"))
        self.check(
            self.library.add_adapters(
                CODES[values.dtype],
                pointer(x),
                pointer(y),
                pointer(out),
                (ctypes.c_int64 * 4)(*x.shape, y.shape[-1]),
                pointer(values),
                pointer(index),
                pointer(offsets),
                pointer(adapter),
                (ctypes.c_int64 * 3)(len(offsets) - 1, *values.shape),
                dim,
            )
        )
        return out

    def check(self, error):
        assert error == 0, self.library.last_error().decode()


def compile_runner(folder, extra_flags=()):
    """The shared library of csrc/cuda and the simulator."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = folder / "cuda_on_cpu.so"
    command = [
        compiler,
        "-std=c++20",
        "-O1",
        "-g0",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-fPIC",
        "-shared",
        "-DS2FT_CUDA_ON_CPU",
        f"-I{HERE}",
        f"-I{CSRC}",
        *extra_flags,
        "-x",
        "c++",
        *map(str, [*sorted((CSRC / "cuda").glob("*.cu")), HERE / "self_test.cu", HERE / "runner.cpp"]),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    return library


@pytest.fixture(scope="session")
def sanitized_library(tmp_path_factory):
    flags = (
        "-O0",
        "-Wno-maybe-uninitialized",
        "-Wno-clobbered",
    )  # the code that the sanitizers add causes these warnings
    return compile_runner(tmp_path_factory.mktemp("sanitized"), (*sanitizers.FLAGS, *flags))


@pytest.fixture(scope="session")
def built_library(tmp_path_factory):
    sanitized = os.environ.get("S2FT_TEST_CUDA_ON_CPU")  # set by test_cuda_sanitized.py
    if sanitized:
        return sanitized
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the folder of a worker is inside the one that all workers share
        folder = folder.parent
    with FileLock(folder / "cuda_on_cpu.lock"):  # the first worker builds, the others wait
        library = folder / "cuda_on_cpu.so"
        return library if library.exists() else compile_runner(folder)


@pytest.fixture
def runner(built_library):
    run = Runner(built_library)
    run.configure()
    run.approximate()
    return run
