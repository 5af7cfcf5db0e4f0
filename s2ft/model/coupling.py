"""What a coupled structure is (S²FT paper, section 3.2).

The units of a coupling go from its producers to its consumer: unit i of a producer's outputs is unit i of the
consumer's inputs. So both sides can be put in a new order together, and the model still computes the same.

A linear layer that shares its units with no other layer is a one-sided coupling: one projection, trained in place.
The end of the file has what goes by the names of projections.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from s2ft.config import PROJECTIONS, check_whole, refuse
from s2ft.files.plain_text import MAX_NAME, shortened

ONE_SIDED = "li"  # l: a layer in no coupling of several layers; i: the inputs of any layer, see i_ratio
SIDES = ("outputs", "inputs")  # names of a weight's dim 0 and 1


@dataclass(frozen=True)
class Projection:
    """One side of a coupling: `count` units of `unit` elements each, along one dimension of a weight.

    The weight counts as outputs × inputs, however it is stored. Often the units fill the dimension. If the weight
    contains other projections too (queries, keys and values in one weight), `size`, `start` and `stride` describe where
    the units are.

    Attributes:
        key: One of s2ft.config.PROJECTIONS.
        path: Path of the layer in the model; for experts, of the parameter with the weights of all of them.
        count: Number of units.
        unit: Elements of one unit.
        dim: Dimension of the weight: 0 (outputs) for producers, 1 (inputs) for the consumer, either for key "l", 1 for
            key "i".
        start: First element of the first unit.
        stride: Elements from the start of one unit to the start of the next; default: `unit`.
        size: All elements of the dimension, if there are more than those of the units.
        expert: Number of the expert.
        transposed: For an expert, whether the parameter is [experts, inputs, outputs], not [experts, outputs, inputs].
    """

    key: str
    path: str
    count: int
    unit: int
    dim: int
    start: int = 0
    stride: int | None = None
    size: int | None = None
    expert: int | None = None
    transposed: bool = False

    @cached_property
    def name(self) -> str:
        """The name in selections and adapters: the path, then [expert], then the key if the path may mean others."""
        return (
            self.path
            + ("" if self.expert is None else f"[{self.expert}]")
            + ("" if self.size is None and self.key != "i" else f".{self.key}")
        )

    @property
    def weight_key(self) -> tuple[str, int | None]:
        """Path and expert of the weight. Several projections may share one weight."""
        return self.path, self.expert

    @property
    def extent(self) -> int:
        """All elements of the dimension."""
        return self.count * self.unit if self.size is None else self.size

    def elements(self, units: Tensor) -> Tensor:
        """Return the elements [n * unit] int64 along `dim` of units [n]."""
        first = self.start + units * (self.unit if self.stride is None else self.stride)
        return (first[:, None] + torch.arange(self.unit, device="cpu")).reshape(-1)


def in_one_weight(
    path: str,
    parts: Sequence[tuple[str, int, int]],
    in_turn: bool = False,
    expert: int | None = None,
    transposed: bool = False,
) -> tuple[Projection, ...]:
    """Describe producers that fill one weight together, in their order.

    Args:
        path: Path of the weight's layer.
        parts: Key, number of units and elements of a unit, of each producer.
        in_turn: Whether the first units of all come first, then the second ones, and so on. Default: all units of one
            producer, then those of the next one.
        expert: As in :class:`Projection`.
        transposed: As in :class:`Projection`.
    """
    widths = [unit if in_turn else count * unit for _, count, unit in parts]
    size = sum(count * unit for _, count, unit in parts)
    where: dict[str, Any] = {"stride": sum(widths) if in_turn else None, "size": size} if len(parts) > 1 else {}
    return tuple(
        Projection(key, path, count, unit, 0, start, expert=expert, transposed=transposed, **where)
        for (key, count, unit), start in zip(parts, accumulate(widths, initial=0))
    )


@dataclass(frozen=True)
class Vector:
    """A parameter or buffer whose first dimension is reordered together with the producers' outputs.

    For instance the weight of a norm over all heads (unit head_dim), or of one norm per head, [heads, head_dim]
    (unit 1).

    Attributes:
        path: Path of the tensor in the model.
        unit: Entries of the first dimension that belong to one unit.
        expert: Number of the expert, for a tensor of all experts, [experts, entries]; `unit`, `start` and `size` are
            about its entries then.
        start: First entry of the first unit.
        size: All entries of the first dimension, if there are more than those of the units.
    """

    path: str
    unit: int
    expert: int | None = None
    start: int = 0
    size: int | None = None


@dataclass(frozen=True)
class Coupling:
    """The producers and the consumer of one coupled structure in a layer (S²FT paper, section 3.2).

    Use :meth:`ffn`, :meth:`gated_ffn`, :meth:`attention` and the other class methods to make one. A layer that shares
    its units with no other layer is a one-sided coupling, see :meth:`one_sided`: it has one producer and no consumer,
    or a consumer and no producers.

    Attributes:
        kind: "ffn", "attention", "cross-attention", "experts", "shared-expert" or "linear", or a word of your own.
        layer: Number of the layer. Layers are counted through the whole model: first those of the encoder, then those
            of the decoder; first those of the text tower, then those of the vision tower.
        producers: The projections whose outputs are the units. Empty if a one-sided coupling trains inputs.
        consumer: The projection whose inputs are the units. None if a one-sided coupling trains outputs.
        vectors: Tensors that are reordered with the producers' outputs, besides their biases.
        fixed: Whether something outside refers to units by number, so that none can move.
        block: Path of the module around a gated FFN of a known family.
        activation: Activation for :func:`s2ft.ops.act_mul`, if that module is ``consumer(activation(gate) * up)``.

    Example:
        >>> mlp = "model.layers.0.mlp"
        >>> coupling = s2ft.Coupling.gated_ffn(
        ...     0, up=f"{mlp}.up_proj", gate=f"{mlp}.gate_proj", down=f"{mlp}.down_proj", channels=128
        ... )
        >>> s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.25), couplings=[coupling]).trainable
        2048
    """

    kind: str
    layer: int
    producers: tuple[Projection, ...]
    consumer: Projection | None
    vectors: tuple[Vector, ...] = ()
    fixed: bool = False
    block: str | None = None
    activation: str | None = None

    @classmethod
    def ffn(cls, layer: int, *, up: str, down: str, channels: int, kind: str = "ffn") -> "Coupling":
        """Describe a feed-forward block of two layers with an elementwise activation between them.

        Args:
            layer: Number of the layer.
            up: Path of the first layer in the model. Its outputs are the channels.
            down: Path of the second layer. Its inputs are the channels.
            channels: Number of channels.
            kind: Word for this coupling in reports.

        Returns:
            The coupling of `up` and `down` by their channels (S²FT paper, section 3.2).

        Example:
            >>> net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
            >>> coupling = s2ft.Coupling.ffn(0, up="0", down="2", channels=32)
            >>> config = s2ft.S2FTConfig(d_ratio=0.25)
            >>> s2ft.attach(net, config, couplings=[coupling], example=torch.randn(4, 8)).trainable
            64
        """
        return cls(kind, layer, (Projection("u", up, channels, 1, 0),), Projection("d", down, channels, 1, 1))

    @classmethod
    def gated_ffn(cls, layer: int, *, up: str, gate: str, down: str, channels: int, kind: str = "ffn") -> "Coupling":
        """Describe a gated feed-forward block: ``down(activation(gate(x)) * up(x))``.

        Args:
            layer: Number of the layer.
            up: Path of the layer without the activation.
            gate: Path of the layer whose output goes through the activation.
            down: Path of the last layer. Its inputs are the channels.
            channels: Number of channels.
            kind: Word for this coupling in reports.

        Returns:
            The coupling of `up`, `gate` and `down` by their channels (S²FT paper, section 3.2).

        Example:
            >>> mlp = "model.layers.0.mlp"
            >>> coupling = s2ft.Coupling.gated_ffn(
            ...     0, up=f"{mlp}.up_proj", gate=f"{mlp}.gate_proj", down=f"{mlp}.down_proj", channels=128
            ... )
            >>> print(coupling)
            the ffn coupling of layer 0 (model.layers.0.mlp.up_proj, ... to model.layers.0.mlp.down_proj)
        """
        producers = (Projection("u", up, channels, 1, 0), Projection("g", gate, channels, 1, 0))
        return cls(kind, layer, producers, Projection("d", down, channels, 1, 1))

    @classmethod
    def packed_gated_ffn(cls, layer: int, *, gate_up: str, down: str, channels: int, kind: str = "ffn") -> "Coupling":
        """Describe a gated feed-forward block with gate and up in one weight.

        Args:
            layer: Number of the layer.
            gate_up: Path of the layer with 2 * channels outputs, those of gate first.
            down: Path of the last layer. Its inputs are the channels.
            channels: Number of channels.
            kind: Word for this coupling in reports.

        Returns:
            The coupling of up, gate and `down` by their channels.

        Example:
            >>> mlp = "model.layers.0.mlp"
            >>> coupling = s2ft.Coupling.packed_gated_ffn(
            ...     0, gate_up=f"{mlp}.gate_up_proj", down=f"{mlp}.down_proj", channels=128
            ... )
            >>> [projection.name for projection in coupling.producers]
            ['model.layers.0.mlp.gate_up_proj.u', 'model.layers.0.mlp.gate_up_proj.g']
        """
        gate, up = in_one_weight(gate_up, [("g", channels, 1), ("u", channels, 1)])
        return cls(kind, layer, (up, gate), Projection("d", down, channels, 1, 1))

    @classmethod
    def experts(
        cls,
        layer: int,
        *,
        down: str,
        channels: int,
        experts: int,
        gate_up: str | None = None,
        up: str | None = None,
        transposed: bool = False,
        interleaved: bool = False,
        bias: str | None = None,
        kind: str = "experts",
    ) -> list["Coupling"]:
        """Describe the experts of a mixture whose weights are parameters [experts, outputs, inputs].

        Args:
            layer: Number of the layer.
            down: Path of the parameter whose inputs are the channels.
            channels: Number of channels of each expert.
            experts: Number of experts.
            gate_up: Path of the parameter with 2 * channels outputs for each expert, those of gate first.
            up: Path of the parameter whose outputs are the channels, instead of `gate_up`: experts without a gate.
            transposed: Whether the parameters are [experts, inputs, outputs].
            interleaved: Whether the outputs of `gate_up` are gate and up of each channel in turn.
            bias: Path of the parameter [experts, outputs] with the biases of `gate_up` or `up`. They are reordered with
                the channels, and stay frozen.
            kind: Word for these couplings in reports.

        Returns:
            One coupling for each expert.

        Raises:
            TypeError: Neither or both of `gate_up` and `up` are given.

        Example:
            >>> couplings = s2ft.Coupling.experts(
            ...     0, gate_up="experts.gate_up_proj", down="experts.down_proj", channels=128, experts=8
            ... )
            >>> len(couplings), couplings[3].consumer.name
            (8, 'experts.down_proj[3]')
        """
        if (gate_up is None) == (up is None):
            raise TypeError(f"experts needs gate_up or up, and not both, got gate_up={gate_up!r} and up={up!r}")
        parts = [(key, channels, 1) for key in ("gu" if up is None else "u")]

        def coupling(expert: int) -> "Coupling":
            producers = in_one_weight(cast(str, gate_up or up), parts, interleaved, expert, transposed)[::-1]
            vectors: tuple[Vector, ...] = ()
            if bias is not None and interleaved and up is None:
                vectors = (Vector(bias, 2, expert),)
            elif bias is not None:
                vectors = tuple(Vector(bias, 1, expert, one.start, one.size) for one in producers)
            consumer = Projection("d", down, channels, 1, 1, expert=expert, transposed=transposed)
            return cls(kind, layer, producers, consumer, vectors)

        return [coupling(expert) for expert in range(experts)]

    @classmethod
    def attention(
        cls,
        layer: int,
        *,
        q: str,
        k: str,
        v: str,
        o: str,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        moving: Mapping[str, int] | None = None,
        fixed: bool = False,
        kind: str = "attention",
    ) -> "Coupling":
        """Describe an attention block with separate q, k and v.

        Args:
            layer: Number of the layer.
            q: Path of the query projection.
            k: Path of the key projection.
            v: Path of the value projection.
            o: Path of the output projection. Its inputs are the heads.
            heads: Number of query heads.
            head_dim: Size of a head.
            kv_heads: Number of key/value heads; default: `heads`.
            moving: Parameters and buffers that are reordered together with the heads, for instance the weight of a norm
                over all heads: path in the model, and how many entries of its first dimension belong to one head.
                Biases of `q`, `k` and `v` are found without it.
            fixed: Whether something outside refers to heads by number, so that they can't move.
            kind: Word for this coupling in reports.

        Returns:
            The coupling of `q`, `k`, `v` and `o` by their heads (S²FT paper, section 3.2).

        Example:
            >>> block = "model.layers.0.self_attn"
            >>> paths = {name: f"{block}.{name}_proj" for name in "qkvo"}
            >>> coupling = s2ft.Coupling.attention(0, **paths, heads=4, head_dim=16, kv_heads=2)
            >>> s2ft.attach(model, s2ft.S2FTConfig(o_ratio=0.25), couplings=[coupling]).trainable
            1024
        """
        counts = (heads, kv_heads or heads, kv_heads or heads)
        producers = tuple(Projection(key, path, n, head_dim, 0) for key, path, n in zip("qkv", (q, k, v), counts))
        vectors = tuple(Vector(path, unit) for path, unit in (moving or {}).items())
        return cls(kind, layer, producers, Projection("o", o, heads, head_dim, 1), vectors, fixed)

    @classmethod
    def packed_attention(
        cls,
        layer: int,
        *,
        qkv: str,
        o: str,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        interleaved: bool = False,
        kind: str = "attention",
    ) -> "Coupling":
        """Describe an attention block with q, k and v in one weight.

        Args:
            layer: Number of the layer.
            qkv: Path of the layer with all of q, k and v.
            o: Path of the output projection. Its inputs are the heads.
            heads: Number of query heads.
            head_dim: Size of a head.
            kv_heads: Number of key/value heads; default: `heads`.
            interleaved: Whether the outputs of `qkv` are q, k, v of each head in turn; default: all of q, then all of
                k, then all of v.
            kind: Word for this coupling in reports.

        Returns:
            The coupling of q, k, v and `o` by their heads.

        Example:
            >>> coupling = s2ft.Coupling.packed_attention(0, qkv="h.0.qkv", o="h.0.out", heads=4, head_dim=16)
            >>> [projection.name for projection in coupling.projections]
            ['h.0.qkv.q', 'h.0.qkv.k', 'h.0.qkv.v', 'h.0.out']
        """
        counts = (heads, kv_heads or heads, kv_heads or heads)
        producers = in_one_weight(qkv, [(key, n, head_dim) for key, n in zip("qkv", counts)], interleaved)
        return cls(kind, layer, producers, Projection("o", o, heads, head_dim, 1))

    @classmethod
    def one_sided(
        cls,
        layer: int,
        *,
        path: str,
        count: int,
        unit: int = 1,
        side: str = "inputs",
        kind: str = "linear",
        expert: int | None = None,
    ) -> "Coupling":
        """Describe a linear layer that shares its units with no other layer. ``l_ratio`` sets how much is trained.

        Nothing of it is ever moved: the units are trained in place in both layouts.

        Args:
            layer: Number of the layer.
            path: Path of the layer in the model.
            count: Number of units.
            unit: Inputs or outputs of one unit. The units fill the side: ``count * unit`` elements.
            side: Which side is trained: "inputs" or "outputs".
            kind: Word for this coupling in reports.
            expert: Which expert, where the path is that of a parameter [experts, outputs, inputs].

        Returns:
            The coupling.

        Raises:
            ValueError: `side` is neither "inputs" nor "outputs".

        Example:
            >>> coupling = s2ft.Coupling.one_sided(0, path="model.layers.0.mlp.down_proj", count=128)
            >>> s2ft.attach(model, s2ft.S2FTConfig(l_ratio=0.25), couplings=[coupling]).trainable
            2048
        """
        if side not in SIDES:
            raise ValueError(f"side must be 'inputs' or 'outputs', got {side!r}")
        projection = Projection("l", path, count, unit, SIDES.index(side), expert=expert)
        return cls(kind, layer, (), projection) if projection.dim == 1 else cls(kind, layer, (projection,), None)

    @property
    def projections(self) -> Iterator[Projection]:
        """The producers, then the consumer."""
        yield from self.producers
        if self.consumer is not None:
            yield self.consumer

    @property
    def status(self) -> str:
        """How its units are trained: "one-sided", "movable", or "in place"."""
        return "one-sided" if self.is_one_sided else "movable" if self.movable else "in place"

    @property
    def main(self) -> Projection:
        """The consumer, or the first producer of a coupling without one. It names the coupling."""
        return next(iter(self.producers)) if self.consumer is None else self.consumer

    @property
    def count(self) -> int:
        """Number of units of :attr:`main`; in grouped-query attention the keys and values have fewer."""
        return self.main.count

    @property
    def expert(self) -> int | None:
        """Number of the expert; None outside expert stacks."""
        return self.main.expert

    @property
    def place(self) -> str:
        """The path of the module that runs :attr:`main`: for experts that with their parameters."""
        return self.main.path if self.expert is None else self.main.path.rpartition(".")[0]

    @property
    def is_one_sided(self) -> bool:
        """Whether there is only one side, so that nothing can be reordered together."""
        return self.consumer is None or not self.producers

    @property
    def movable(self) -> bool:
        """Whether single units can be reordered.

        The heads of grouped-query attention can't be: several query heads share a key/value head, and a query head
        outside its group would be multiplied by other keys. They are trained in place: by a slice if they are
        neighbours, else by an index. The units of a `fixed` coupling can't be reordered either: the heads
        of T5, for instance, have numbers in a table of position biases that all layers share. The units of a one-sided
        coupling are known on one side only.
        """
        return not self.fixed and not self.is_one_sided and len({one.count for one in self.projections}) == 1

    def __str__(self) -> str:
        expert = "" if self.expert is None else f", expert {self.expert}"
        of = f"{SIDES[self.main.dim]} of" if self.is_one_sided else f"{', '.join(p.name for p in self.producers)} to"
        return f"the {self.kind} coupling of layer {self.layer}{expert} ({of} {self.main.name})"

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dict for JSON.

        Returns:
            The fields, with dicts for projections and vectors.

        Example:
            >>> coupling = s2ft.Coupling.ffn(0, up="0", down="2", channels=32)
            >>> s2ft.Coupling.from_dict(coupling.to_dict()) == coupling
            True
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Coupling":
        """Make a coupling from a dict of :meth:`to_dict`.

        Args:
            values: Fields of a coupling.

        Returns:
            The coupling.

        Raises:
            TypeError: The dict has other fields.
            KeyError: A field is missing.

        Example:
            >>> coupling = s2ft.Coupling.ffn(0, up="0", down="2", channels=32)
            >>> s2ft.Coupling.from_dict(coupling.to_dict()).consumer.count
            32
        """
        return cls(
            **{
                **values,
                "producers": tuple(Projection(**one) for one in values["producers"]),
                "consumer": None if values["consumer"] is None else Projection(**values["consumer"]),
                "vectors": tuple(Vector(**one) for one in values["vectors"]),
            }
        )


def unit_name(projection: Projection) -> str:
    """Return the word for a projection's units."""
    if projection.key in ONE_SIDED:
        side = SIDES[projection.dim]
        return side if projection.unit == 1 else f"groups of {projection.unit} {side}"
    return "channels" if projection.key in "ugd" else "heads"


def projections_of(couplings: Iterable[Coupling]) -> Iterator[Projection]:
    """Iterate over the projections of all couplings, in their order."""
    for coupling in couplings:
        yield from coupling.projections


# ---- checks of couplings that a user describes ----------------------------------------------------------------------


OPTIONAL = ("stride", "size", "expert")  # fields that may be None


def checked_couplings(couplings: Sequence[Coupling]) -> list[Coupling]:
    """Check couplings by themselves, without the model.

    Args:
        couplings: List or tuple of couplings.

    Returns:
        The couplings as a list, with tuples where the user gave lists.

    Raises:
        TypeError: Something is of the wrong type; the message names the coupling.
        ValueError: A field has no valid value, or couplings overlap; the message names the coupling or the weight.
    """
    if not isinstance(couplings, (list, tuple)) or not couplings:
        raise TypeError(f"couplings must be a list of at least one s2ft.Coupling, got {couplings!r}")
    couplings = [_checked(coupling, f"couplings[{i}]") for i, coupling in enumerate(couplings)]
    _check_apart(couplings)
    return couplings


def _check_apart(couplings: list[Coupling]) -> None:
    """Check that a weight has its units on one side, each element in one unit, and that names differ."""
    names = Counter(projection.name for projection in projections_of(couplings))
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        raise ValueError(
            f"couplings must have each projection once, and {twice} is there twice: a module is trained on one side "
            "only, so it can be in one coupling"
        )
    for (path, _), projections in by_key((one.weight_key, one) for one in projections_of(couplings)).items():
        if len({(projection.dim, projection.size, projection.transposed) for projection in projections}) > 1:
            raise ValueError(
                f"projections that share a weight must have the same dim, size and transposed: those of {path} differ"
            )
        elements = torch.cat(
            [projection.elements(torch.arange(projection.count, device="cpu")) for projection in projections]
        )
        if elements.unique().numel() < elements.numel():
            raise ValueError(
                f"couplings must have each element of a weight in one unit, and an element of {path} is in two: are "
                "start, stride, unit or size wrong?"
            )


def _checked(coupling: Any, where: str) -> Coupling:
    if not isinstance(coupling, Coupling):
        raise TypeError(f"{where} must be an s2ft.Coupling, got {type(coupling).__name__}")
    if coupling.block is not None or coupling.activation is not None:
        raise ValueError(f"{where}: block and activation must be None, except in the model families of s2ft")
    if not isinstance(coupling.kind, str) or not isinstance(coupling.fixed, bool):
        raise TypeError(f"{where}: kind must be a str and fixed a bool, got {coupling.kind!r} and {coupling.fixed!r}")
    _check_numbers(coupling, where, "", layer=0)
    coupling = replace(coupling, producers=tuple(coupling.producers), vectors=tuple(coupling.vectors))
    refuse(
        (
            coupling.is_one_sided and len(list(coupling.projections)) != 1,
            f"{where}: a coupling must have producers and a consumer, or, if its layer shares units with no other, "
            f"exactly one projection; got {len(coupling.producers)} producers and no consumer",
        ),
        (
            coupling.is_one_sided and coupling.vectors,
            f"{where}: vectors are reordered with the units, and nothing of a one-sided coupling is: leave them out",
        ),
    )
    for projection in coupling.projections:
        _check_projection(projection, int(projection is coupling.consumer), where, coupling.is_one_sided)
    for vector in coupling.vectors:
        if not isinstance(vector, Vector) or not isinstance(vector.path, str):
            raise TypeError(f"{where}: vectors must be Vector of s2ft.model.coupling, got {vector!r}")
        _check_numbers(vector, where, f" of {vector.path}", unit=1, expert=0, start=0, size=1)
    return coupling


def _check_projection(projection: Any, dim: int, where: str, is_one_sided: bool) -> None:
    if not isinstance(projection, Projection) or not isinstance(projection.path, str):
        raise TypeError(
            f"{where}: producers and consumer must be Projection of s2ft.model.coupling, got {projection!r}"
        )
    keys = ("l", ONE_SIDED)[dim] if is_one_sided else ("qkvug", "od")[dim]
    place = "in a one-sided coupling" if is_one_sided else "on this side"
    refuse(
        (
            projection.key not in PROJECTIONS or projection.key not in keys,
            f"{where}: the key of {projection.path} must be one of {', '.join(keys)} {place}, got {projection.key!r}",
        ),
        (
            projection.dim != dim,
            f"{where}: {projection.path} must have dim {dim} ({('producer', 'consumer')[dim]}), got {projection.dim!r}",
        ),
    )
    _check_numbers(projection, where, f" of {projection.path}", count=1, unit=1, start=0, stride=1, size=1, expert=0)
    last = int(projection.elements(torch.tensor([projection.count - 1], device="cpu")).max())
    refuse(
        (
            not isinstance(projection.transposed, bool) or projection.transposed and projection.expert is None,
            f"{where}: transposed of {projection.path} must be a bool, and can be True for an expert only, got "
            f"{projection.transposed!r}",
        ),
        (
            projection.size is None and (projection.start or projection.stride is not None),
            f"{where}: {projection.path} must have size, the number of all elements of dim {dim}, with start or stride",
        ),
        (
            last >= projection.extent,
            f"{where}: the last unit of {projection.path} must end within size {projection.size}, and it ends at "
            f"element {last}",
        ),
    )


def _check_numbers(thing: Any, where: str, of: str, **least: int) -> None:
    """Raise ValueError unless each of these fields is a whole number of at least so much, or None if it may be."""
    for name, lowest in least.items():
        if getattr(thing, name) is not None or name not in OPTIONAL:
            check_whole(f"{where}: {name}{of}", getattr(thing, name), lowest)


# ---- projections by name, and values by a key -----------------------------------------------------------------------

WORD = r"[\w\-]+"
PROJECTION_NAME = re.compile(rf"{WORD}(?:\.{WORD})*(?:\[[0-9]{{1,9}}\])?(?:\.[a-z])?")


def check_projection_name(name: Any, where: str) -> None:
    """Raise ValueError unless `name` is a projection's name: words separated by dots, then any expert's number."""
    if not isinstance(name, str) or len(name) > MAX_NAME or not PROJECTION_NAME.fullmatch(name):
        raise ValueError(f"{where}: {shortened(name)} is not the name of a projection")


def check_parameter_name(name: Any, where: str) -> None:
    """Raise ValueError unless `name` is a parameter's name: words separated by dots."""
    if not isinstance(name, str) or len(name) > MAX_NAME or not re.fullmatch(rf"{WORD}(?:\.{WORD})*", name):
        raise ValueError(f"{where}: {shortened(name)} is not the name of a parameter")


def digest_of(units: Mapping[str, list[int]]) -> str:
    """The sha256 of sorted unit numbers by projection name, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(dict(sorted(units.items()))).encode()).hexdigest()


Key = TypeVar("Key")
Value = TypeVar("Value")


def by_key(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """Collect the values of pairs by their keys, in the order in which they come.

    Example:
        >>> from s2ft.model.coupling import by_key
        >>> by_key([("q", 1), ("k", 2), ("q", 3)])
        {'q': [1, 3], 'k': [2]}
    """
    found: dict[Key, list[Value]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found
