"""What a coupled structure is (paper, section 3.2).

The units of a coupling pass from its producers to its consumer: unit i of a producer's outputs meets
unit i of the consumer's inputs. So both sides may be put in a new order together and the model
computes what it did before.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

PROJECTIONS = ("q", "k", "v", "o", "u", "g", "d")  # u, g, d: up, gate, down


@dataclass(frozen=True)
class Projection:
    """One side of a coupling: a weight whose dim `dim` is made of `count` units of `unit` elements.

    Often the units are all there is in that dim. Where the weight holds other projections too (queries, keys
    and values in one), `size` says how many elements there are in all, `start` where the first unit begins, and
    `stride` how far it is from one unit to the next. A weight is taken as outputs × inputs, however it is stored.
    """

    key: str  # one of PROJECTIONS
    path: str  # the module's name in the model; of experts, the name of their stacked weights [experts, O, I]
    count: int  # units
    unit: int  # elements a unit spans
    dim: int  # of the weight: 0 for producers (outputs), 1 for the consumer (inputs)
    start: int = 0  # the first unit's first element
    stride: int | None = None  # from a unit's first element to the next one's; default: unit
    size: int | None = None  # elements of dim, where there are more than these units'
    expert: int | None = None  # which of the experts

    @property
    def name(self) -> str:
        """What selections and adapters call it: its path, then [expert], then its key where it shares a weight."""
        return (
            self.path
            + ("" if self.expert is None else f"[{self.expert}]")
            + ("" if self.size is None else f".{self.key}")
        )

    @property
    def weight_key(self) -> tuple[str, int | None]:
        """The weight that it is in, as path and expert. Several projections may share one."""
        return self.path, self.expert

    @property
    def extent(self) -> int:
        """Elements of dim."""
        return self.count * self.unit if self.size is None else self.size

    def elements(self, units: Tensor) -> Tensor:
        """Element indices [n * unit] int64 along dim of units [n]."""
        first = self.start + units * (self.unit if self.stride is None else self.stride)
        return (first[:, None] + torch.arange(self.unit)).reshape(-1)


@dataclass(frozen=True)
class Vector:
    """A further parameter or buffer whose dim 0 is made of a coupling's units and moves along with the producers' outputs.

    For instance the weight of a norm over all heads (unit head_dim), or of one per head, [heads, head_dim] (unit 1).
    """

    path: str  # the tensor's name in the model
    unit: int  # entries of dim 0 that a unit spans


@dataclass(frozen=True)
class Coupling:
    """Producers and the consumer of one coupled structure of one layer.

    Layers are counted through the model: where there are several stacks, the second's come after the
    first's (encoder, then decoder; text, then vision).
    """

    kind: str  # "ffn", "attention", "cross-attention", "experts" or "shared-expert"
    layer: int
    producers: tuple[Projection, ...]
    consumer: Projection
    vectors: tuple[Vector, ...] = ()  # what moves along with the producers, besides their biases
    fixed: bool = False  # whether something outside numbers the units, so that none can move
    block: str | None = None  # the module around them, if there is one
    activation: str | None = None  # of s2ft.ops.act_mul, if block is consumer(activation(gate) * up)

    @property
    def projections(self) -> Iterator[Projection]:
        yield from self.producers
        yield self.consumer

    @property
    def movable(self) -> bool:
        """Whether single units can change place.

        Grouped-query attention's cannot: several query heads share a key/value head, and one of them
        outside its group would meet another's keys. Its heads are trained where they lie, which
        costs nothing, for a head's rows and columns are contiguous as they are. Nor can those of a
        `fixed` coupling: T5's heads, say, are numbered by a table of position biases that layers share.
        """
        return not self.fixed and len({projection.count for projection in self.projections}) == 1

    def __str__(self) -> str:
        expert = "" if self.consumer.expert is None else f", expert {self.consumer.expert}"
        producers = ", ".join(projection.name for projection in self.producers)
        return f"the {self.kind} coupling of layer {self.layer}{expert} ({producers} to {self.consumer.name})"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Coupling":
        """Raises: TypeError or KeyError for other fields than :meth:`to_dict` writes."""
        return cls(
            **{
                **values,
                "producers": tuple(Projection(**one) for one in values["producers"]),
                "consumer": Projection(**values["consumer"]),
                "vectors": tuple(Vector(**one) for one in values["vectors"]),
            }
        )


def unit_name(projection: Projection) -> str:
    """The word for a projection's units."""
    return "channels" if projection.key in "ugd" else "heads"


def projections_of(couplings: list[Coupling]) -> Iterator[Projection]:
    for coupling in couplings:
        yield from coupling.projections
