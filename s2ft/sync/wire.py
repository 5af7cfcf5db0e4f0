"""What a trainer says to an engine: which slices it will send, of which base, and in which order.

The description is sent once a run, as JSON values. Each update is one buffer: the numbers of all slices, one slice
after the other, each row by row in the shape of its values.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INTEGERS = {2: torch.int16, 4: torch.int32}  # of the same size, by bytes


@dataclass(frozen=True)
class SliceSpec:
    """A slice of one weight of a checkpoint.

    Attributes:
        name: Name of the weight in the checkpoint, for example ``model.layers.0.mlp.down_proj.weight``.
        shape: Shape of the whole weight in the checkpoint.
        dim: The dimension along which the slice is taken.
        index: Ascending positions along `dim`, int64 [n].
        hashes: One hash for each position of the base's numbers in the engine's dtype, int64 [n], see
            :func:`hashes_of`.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    index: Tensor
    hashes: Tensor

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the slice's values: that of the weight with n in place of `dim`."""
        return (*self.shape[: self.dim], self.index.numel(), *self.shape[self.dim + 1 :])

    @property
    def numel(self) -> int:
        """How many numbers the slice has."""
        return int(np.prod(self.values_shape))


def name_of(dtype: torch.dtype | None) -> str:
    """The name of a dtype in messages, as in :data:`DTYPES`."""
    return str(dtype).removeprefix("torch.")


def hashes_of(values: Tensor, dim: int, weights: Tensor | None = None) -> Tensor:
    """Hash the bits of each row (dim 0) or column (dim 1) of a matrix; of a vector, each number.

    The hash is a sum modulo 2**64 of bits × a factor that depends on the position. So the hashes of two parts of a row
    add up to the hash of the row.

    Args:
        values: Numbers of a slice, in the dtype in which they are sent; [n], [n, width] or [width, n].
        dim: The dimension of the slice's positions.
        weights: The factors of the numbers of a part, see :func:`factors`. Default: those of whole rows or columns.

    Returns:
        int64 [n].
    """
    bits = values.detach().contiguous().view(_INTEGERS[values.element_size()]).to(torch.int64)
    bits = bits.movedim(dim, 0).reshape(bits.shape[dim], -1)
    weights = factors(bits.shape[1]) if weights is None else weights.reshape(-1)
    return (bits * weights.to(bits.device)).sum(1)


def factors(count: int) -> Tensor:
    """An odd number for each position, which looks random (the finalizer of splitmix64), int64 [count]."""
    with np.errstate(over="ignore"):
        mixed = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(mixed.view(np.int64))


def to_message(specs: Sequence[SliceSpec]) -> dict[str, Any]:
    """Describe slices as JSON values."""
    return {
        "names": [spec.name for spec in specs],
        "shapes": [list(spec.shape) for spec in specs],
        "dims": [spec.dim for spec in specs],
        "counts": [spec.index.numel() for spec in specs],
        "index": _encoded([spec.index.to(torch.int32) for spec in specs]),
        "hashes": _encoded([spec.hashes for spec in specs]),
    }


def from_message(message: Mapping[str, Any]) -> list[SliceSpec]:
    """Read a description that :func:`to_message` wrote.

    Raises:
        ValueError: There are no slices, the lists have different lengths, a shape, a dim or a position is not valid,
            or a text is no base64.
    """
    fields = [message[name] for name in ("names", "shapes", "dims", "counts")]
    if len({len(field) for field in fields}) != 1:
        raise ValueError(f"the description of the slices has lists of lengths {[len(field) for field in fields]}")
    counts = message["counts"]
    if not counts:
        raise ValueError("slices describes none")
    index = _decoded(message["index"], np.int32, sum(counts)).to(torch.int64).split(counts)
    hashes = _decoded(message["hashes"], np.int64, sum(counts)).split(counts)
    specs = [
        SliceSpec(name, tuple(shape), dim, i, h)
        for name, shape, dim, i, h in zip(message["names"], message["shapes"], message["dims"], index, hashes)
    ]
    for spec in specs:
        if spec.dim not in range(len(spec.shape)):
            raise ValueError(f"{spec.name}: dim {spec.dim} is not one of shape {spec.shape}")
        index, most = spec.index, spec.shape[spec.dim] - 1
        if not index.numel() or int(index[0]) < 0 or int(index[-1]) > most or bool((index.diff() <= 0).any()):
            raise ValueError(f"{spec.name}: the positions must ascend within 0..{most}, at least one")
    return specs


def _encoded(tensors: Sequence[Tensor]) -> str:
    return base64.b64encode(torch.cat(list(tensors)).cpu().numpy().tobytes()).decode()


def _decoded(text: str, dtype: Any, count: int) -> Tensor:
    raw = base64.b64decode(text, validate=True)
    if len(raw) != count * np.dtype(dtype).itemsize:
        raise ValueError(f"the description of the slices has {len(raw)} bytes in a list of {count} numbers")
    return torch.from_numpy(np.frombuffer(raw, dtype=dtype).copy())
