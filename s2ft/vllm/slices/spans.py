"""Which outputs and inputs of a linear layer a rank of tensor parallelism has.

The layers are those of vLLM, known by their attributes, so that stand-ins can be tested without vLLM.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Neighbouring outputs or inputs of a projection that this rank has.

    Attributes:
        first: The first of them in the projection.
        size: Their number.
        at: Where the first is in this rank's part of the layer.
    """

    first: int
    size: int
    at: int


@dataclass(frozen=True)
class Piece:
    """A projection that is fused in a layer, or the layer's only one.

    Attributes:
        size: Its outputs on all ranks.
        local: Its outputs on this rank.
        shard: Which part of the outputs this rank has, counted in parts of size `local`.
    """

    size: int
    local: int
    shard: int


def is_row_parallel(layer: Any) -> bool:
    """Whether a layer's inputs are divided among the ranks."""
    return hasattr(layer, "input_is_parallel")


def is_replicated(layer: Any) -> bool:
    """Whether every rank has the whole layer."""
    return not is_row_parallel(layer) and not hasattr(layer, "gather_output")


def pieces(layer: Any, rank: int) -> list[Piece]:
    """Describe the outputs of a layer.

    Args:
        layer: A linear layer of vLLM.
        rank: Rank of tensor parallelism.

    Returns:
        The fused projections in their order; one piece for a layer that is a single projection.
    """
    if is_row_parallel(layer):
        return [Piece(layer.output_size, layer.output_size, 0)]
    if is_replicated(layer):
        return [Piece(size, size, 0) for size in getattr(layer, "output_sizes", [layer.output_size])]
    if hasattr(layer, "num_kv_head_replicas"):
        keys, values = layer.head_size, getattr(layer, "v_head_size", layer.head_size)
        shard = rank // layer.num_kv_head_replicas  # a key head may be on several ranks
        return [
            Piece(layer.total_num_heads * keys, layer.num_heads * keys, rank),
            Piece(layer.total_num_kv_heads * keys, layer.num_kv_heads * keys, shard),
            Piece(layer.total_num_kv_heads * values, layer.num_kv_heads * values, shard),
        ]
    sizes = getattr(layer, "output_sizes", [layer.output_size])
    return [Piece(size, size // layer.tp_size, rank) for size in sizes]


def output_spans(layer: Any, rank: int, parts: int) -> list[list[Span]]:
    """Where the outputs of each projection are.

    Args:
        layer: A linear layer of vLLM.
        rank: Rank of tensor parallelism.
        parts: Number of projections that the checkpoint has for the layer: 1 if it has one weight for all.

    Returns:
        The spans of each projection.

    Raises:
        ValueError: The layer has another number of projections.
    """
    found, before, at = [], 0, 0
    for piece in pieces(layer, rank):
        first = piece.local * piece.shard + (before if parts == 1 else 0)
        found.append(Span(first, piece.local, at))
        before, at = before + piece.size, at + piece.local
    if parts == 1:
        return [found]
    if parts != len(found):
        raise ValueError(f"the layer consists of {len(found)} projections, and the adapter has {parts} for it")
    return [[span] for span in found]


def input_spans(layer: Any, rank: int) -> list[Span]:
    """Where the inputs of a layer are."""
    local = layer.input_size_per_partition if is_row_parallel(layer) else layer.input_size
    return [Span(local * rank if is_row_parallel(layer) else 0, local, 0)]


def extent(spans: Sequence[Span]) -> int:
    """Return the number of outputs or inputs on this rank."""
    return sum(span.size for span in spans)


def pick(index: Tensor, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """Find the units that this rank has.

    Args:
        index: The output or input of each unit in its projection, shape [n], int64.
        spans: What this rank has.

    Returns:
        Their positions in `index` [m], and where they are in this rank's part of the layer [m].
    """
    which, where = [], []
    for span in spans:
        mine = ((index >= span.first) & (index < span.first + span.size)).nonzero().squeeze(1)
        which.append(mine)
        where.append(index[mine] - span.first + span.at)
    return torch.cat(which), torch.cat(where)


def spread(values: Tensor, spans: Sequence[Span], width: int) -> Tensor:
    """Take from each row what this rank has, at the place where it is.

    Args:
        values: Rows over all outputs or inputs of a projection, shape [n, W].
        spans: What this rank has of it.
        width: Length of a row in this rank's part of the layer.

    Returns:
        Shape [n, width]. Outputs of other projections in the layer are zero.
    """
    if len(spans) == 1 and spans[0].size == width:
        return values[:, spans[0].first : spans[0].first + width]
    rows = values.new_zeros(values.shape[0], width)
    for span in spans:
        rows[:, span.at : span.at + span.size] = values[:, span.first : span.first + span.size]
    return rows
