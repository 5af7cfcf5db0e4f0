"""What s2ft knows about a model that it has changed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from s2ft.attached.extra import ExtraWeights
from s2ft.config import S2FTConfig
from s2ft.layers import S2Layer
from s2ft.model.coupling import Coupling, Projection, projections_of
from s2ft.model.permutation import Move
from s2ft.selection import Selection

RECORD = "_s2ft"  # the attribute of the model that holds its Attachment


@dataclass
class Part:
    """The share of one projection in a layer's s2."""

    projection: Projection
    positions: Tensor  # [n] int64, along s2's dim, of the elements below
    elements: Tensor  # [n] int64, ascending: which of the weight's elements along dim they are in original order


@dataclass
class Mount:
    """One trainable layer and what it stands for."""

    original: nn.Module | None  # what it replaced, without weight and bias; None: a parameter
    layer: S2Layer
    parts: list[Part]  # one for each projection that is trained in this weight
    position: int | None = None  # of a parameter among its module's


@dataclass
class Written:
    """Units of a weight that active adapters have overwritten. It is recorded before the weight is written."""

    projection: Projection
    index: Tensor  # [n] int64: elements along the projection's dim, in original order; see is_local
    base: Tensor  # the weight's values there before
    is_local: bool  # whether the index counts places in this rank's shard instead


@dataclass
class Attachment:
    """Everything s2ft knows about a model it has changed."""

    couplings: list[Coupling]
    fingerprint: dict[str, Any]
    required_grad: dict[str, bool]  # of every parameter, before
    given: bool = False  # whether the couplings were given by hand
    name: str | None = None  # the trainable adapter
    config: S2FTConfig | None = None
    selection: Selection | None = None
    moves: list[Move] = field(default_factory=list)  # of couplings whose units moved, or are about to
    mounts: dict[str, Mount] = field(default_factory=dict)  # by path
    forwards: dict[str, Callable] = field(default_factory=dict)  # by path of a module: the one of ours it has
    others: dict[str, object] = field(default_factory=dict)  # loaded adapters by name
    active: dict[str, float] = field(default_factory=dict)  # adapters with their weights
    unpacked: list[str] = field(default_factory=list)  # of stop_packing
    written: list[Written] = field(default_factory=list)
    extra: ExtraWeights = field(default_factory=ExtraWeights)
    host: dict[str, Any] | None = None  # attributes of the model that ours stand in for
    changing: bool = False  # whether a change of what is active is under way, or was interrupted

    @property
    def names(self) -> list[str]:
        return ([] if self.name is None else [self.name]) + list(self.others)

    def forget_mounts(self) -> None:
        """Be the record of a model without trainable layers, whose units lie where they were."""
        self.name = self.config = self.selection = self.host = None
        self.extra = ExtraWeights()
        for done in (self.moves, self.mounts, self.forwards, self.unpacked):
            done.clear()

    def places(self, projection: Projection, index: Tensor) -> Tensor:
        """Where elements of a projection lie now that units may have moved. index: [n] int64, in original order."""
        move = next((move for move in self.moves if move.is_done and projection in move.coupling.projections), None)
        return index if move is None else move.places(projection)[index]

    @cached_property
    def projections(self) -> dict[str, Projection]:
        """By name."""
        return {projection.name: projection for projection in projections_of(self.couplings)}

    @property
    def trains(self) -> bool:
        """Whether the trainable adapter is added in the forward, where it gets gradients."""
        return self.name is not None and self.active.get(self.name) == 1

    @property
    def slices(self) -> dict[str, Tensor]:
        """Every s2, by its name in the model."""
        return {f"{path}.s2": mount.layer.s2 for path, mount in self.mounts.items()}

    @property
    def parts(self) -> dict[str, tuple[Mount, Part]]:
        """By the projection's name."""
        return {part.projection.name: (mount, part) for mount in self.mounts.values() for part in mount.parts}


def attachment_of(model: nn.Module) -> Attachment:
    """The model's record. Raises: ValueError when nothing is attached."""
    record = model.__dict__.get(RECORD)
    if record is None:
        inside = next((path for path, module in model.named_modules() if RECORD in module.__dict__), None)
        raise ValueError(
            f"{type(model).__name__} has no S²FT adapter: "
            + (
                "call s2ft.attach or s2ft.load_adapter first"
                if inside is None
                else f"it is a wrapper of the model that has one: pass model.{inside}, or accelerator.unwrap_model(model)"
            )
        )
    return record
