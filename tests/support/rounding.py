"""Simulates a processor whose products round differently for every shape, layout and dtype of their operands.

Every product is the sum of two parts. The shapes, strides and dtypes of the operands determine where it is divided.
The same operands give the same bits, as on every processor. The same numbers in another layout, or as part of another
batch, give other bits, as they do on some processors. A test that compares such products for equality fails here on
every processor.
"""

import os
import warnings
import zlib
from collections.abc import Callable

import torch

# Position of the two operands among the arguments, and the summed dimension of each.
PRODUCTS: dict[str, tuple[int, int, int]] = {
    "mm": (0, 1, 0),
    "mv": (0, 1, 0),
    "dot": (0, 0, 0),
    "bmm": (0, 2, 1),
    "addmm": (1, 1, 0),
    "addmv": (1, 1, 0),
    "baddbmm": (1, 2, 1),
}
KEPT: list[torch.library.Library] = []  # the products stay divided while the library exists


def place(seed: str, size: int, *operands: torch.Tensor) -> int:
    """The index at which a sum of `size` terms is divided."""
    layout = [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in operands]
    return 1 + zlib.crc32(repr((seed, layout, torch.get_num_threads())).encode()) % (size - 1)


def in_two_parts(name: str, seed: str) -> Callable[..., torch.Tensor]:
    """The product called `name`, computed as the sum of two parts."""
    position, *dims = PRODUCTS[name]
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def product(keyset, *arguments, **scalars):
        operands = arguments[position : position + 2]
        size = operands[0].shape[dims[0]]
        if size < 2 or operands[0].dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            return kernel.call_boxed(keyset, *arguments, **scalars)
        middle = place(seed, size, *operands)
        first = [operand.narrow(dim, 0, middle) for operand, dim in zip(operands, dims)]
        second = [operand.narrow(dim, middle, size - middle) for operand, dim in zip(operands, dims)]
        if position == 0:
            return kernel.call_boxed(keyset, *first) + kernel.call_boxed(keyset, *second)
        sum_ = kernel.call_boxed(keyset, arguments[0], *first, *arguments[3:], **scalars)
        return kernel.call_boxed(keyset, sum_, *second, **{**scalars, "beta": 1})

    return product


def into_out(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def kernel(keyset, *arguments, out, **scalars):
        result = product(keyset, *arguments, **scalars)
        return out.resize_(result.shape).copy_(result)

    return kernel


def in_place(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def kernel(keyset, *arguments, **scalars):
        return arguments[0].copy_(product(keyset, *arguments, **scalars))

    return kernel


def set_up_kernels() -> None:
    """Set the threads and the products of this process as environment variables say (see tests/conftest.py)."""
    torch.set_num_threads(int(os.environ.get("S2FT_TEST_THREADS", 1)))  # pytest already runs a worker on each core
    if "S2FT_TEST_ROUNDING" in os.environ:
        KEPT.append(divide_products(os.environ["S2FT_TEST_ROUNDING"]))


def divide_products(seed: str) -> torch.library.Library:
    """Replace PyTorch's products on the CPU while the returned library exists.

    Args:
        seed: A different seed divides the products at different indices.

    Returns:
        The library, which the caller must keep.
    """
    warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
    library = torch.library.Library("aten", "IMPL")
    for name, (position, *_) in PRODUCTS.items():
        product = in_two_parts(name, seed)
        kernels = {name: product, f"{name}.out": into_out(product)}
        if position:
            kernels[f"{name}_"] = in_place(product)
        for operator, kernel in kernels.items():
            library.impl(operator, kernel, "CPU", with_keyset=True, allow_override=True)
    return library
