"""Where the slices of an adapter lie in its model, in words that need no model to be understood."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from s2ft.layers import EXPERTS, TRANSPOSED_EXPERTS
from s2ft.model.coupling import Coupling, projections_of
from s2ft.model.fingerprint import covered
from s2ft.model.weights import weight_at

LINEAR, TRANSPOSED, OF_EXPERTS, OF_EXPERTS_TRANSPOSED, OTHER = STORAGES = (
    "linear",  # [outputs, inputs]
    "transposed linear",  # [inputs, outputs], such as transformers' Conv1D
    "experts",  # [experts, outputs, inputs]
    "transposed experts",  # [experts, inputs, outputs]
    "other",  # for instance a convolution
)


@dataclass(frozen=True)
class Location:
    """The weight of one projection.

    Attributes:
        path: Path of the layer in the model; for experts, of the parameter with the weights of all of them.
        size: All elements of the weight along the dimension of the slices.
        storage: How the weight is stored, one of STORAGES.
        shared: Whether other projections lie in the same weight: queries, keys and values in one, for instance.
        expert: Number of the expert.
    """

    path: str
    size: int
    storage: str = LINEAR
    shared: bool = False
    expert: int | None = None

    def check(self, name: str) -> None:
        """Raise ValueError, naming the projection, for fields that can't be those of a weight."""
        valid = isinstance(self.path, str) and type(self.size) is int and 0 < self.size < 2**31
        valid = valid and isinstance(self.storage, str) and self.storage in STORAGES and isinstance(self.shared, bool)
        if not valid or not (self.expert is None or type(self.expert) is int and self.expert >= 0):
            raise ValueError(f"{name} has no valid path, size, storage, shared or expert")


@dataclass(frozen=True)
class Structure:
    """What an adapter has to know of its model, so that it can be served without building the model.

    Attributes:
        locations: The weight of each of the adapter's projections, by the projection's name.
        base_weights: The weights that the base's fingerprint covers, by layer: pairs of the label in the fingerprint,
            such as "d.weight", and the parameter's name in the model, in the fingerprint's order.
    """

    locations: dict[str, Location]
    base_weights: dict[str, list[tuple[str, str]]]

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return {
            "locations": {
                name: {key: value for key, value in asdict(found).items() if value is not None}
                for name, found in sorted(self.locations.items())
            },
            "base_weights": {layer: [list(pair) for pair in pairs] for layer, pairs in self.base_weights.items()},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Structure":
        """Read the values of :meth:`to_dict`.

        Raises:
            TypeError: A field is foreign or missing.
            KeyError: A part is missing.
            ValueError: A value is not valid.
        """
        if values.keys() != {"locations", "base_weights"}:
            raise ValueError(f"it must have locations and base_weights, not {', '.join(sorted(values)[:5])}")
        locations = {name: Location(**fields) for name, fields in values["locations"].items()}
        for name, found in locations.items():
            found.check(name)
        for pair in (pair for pairs in values["base_weights"].values() for pair in pairs):
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise ValueError("each of base_weights must be a label and a name")
        return cls(locations, {layer: list(map(tuple, pairs)) for layer, pairs in values["base_weights"].items()})


def union(parts: Iterable[Structure | None]) -> Structure | None:
    """Join the structures of adapters of one base; None if one of them is not known."""
    known = list(parts)
    if any(part is None for part in known):
        return None
    return Structure({name: one for part in known for name, one in part.locations.items()}, known[0].base_weights)


def structure_of(model: nn.Module, couplings: list[Coupling], names: Iterable[str]) -> Structure:
    """Describe the weights of an adapter's projections in its model.

    Args:
        model: The model, with or without adapters. It may be on the meta device.
        couplings: Its couplings.
        names: The adapter's projections.

    Returns:
        The description.

    Raises:
        KeyError: A name is not one of a projection of the couplings.
    """
    known = {projection.name: projection for projection in projections_of(couplings)}
    locations = {}
    for name in names:
        projection, handle = known[name], weight_at(model, known[name])
        locations[name] = Location(
            projection.path, projection.extent, _storage(handle.kind), projection.size is not None, projection.expert
        )
    return Structure(locations, _base_weights(model, couplings))


def _storage(kind: Any) -> str:
    if kind in (EXPERTS, TRANSPOSED_EXPERTS):
        return OF_EXPERTS if kind is EXPERTS else OF_EXPERTS_TRANSPOSED
    return OTHER if not kind.is_linear else TRANSPOSED if kind.transposed else LINEAR


def _base_weights(model: nn.Module, couplings: list[Coupling]) -> dict[str, list[tuple[str, str]]]:
    """The weights and biases that :func:`s2ft.model.fingerprint.fingerprint` reads, in its order."""
    found: dict[str, list[tuple[str, str]]] = {str(coupling.layer): [] for coupling in couplings}
    for layer, projection, handle in covered(model, couplings):
        path, key = projection.path, projection.key
        is_parameter = projection.expert is not None and handle.kind in (EXPERTS, TRANSPOSED_EXPERTS)
        found[layer].append((f"{key}.weight", path if is_parameter else f"{path}.weight"))
        if handle.bias is not None:
            found[layer].append((f"{key}.bias", f"{path}.bias"))
    return found
