"""An adapter in memory: named deltas in the base's own coordinates, weighted sums, and checks against a model."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor

from s2ft.config import S2FTConfig, refuse
from s2ft.files.plain_text import table
from s2ft.model.coupling import Coupling
from s2ft.model.fingerprint import Structure, difference, union
from s2ft.model.weights import Delta
from s2ft.selection import Selection

ON_TOP_OF = "on_top_of"  # key in the info of an adapter: weights by name of the adapters that it was trained on top of


@dataclass
class Adapter:
    """An adapter in memory, independent of any model.

    :func:`s2ft.get_adapter` returns one of a model, :func:`s2ft.read_adapter` one of a folder. Adapters of the same
    base can be added, subtracted and scaled (S²FT paper, section 3.4).

    Attributes:
        name: Name of the adapter in a model.
        config: The config it was trained with.
        selection: The units it trains, by projection.
        fingerprint: Hashes of the base's coupled weights, by layer.
        deltas: The trained updates, by projection. A delta of dim 0 has values of shape [n, in_features], a delta of
            dim 1 has [out_features, n], for n selected elements.
        info: Free metadata, as JSON values.
        couplings: The couplings; None if those of the model type are meant.
        extra_weights: Parameters outside the couplings that are trained in full, by name.
        structure: Where the slices lie in the model, for engines that do not build it; None if that was not recorded.
        device: Device that keeps the tensors of a loaded adapter; None if they follow the weights of the model.

    Example:
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> adapter = s2ft.get_adapter(model, "math")
        >>> adapter.parameters
        1664
        >>> (0.5 * adapter + adapter).name
        'math+math'
    """

    name: str
    config: S2FTConfig
    selection: Selection
    fingerprint: dict[str, Any]
    deltas: dict[str, Delta]
    info: dict[str, Any] = field(default_factory=dict)
    couplings: list[Coupling] | None = None
    extra_weights: dict[str, Tensor] = field(default_factory=dict)
    structure: Structure | None = None
    device: torch.device | None = None

    @property
    def parameters(self) -> int:
        """Number of trained parameters, with those of the extra weights."""
        return sum(delta.values.numel() for delta in self.deltas.values()) + sum(
            value.numel() for value in self.extra_weights.values()
        )

    def to(self, device: torch.device | str) -> "Adapter":
        """Copy the adapter with its deltas and extra weights on a device.

        Args:
            device: A torch.device, or its name.

        Returns:
            A new adapter. Tensors that are on the device already are shared with this one.

        Example:
            >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
            >>> adapter = s2ft.get_adapter(model, "default").to("cpu")
            >>> {delta.values.device.type for delta in adapter.deltas.values()}
            {'cpu'}
        """
        return replace(
            self,
            deltas={
                path: Delta(delta.dim, delta.index, delta.values.to(device)) for path, delta in self.deltas.items()
            },
            extra_weights={name: value.to(device) for name, value in self.extra_weights.items()},
        )

    def check_base(self, fingerprint: dict[str, Any]) -> None:
        """Check that the adapter was trained on a base.

        Args:
            fingerprint: The fingerprint of the base.

        Raises:
            ValueError: It was trained on another one. The message has its name, if that was recorded.

        Example:
            >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
            >>> adapter = s2ft.get_adapter(model, "default")
            >>> adapter.check_base(adapter.fingerprint)
        """
        other_base = difference(fingerprint, self.fingerprint)
        if other_base:
            base = self.info.get("base_model")
            raise ValueError(
                f"adapter {self.name!r} was trained on another base{f', {base}' if base else ''}: {other_base}"
            )

    def beside(self, devices: Mapping[str, torch.device]) -> "Adapter":
        """Copy the adapter with each delta and extra weight on a device of its own.

        Args:
            devices: Devices by projection and by the name of an extra weight. Tensors whose device is meta stay where
                they are.

        Returns:
            A new adapter, or this one if everything is there already.
        """
        tensors = {**{path: delta.values for path, delta in self.deltas.items()}, **self.extra_weights}
        placed = {
            name: tensor.to(devices[name])
            for name, tensor in tensors.items()
            if devices[name] != tensor.device and devices[name].type != "meta"
        }
        if not placed:
            return self
        deltas = {
            path: replace(delta, values=placed[path]) if path in placed else delta
            for path, delta in self.deltas.items()
        }
        extra_weights = {name: placed.get(name, value) for name, value in self.extra_weights.items()}
        return replace(self, deltas=deltas, extra_weights=extra_weights)

    def __add__(self, other: "Adapter") -> "Adapter":
        return weighted_sum([(self, 1.0), (other, 1.0)], f"{self.name}+{other.name}")

    def __sub__(self, other: "Adapter") -> "Adapter":
        return weighted_sum([(self, 1.0), (other, -1.0)], f"{self.name}-{other.name}")

    def __mul__(self, weight: float) -> "Adapter":
        return weighted_sum([(self, weight)], self.name)

    __rmul__ = __mul__

    def __neg__(self) -> "Adapter":
        return self * -1.0


# ---- weighted sums (paper, section 3.4) --------------------------------------------------------------------


def weighted_sum(parts: Sequence[tuple[Adapter, float]], name: str) -> Adapter:
    """Add up adapters: the sum of weight × delta, on every unit that any adapter trains.

    If the selections are disjoint and all weights are 1, the sum has exactly the values of the adapters. Sums are
    computed in float32, or in float64 if a delta has that dtype. The config of the sum names the units.

    Extra weights are values and not updates, so they can't be added. The extra weights of an adapter with weight 1 are
    copied to the sum.

    Args:
        parts: Adapters with their weights.
        name: Name of the sum.

    Returns:
        A new adapter.

    Raises:
        ValueError: The adapters have different bases, a weight is not a finite number, or extra weights belong to two
            adapters or to one whose weight is not 1.
    """
    first = parts[0][0]
    for adapter, weight in parts:
        check_weight(adapter.name, weight)
        other_base = difference(first.fingerprint, adapter.fingerprint)
        if other_base:
            raise ValueError(f"adapters {first.name!r} and {adapter.name!r} are of different bases: {other_base}")
    paths = dict.fromkeys(path for adapter, _ in parts for path in adapter.deltas)
    deltas = {
        path: sum_deltas([(adapter.deltas[path], float(weight)) for adapter, weight in parts if path in adapter.deltas])
        for path in paths
    }
    selection = Selection(
        {
            path: torch.cat([adapter.selection[path] for adapter, _ in parts if path in adapter.deltas]).unique()
            for path in paths
        }
    )
    check_extra_apart(
        ((adapter.name, weight, adapter.extra_weights) for adapter, weight in parts),
        "values can't be added: keep the adapters apart and switch between them",
    )
    extra_weights = {name: value.clone() for adapter, _ in parts for name, value in adapter.extra_weights.items()}
    config = S2FTConfig(
        units=cast(Any, selection),
        layout=first.config.layout,
        delta_dtype=first.config.delta_dtype,
        ffn_kernel=first.config.ffn_kernel,
        modules_to_save=[name for adapter, _ in parts for name in adapter.config.modules_to_save or ()] or None,
    )
    prompts = [{"prompt": adapter.info["prompt"]} for adapter, _ in parts if "prompt" in adapter.info]
    info = {
        **{key: value for key, value in first.info.items() if key != ON_TOP_OF},
        **(prompts[0] if prompts else {}),
        "sum_of": [[adapter.name, float(weight)] for adapter, weight in parts],
    }
    return Adapter(
        name,
        config,
        selection,
        first.fingerprint,
        deltas,
        info,
        first.couplings,
        extra_weights,
        union([adapter.structure for adapter, _ in parts]),
    )


def check_extra_apart(parts: Iterable[tuple[str, float, Iterable[str]]], otherwise: str) -> None:
    """Check the extra weights of adapters that are used together.

    Args:
        parts: Of each adapter the name, the weight, and the names of its extra weights.
        otherwise: What is not possible with an extra weight of two adapters, and what to do, for the message.

    Raises:
        ValueError: An extra weight would be scaled, or two adapters have the same one.
    """
    owners: dict[str, str] = {}
    for adapter, weight, names in parts:
        for name in names:
            refuse(
                (
                    weight != 1,
                    f"adapter {adapter!r} has {name} trained in full, which can't be scaled: give the adapter weight "
                    f"1, not {weight:g}",
                ),
                (
                    name in owners,
                    f"adapters {owners.get(name)!r} and {adapter!r} both have {name} trained in full, and {otherwise}",
                ),
            )
            owners[name] = adapter


def check_weight(name: str, weight: Any) -> None:
    """Raise ValueError for a weight that is not a finite number."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ValueError(f"the weight of adapter {name!r} must be a finite number, got {weight!r}")


def sum_deltas(parts: list[tuple[Delta, float]]) -> Delta:
    """Return the sum of weight × delta of one module, on the units of any delta. Gradients flow to the values.

    The sum is computed in float32, or in float64 if a delta has that dtype. A single delta with weight 1 is copied.
    """
    if len(parts) == 1 and parts[0][1] == 1:
        delta = parts[0][0]
        return Delta(delta.dim, delta.index.clone(), delta.values.clone())
    dim = parts[0][0].dim
    wide = reduce(torch.promote_types, (delta.values.dtype for delta, _ in parts), torch.float32)
    index = torch.cat([delta.index for delta, _ in parts]).unique()
    shape = list(parts[0][0].values.shape)
    shape[dim] = index.numel()
    total = torch.zeros(shape, dtype=wide, device=parts[0][0].values.device)
    for delta, weight in parts:
        total.index_add_(dim, torch.searchsorted(index, delta.index).to(total.device), delta.values.to(total) * weight)
    return Delta(dim, index, total)


# ---- shared units ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap:
    """The units that two or more adapters train. Printed, it is a table by projection.

    Attributes:
        shared: Number of units that two or more adapters train, by projection.
        trained: Number of units that at least one adapter trains, by projection.
    """

    shared: dict[str, int]
    trained: dict[str, int]

    @property
    def units(self) -> int:
        """Number of shared units of all projections."""
        return sum(self.shared.values())

    @property
    def share(self) -> float:
        """Shared units divided by trained units, 0 to 1."""
        return self.units / max(1, sum(self.trained.values()))

    def __str__(self) -> str:
        if not self.units:
            return f"the adapters are disjoint: none of {sum(self.trained.values()):,} units is trained by two"
        rows = [(path, f"{count:,}", f"of {self.trained[path]:,}") for path, count in self.shared.items() if count]
        total = f"{self.units:,} of {sum(self.trained.values()):,} trained units are shared ({self.share:.1%})"
        return f"{table(rows, right={1})}\n{total}"


def overlap(adapters: Sequence[Adapter]) -> Overlap:
    """Count the units that two or more adapters train.

    Args:
        adapters: The adapters, of one base.

    Returns:
        The counts by projection.

    Example:
        >>> config = s2ft.S2FTConfig(d_ratio=0.1)
        >>> report = s2ft.attach(model, config, name="math")
        >>> adapter = s2ft.get_adapter(model, "math")
        >>> s2ft.adapter.adapter.overlap([adapter, adapter]).share
        1.0
    """
    shared, trained = {}, {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.deltas):
        units = torch.cat([adapter.selection[path] for adapter in adapters if path in adapter.deltas])
        _, counts = units.unique(return_counts=True)
        shared[path], trained[path] = int((counts > 1).sum()), counts.numel()
    return Overlap(shared, trained)
