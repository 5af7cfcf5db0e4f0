"""The trained slices of a model, as an engine needs them: names of the checkpoint, absolute numbers, one buffer."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from s2ft.distributed import own_class, without_zero_init
from s2ft.export.streamed import saved_names
from s2ft.model.checkpoint import Group, conversions_of, is_of_transformers, saving_groups, tied_names
from s2ft.sync.trained import AttachedSource, PeftSource, source_of
from s2ft.sync.wire import DTYPES, SliceSpec, hashes_of


@dataclass(frozen=True)
class Piece:
    """The share of a slice that one tensor of the checkpoint holds.

    Attributes:
        name: Name of the tensor in the checkpoint.
        shape: Its shape.
        dim: Its dimension along which the slice is taken.
        index: Positions along `dim`, ascending, int64 [n].
        units: Which units of the slice these are, int64 [n].
        across: Which positions of the slice's other dimension the tensor holds, int64.
        flipped: Whether the tensor has inputs first, where the slice has outputs first.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    index: Tensor
    units: Tensor
    across: Tensor
    flipped: bool

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return self.index.numel() * self.across.numel()

    def of(self, values: Tensor, dim: int) -> Tensor:
        """Cut this share out of a slice.

        Args:
            values: The slice, [n, inputs] or [outputs, n], for a convolution with the taps as last dimension.
            dim: The slice's dimension of units.

        Returns:
            The numbers, in the shape of the tensor with n in place of `dim`.
        """
        units, across = self.units.to(values.device), self.across.to(values.device)
        values = values.index_select(dim, units).index_select(1 - dim, across)
        values = values.transpose(0, 1) if self.flipped else values
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
        # A model of the same class without values
        with without_zero_init(), torch.device("meta"):
            self._model = own_class(model)(deepcopy(model.config))
        names = saved_names(self._model)
        for group in saving_groups(self._model, conversions_of(model), names):
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
        units, across = (int(expert is not None) + (1 - one if transposed else one) for one in (dim, 1 - dim))
        if group is None or group.transform is None:
            if expert is not None:
                raise ValueError(
                    f"{weight}: its checkpoint has the experts in one tensor, of which slices can't be sent: train "
                    "other projections, or send the merged weights"
                )
            every = torch.arange(index.numel()), torch.arange(shape[across])
            return [Piece(weight if group is None else group.name, tuple(shape), units, index, *every, transposed)]
        pieces = (_piece(name, maps, (units, across), dim, index, expert)
                  for name, maps in self._maps(weight, shape, group).items())  # fmt: skip
        found = [piece for piece in pieces if piece is not None]
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
    return Piece(name, tuple(maps[0].shape), place, found, chosen, other, flipped=place != dim)


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


class TrainedSlices:
    """What a model trains, as slices of the tensors of its checkpoint. :meth:`of` makes it.

    Args:
        source: What the model trains.
        names: The tensors of its checkpoint.
        dtype: The dtype in which numbers are sent.

    Attributes:
        specs: The slices, in the order in which their numbers are sent.
        dtype: The dtype in which they are sent.

    Example:
        >>> from s2ft.sync import TrainedSlices
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> slices = TrainedSlices.of(model)
        >>> slices.buffer().shape, slices.numel
        (torch.Size([1664]), 1664)
    """

    def __init__(self, source: AttachedSource | PeftSource, names: CheckpointNames, dtype: torch.dtype) -> None:
        self._source, self._names = source, names
        self.dtype = dtype
        self.specs: list[SliceSpec] = []
        # What makes the numbers of each spec of those of everything that is trained
        self._makers: list[Callable[[Sequence[Tensor]], Tensor]] = []
        shares: dict[str, list[tuple[int, Piece]]] = {}
        for number, one in enumerate(source.trained):
            if one.dim is None:
                continue
            for piece in names.pieces(one.weight, one.shape, one.dim, one.index, one.expert, one.transposed):
                others = shares.setdefault(piece.name, [])
                if others and others[0][1].dim != piece.dim:
                    raise ValueError(
                        f"{piece.name}: slices of both dimensions are trained, and one of them can be sent"
                    )
                others.append((number, piece))
        for name, found in shares.items():
            index, order = torch.cat([piece.index for _, piece in found]).sort()
            if (index.diff() == 0).any():
                raise ValueError(f"{name}: a unit is trained by two slices, and an engine can hold one of them")
            dim, some = found[0][1].dim, None if bool((order.diff() == 1).all()) else order
            self._add(name, found[0][1].shape, dim, index, partial(self._joined, found, dim, some))
        for number, one in enumerate(source.trained):
            if one.dim is None:
                if not one.base.dim():
                    raise ValueError(f"{one.weight} is a single number that is trained, which can't be sent: freeze it")
                for name, value in names.whole(one.weight, one.base).items():
                    index, make = torch.arange(value.shape[0]), partial(self._whole, number, name)
                    self._add(name, tuple(value.shape), 0, index, make)

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype | None = None) -> "TrainedSlices":
        """Describe the trained slices of a model, and keep the base's numbers of them.

        Every rank of a sharded model must call this. Weights that are spread over ranks are gathered one at a time.

        Args:
            model: An attached model, or a PeftModel with an adapter of s2ft.
            dtype: The engine's dtype: float32, bfloat16 or float16. Default: that of the trained weights.

        Returns:
            The slices. Weights that are trained in full (a new head, an unfrozen norm) are slices with all positions.

        Raises:
            ValueError: The base is quantized, no adapter is trained, or something is trained that can't be sent.

        Example:
            >>> from s2ft.sync import TrainedSlices
            >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
            >>> slices = TrainedSlices.of(model, torch.bfloat16)
            >>> slices.specs[0].name, slices.specs[0].dim, slices.nbytes
            ('model.layers.0.mlp.down_proj.weight', 1, 3328)
        """
        source = source_of(model)
        dtype = source.trained[0].base.dtype if dtype is None else dtype
        if dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
        plain = source.model.get_base_model() if isinstance(source, PeftSource) else source.model
        return cls(source, CheckpointNames(plain), dtype)

    @property
    def numel(self) -> int:
        """How many numbers are sent at a time."""
        return sum(spec.numel for spec in self.specs)

    @property
    def nbytes(self) -> int:
        """Size of the numbers that are sent at a time."""
        return self.numel * self.dtype.itemsize

    @torch.no_grad()
    def buffer(self) -> Tensor:
        """Make the numbers to send: those that merging would write now, rounded to `dtype`.

        Every rank of a sharded model must call this.

        Returns:
            All numbers in the order of `specs`, [numel], on the device of the model.

        Raises:
            RuntimeError: The model trains other parameters than it did when this object was made.
            ValueError: The adapter is not active.
        """
        values = list(self._source.values())
        flat = torch.empty(self.numel, dtype=self.dtype, device=self._source.trained[0].base.device)
        for spec, make, place in zip(self.specs, self._makers, flat.split([spec.numel for spec in self.specs])):
            place.view(spec.values_shape).copy_(make(values))
        return flat

    # ---- making the specs ----------------------------------------------------------------------------

    def _add(self, name: str, shape: tuple, dim: int, index: Tensor, make: Callable[..., Tensor]) -> None:
        base = make([one.base for one in self._source.trained]).to(self.dtype)
        self.specs.append(SliceSpec(name, shape, dim, index, hashes_of(base, dim).cpu()))
        self._makers.append(make)

    def _joined(
        self, shares: list[tuple[int, Piece]], dim: int, order: Tensor | None, values: Sequence[Tensor]
    ) -> Tensor:
        """The numbers of shares of slices, each with the number of its slice, joined and put into an order."""
        found = [piece.of(values[number], self._source.trained[number].dim) for number, piece in shares]
        joint = found[0] if len(found) == 1 else torch.cat([one.to(found[0].device) for one in found], dim)
        return joint if order is None else joint.index_select(dim, order.to(joint.device))

    def _whole(self, number: int, name: str, values: Sequence[Tensor]) -> Tensor:
        """The numbers of a tensor that is made from a weight in full."""
        return self._names.whole(self._source.trained[number].weight, values[number])[name]
