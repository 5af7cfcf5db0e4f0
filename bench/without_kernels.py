"""What the ops cost on a GPU without the CUDA kernels, by count: python bench/without_kernels.py

For the reference of each op it counts the operators that PyTorch launches, and the memory that they read and write.
"One pass" is the least that a kernel moves: every argument read and every result written once. Matrix products of dense
weights, which every implementation shares, are left out. The tensors have no data, so that a count needs neither a GPU
nor time. The shapes are those of LLaMA-3-8B's FFN and a slice of 3 %.
"""

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import s2ft.ops
from s2ft.ops._library import REFERENCES

TOKENS, WIDTH, CHANNELS, UNITS = 4096, 4096, 14336, 432
ADAPTERS, SEQUENCES = 8, 8
PRODUCTS = ("mm", "addmm", "linear")
MOVED = ("index_select", "gather", "index")  # read as much of their first argument as they return
PUT = ("index_put_", "index_copy_", "index_add_")


class Count(TorchDispatchMode):
    """Counts operators that launch work on a GPU, and the bytes that they move."""

    def __init__(self, with_products: bool) -> None:
        super().__init__()
        self.left_out = () if with_products else PRODUCTS
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        returned = function._schema.returns[0].alias_info if function._schema.returns else None
        is_view = returned is not None and not returned.is_write
        if is_view or name.startswith(("empty", "new_empty", "_unsafe_view")) or name in self.left_out:
            return result
        self.operators += 1
        read, written = tensors_in(args), tensors_in(result)
        if name in MOVED:
            read = [result, *read[1:]]
        elif name in PUT:  # of the changed tensor, only what is put; adding reads it too
            read, written = read[1:], [read[-1]] * (2 if name == "index_add_" else 1)
        elif name == "copy_":
            read = read[1:]
        self.bytes += sum(map(size, read)) + sum(map(size, written))
        return result


def tensors_in(values) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [tensor for value in values for tensor in tensors_in(value)] if isinstance(values, (list, tuple)) else []


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def cases():
    """Name, op, arguments, and the elements of 2 bytes that one pass moves."""
    gate = empty(TOKENS, CHANNELS)
    elements = gate.numel()
    yield "act_mul", "act_mul", (gate, gate, "silu"), 3 * elements
    yield "act_mul, gradients", "act_mul_backward", (gate, gate, gate, "silu"), 5 * elements

    x, down, delta = empty(TOKENS, CHANNELS), empty(WIDTH, CHANNELS), empty(WIDTH, UNITS)
    index = empty(UNITS, dtype=torch.int64)
    slice_moves = 6 * delta.numel()  # base and delta read, base kept, the sum written; the kept base read and written
    yield "sliced_linear", "sliced_linear", (x, down, delta, 0, 1, None, None), slice_moves
    yield "indexed_linear", "indexed_linear", (x, down, delta, index, 1, None, None), slice_moves

    total = ADAPTERS * UNITS
    bank = empty(total, WIDTH), empty(total, dtype=torch.int64), empty(ADAPTERS + 1, dtype=torch.int64)
    for name, tokens in (("decode", 1), ("prefill", 512)):
        x, y, adapter = (*(empty(SEQUENCES, tokens, n) for n in (CHANNELS, WIDTH)), empty(SEQUENCES, dtype=torch.int64))
        moves = bank[0].numel() + 2 * y.numel() + SEQUENCES * tokens * UNITS
        yield f"multi_adapter_linear, {name}", "multi_adapter_linear", (x, y, *bank, adapter, 1), moves

    yield "swap_", "swap_", (down, index, delta, 1), 4 * delta.numel()
    yield "scatter_add_, with replaced", "scatter_add_", (down, [index], [delta], 1, [1.0], [delta]), 4 * delta.numel()
    yield "permute_", "permute_", (down, empty(CHANNELS, dtype=torch.int64), 1), 2 * down.numel()


def main() -> None:
    print(f"s2ft {s2ft.__version__}, torch {torch.__version__}; bfloat16, {TOKENS} tokens, {WIDTH} x {CHANNELS}, "
          f"{UNITS} units; {ADAPTERS} adapters for {SEQUENCES} sequences of 1 or 512 tokens")  # fmt: skip
    print(f"{'op':<32}{'operators':>10}{'MB moved':>10}{'one pass':>10}{'ratio':>8}")
    for name, op, arguments, elements in cases():
        with Count(with_products=op == "multi_adapter_linear") as count, torch.no_grad():
            REFERENCES[op](*arguments)
        moved, least = count.bytes / 1e6, elements * 2 / 1e6
        ratio = moved / least if least else math.nan
        print(f"{name:<32}{count.operators:>10}{moved:>10.0f}{least:>10.0f}{ratio:>8.1f}")


if __name__ == "__main__":
    main()
