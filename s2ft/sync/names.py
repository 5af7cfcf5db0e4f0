"""Where a slice of a model's weight lies in the tensors of its checkpoint.

transformers renames and converts weights when it loads and saves them: the experts of a mixture are one parameter in
the model and separate tensors in the files. An engine knows the tensors of the files. So the conversion is watched: the
coordinates of every number go through it in place of the numbers.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2ft.distributed import without_zero_init
from s2ft.export.streamed import saved_names
from s2ft.model.checkpoint import tied_names
from s2ft.model.conversion import Group, is_of_transformers, saving_groups


@dataclass(frozen=True)
class Piece:
    """The share of a slice that one tensor of the checkpoint holds.

    Attributes:
        name: Name of the tensor in the checkpoint.
        shape: Its shape.
        dim: Its dimension along which the slice is taken.
        index: Positions along `dim`, ascending, int64 [n].
        units: Which units of the slice these are, int64 [n]; None for all.
        across: Which positions of the slice's other dimension the tensor holds, int64; None for all.
        flipped: Whether the tensor has inputs first, where the slice has outputs first.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    index: Tensor
    units: Tensor | None = None
    across: Tensor | None = None
    flipped: bool = False

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return self.index.numel() * (self.shape[1 - self.dim] if self.across is None else self.across.numel())

    def of(self, values: Tensor, dim: int) -> Tensor:
        """Cut this share out of a slice.

        Args:
            values: The slice, [n, inputs] or [outputs, n], for a convolution with the taps as last dimension.
            dim: The slice's dimension of units.

        Returns:
            The numbers, in the shape of the tensor with n in place of `dim`.
        """
        if self.units is not None:
            values = values.index_select(dim, self.units.to(values.device))
        if self.across is not None:
            values = values.index_select(1 - dim, self.across.to(values.device))
        if self.flipped:
            values = values.transpose(0, 1)
        return values.reshape(*self.shape[: self.dim], self.index.numel(), *self.shape[self.dim + 1 :])


class CheckpointNames:
    """The tensors of a checkpoint, as `save_pretrained` writes them, by the weights of a model."""

    def __init__(self, model: nn.Module) -> None:
        """Find how the tensors are made from the weights.

        Args:
            model: The model, with trainable layers or without. A model that is not of transformers has a checkpoint
                with the names of its weights.

        Raises:
            ValueError: transformers can't say how it saves this model.
        """
        self._model: nn.Module | None = None
        self._groups: dict[str, Group] = {}
        self._saved: dict[str, str] = {}
        self._probed: dict[str, dict[str, list[Tensor]]] = {}
        if not is_of_transformers(model):
            return
        # A model of the same class without values. FSDP2 derives a class from the model's, which must not be built.
        own = next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))
        with without_zero_init(), torch.device("meta"):
            self._model = own(deepcopy(model.config))
        names = saved_names(self._model)
        for group in saving_groups(self._model, getattr(model, "_weight_conversions", None), names):
            self._groups.update({name: group for name, _ in group.sources})
        self._saved = {name: name for name in names}
        for tied in tied_names(self._model):
            kept = next((name for name in tied if name in self._saved), None)
            if kept is not None:
                self._saved.update(dict.fromkeys(tied, kept))

    def pieces(
        self,
        weight: str,
        shape: torch.Size,
        dim: int,
        index: Tensor,
        expert: int | None = None,
        transposed: bool = False,
    ) -> list[Piece]:
        """Find the tensors that hold a slice of a weight.

        Args:
            weight: Name of the weight in the model without trainable layers.
            shape: Shape of the weight as it is stored in the model.
            dim: 0 if the slice is of outputs, 1 if it is of inputs.
            index: Positions of the units, ascending, int64 [n].
            expert: Number of the expert, for a weight of several experts.
            transposed: Whether the weight has inputs before outputs.

        Returns:
            The shares of the tensors. Together they hold each number of the slice once.

        Raises:
            ValueError: The checkpoint does not hold the weight, or in a form in which slices have no place.
        """
        group = self._group(weight, shape)
        flat = int(expert is not None)
        units, across = (flat + (1 - one if transposed else one) for one in (dim, 1 - dim))
        if group is None or group.transform is None:
            if expert is not None:
                raise ValueError(
                    f"{weight}: its checkpoint has the experts in one tensor, of which slices can't be sent: train "
                    "other projections, or send the merged weights"
                )
            return [Piece(weight if group is None else group.name, tuple(shape), units, index, flipped=transposed)]
        found = []
        for name, maps in self._maps(weight, shape, group).items():
            piece = _piece(name, maps, (units, across), dim, index, expert)
            found += [] if piece is None else [piece]
        held, numbers = sum(piece.count for piece in found), index.numel() * shape[across]
        if held != numbers:
            raise ValueError(
                f"{weight}: its checkpoint holds {held} of the {numbers} trained numbers in tensors in which slices "
                "have a place: train other projections, or send the merged weights"
            )
        return found

    def whole(self, weight: str, value: Tensor) -> dict[str, Tensor]:
        """Return the tensors of the checkpoint that are made from a whole weight.

        Args:
            weight: Name of the weight in the model.
            value: Its values.

        Raises:
            ValueError: They are made from other weights too.
        """
        group = self._group(weight, value.shape)
        if group is None:
            return {weight: value}
        if len(group.sources) > 1:
            raise ValueError(
                f"{weight} is trained in full, and its checkpoint holds it in one tensor with "
                f"{next(name for name, _ in group.sources if name != weight)}: freeze it, or send the merged weights"
            )
        return group.convert(self._model, lambda name: value)

    def _group(self, weight: str, shape: torch.Size) -> Group | None:
        if self._model is None:
            return None
        name = self._saved.get(weight)
        if name is None:
            raise ValueError(f"{weight} is trained, and it is not in the checkpoints of {type(self._model).__name__}")
        expected = self._model.state_dict(keep_vars=True)[name].shape
        if expected != shape:
            raise ValueError(f"{weight} is {tuple(shape)} in the model, and {tuple(expected)} by its config")
        return self._groups[name]

    def _maps(self, weight: str, shape: torch.Size, group: Group) -> dict[str, list[Tensor]]:
        """For each made tensor, the coordinates in the weight of its numbers, along each dimension of the weight."""
        if weight not in self._probed:
            state = self._model.state_dict(keep_vars=True)
            shapes = {name: state[name].shape for name, _ in group.sources}
            passes = [
                group.convert(self._model, lambda name, axis=axis: _coordinates(shapes[name], axis, name == weight))
                for axis in range(len(shape))
            ]
            self._probed[weight] = {name: [one[name] for one in passes] for name in passes[0]}
        return self._probed[weight]


def _coordinates(shape: torch.Size, axis: int, is_asked: bool) -> Tensor:
    """The coordinate of each number along an axis, without memory; -1 for a weight that is not asked about."""
    line = torch.arange(shape[axis], dtype=torch.int32) if is_asked else torch.full((shape[axis],), -1).int()
    return line.view([-1 if one == axis else 1 for one in range(len(shape))]).expand(shape)


def _piece(
    name: str, maps: list[Tensor], axes: tuple[int, int], dim: int, index: Tensor, expert: int | None
) -> Piece | None:
    """The share of one made tensor; None if it holds nothing of the slice.

    Args:
        name: Name of the tensor.
        maps: Coordinates of its numbers, along each dimension of the weight.
        axes: The weight's dimension of units, and the other one.
        dim: The slice's dimension of units, of outputs × inputs.
        index: Positions of the units.
        expert: Number of the expert, which is the first coordinate; None for a weight without experts.
    """
    refusal = ValueError(
        f"{name}: the checkpoint holds this weight in a form in which slices have no place: train other projections, "
        "or send the merged weights"
    )
    if maps[0].dtype != torch.int32 or maps[0].dim() != 2:
        raise refusal
    if expert is not None:
        number = int(maps[0].flatten()[0])
        if any(maps[0].stride()) and bool((maps[0] != number).any()):
            raise refusal
        if number != expert:
            return None
    line, place = _line(maps[axes[0]])
    if line is None:
        raise refusal
    found = torch.isin(line, index).nonzero().squeeze(1)
    if not found.numel():
        return None
    other, other_dim = _line(maps[axes[1]].index_select(place, found))
    if other is None or other_dim == place:
        raise refusal
    chosen = torch.searchsorted(index, line[found])
    is_all = torch.equal(chosen, torch.arange(index.numel()))
    is_straight = torch.equal(other, torch.arange(other.numel()))
    some, part = None if is_all else chosen, None if is_straight else other
    return Piece(name, tuple(maps[0].shape), place, found, some, part, flipped=place != dim)


def _line(values: Tensor) -> tuple[Tensor | None, int]:
    """The coordinates along the one dimension of a matrix along which they differ, and the dimension.

    None if they differ along both or are the same everywhere.
    """
    for dim in (0, 1):
        line = values.select(1 - dim, 0)
        if values.shape[dim] == 1 or bool((line == line[0]).all()):
            continue
        if values.stride(1 - dim) == 0 or bool((values == line.unsqueeze(1 - dim)).all()):
            return line.long(), dim
        return None, dim
    return None, 0
