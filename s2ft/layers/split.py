"""How tensor parallelism has split a weight over the ranks of its group."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from s2ft.distributed import is_dtensor


@dataclass
class Split:
    """A weight [outputs, inputs] or bias [outputs] that is split over the ranks of a tensor-parallel group.

    Attributes:
        mesh: Device mesh of the group, with one dimension.
        dim: Dimension of the weight that is split.
        elements: The elements along it that each rank has, in the order of its part, a tensor [n] int64 for each rank.
    """

    mesh: Any
    dim: int
    elements: list[Tensor]

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return self.mesh.get_local_rank()

    @property
    def own_elements(self) -> Tensor:
        """The elements that this rank has."""
        return self.elements[self.rank]

    @cached_property
    def owners(self) -> Tensor:
        """The rank that has each element, [extent] int64."""
        owners = torch.empty(sum(part.numel() for part in self.elements), dtype=torch.int64)
        for rank, part in enumerate(self.elements):
            owners[part] = rank
        return owners

    @cached_property
    def _places(self) -> Tensor:
        """The place of each element in the part of its rank, [extent] int64."""
        places = torch.empty_like(self.owners)
        for part in self.elements:
            places[part] = torch.arange(part.numel())
        return places

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks of the group. Each of them must call this."""
        total = tensor.to(self.mesh.device_type, copy=True)
        dist.all_reduce(total, group=self.mesh.get_group())
        return total

    def local_places(self, elements: Tensor) -> tuple[Tensor, Tensor]:
        """Find elements in this rank's part.

        Args:
            elements: Elements of the whole dimension, [n] int64.

        Returns:
            Which of them the rank has, as positions in `elements` [m] int64, and their places in its part [m] int64.
        """
        mine = (self.owners[elements] == self.rank).nonzero().squeeze(1)
        return mine, self._places[elements[mine]]


def split_of(tensor: Tensor) -> Split | None:
    """Describe how tensor parallelism has split a DTensor.

    FSDP2 puts its own dimensions of a mesh first, so the last dimension of the mesh is that of tensor parallelism.

    Args:
        tensor: A weight or bias of a layer that tensor parallelism runs.

    Returns:
        The split; None for a plain tensor, and for one that every rank of the group has in full.
    """
    if not is_dtensor(tensor):
        return None
    mesh, placement = tensor.device_mesh, tensor.placements[-1]
    if mesh.ndim > 1:
        mesh = mesh[mesh.mesh_dim_names[-1]]
    if placement.is_replicate():
        return None
    dim = placement.dim % tensor.dim()
    parts = _parts(tensor.shape[dim], mesh.size(), getattr(placement, "split_factor", 1))
    return Split(mesh, dim, parts)


def _parts(size: int, ranks: int, groups: int) -> list[Tensor]:
    """The elements of each rank. A packed weight (gate and up in one) is split group by group."""
    pieces = [_chunks(group, ranks) for group in _chunks(torch.arange(size), groups)]
    return [torch.cat([piece[rank] for piece in pieces]) for rank in range(ranks)]


def _chunks(elements: Tensor, count: int) -> list[Tensor]:
    """Cut into equal chunks, rounded up. The last ones are shorter, or empty."""
    chunks = list(elements.chunk(count))
    return chunks + [elements[:0]] * (count - len(chunks))
