"""The trained slices of a model, as an engine needs them: names of the checkpoint, absolute numbers, one buffer."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2ft.sync.names import CheckpointNames, Piece
from s2ft.sync.sources import AttachedSource, PeftSource, Trained, source_of
from s2ft.sync.wire import DTYPES, SliceSpec, hashes_of


@dataclass(frozen=True)
class _Entry:
    """How the numbers of one spec are made.

    Attributes:
        shares: Shares of slices, each with the number of its slice; empty for a weight in full.
        order: Order of the joined shares' units, int64 [n]; None if they are in order.
        whole: Number of the weight in full, and the name of the tensor that is made from it.
    """

    shares: tuple[tuple[int, Piece], ...] = ()
    order: Tensor | None = None
    whole: tuple[int, str] | None = None


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
        self._entries: list[_Entry] = []
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
            self._add_slice(name, found)
        for number, one in enumerate(source.trained):
            if one.dim is None:
                self._add_whole(number, one)

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
        for spec, entry, place in zip(self.specs, self._entries, flat.split([spec.numel for spec in self.specs])):
            place.view(spec.values_shape).copy_(self._numbers(entry, spec.dim, values))
        return flat

    # ---- making the specs ----------------------------------------------------------------------------

    def _add_slice(self, name: str, shares: list[tuple[int, Piece]]) -> None:
        first = shares[0][1]
        index, order = torch.cat([piece.index for _, piece in shares]).sort()
        if (index.diff() == 0).any():
            raise ValueError(f"{name}: a unit is trained by two slices, and an engine can hold one of them")
        entry = _Entry(tuple(shares), None if bool((order.diff() == 1).all()) else order)
        self._add(name, first.shape, first.dim, index, entry, [one.base for one in self._source.trained])

    def _add_whole(self, number: int, one: Trained) -> None:
        if not one.base.dim():
            raise ValueError(f"{one.weight} is a single number that is trained, which can't be sent: freeze it")
        for name, value in self._names.whole(one.weight, one.base).items():
            index = torch.arange(value.shape[0])
            bases = {number: one.base}
            self._add(name, tuple(value.shape), 0, index, _Entry(whole=(number, name)), bases)

    def _add(self, name: str, shape: tuple, dim: int, index: Tensor, entry: _Entry, bases) -> None:
        base = self._numbers(entry, dim, bases).to(self.dtype)
        self.specs.append(SliceSpec(name, shape, dim, index, hashes_of(base, dim).cpu()))
        self._entries.append(entry)

    def _numbers(self, entry: _Entry, dim: int, values) -> Tensor:
        """The numbers of a spec from those of all slices and weights in full, in the shape of the spec's values."""
        trained = self._source.trained
        if entry.whole is not None:
            number, name = entry.whole
            return self._names.whole(trained[number].weight, values[number])[name]
        found = [piece.of(values[number], trained[number].dim) for number, piece in entry.shares]
        joint = found[0] if len(found) == 1 else torch.cat([one.to(found[0].device) for one in found], dim)
        return joint if entry.order is None else joint.index_select(dim, entry.order.to(joint.device))
