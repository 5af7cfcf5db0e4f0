"""Selecting the modules and the units of an adapter from its config and the model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import Tensor, nn

from s2ft.config import S2FTConfig
from s2ft.model.coupling import Coupling, Projection, projections_of
from s2ft.model.delta import Delta
from s2ft.model.fingerprint import difference, fingerprint
from s2ft.model.registry import check_module, check_shapes, couplings_of, known_architectures
from s2ft.model.weights import put, weight_at
from s2ft.peft.config import DIMS, S2FTPeftConfig
from s2ft.peft.layer import S2FTPeftLayer
from s2ft.selection import Selection, select
from s2ft.selection.selection import unit_tensors


@dataclass(frozen=True)
class Targets:
    """The trained projections of one coupling, or of one module outside any. A selection treats it as a coupling."""

    kind: str
    layer: int
    projections: tuple[Projection, ...]
    vectors: tuple = ()

    @property
    def producers(self) -> tuple[Projection, ...]:
        return tuple(projection for projection in self.projections if projection.dim == 0)


@dataclass(frozen=True)
class ModuleUnits:
    """The units of one module that an adapter trains.

    Attributes:
        dim: The dimension of the weight along which the units lie.
        index: The elements of all units along `dim`, [n] int64, ascending.
        parts: The module's projections with their units.
    """

    dim: int
    index: Tensor
    parts: tuple[tuple[Projection, Tensor], ...]

    @classmethod
    def of(cls, parts: list[tuple[Projection, Tensor]]) -> "ModuleUnits":
        elements = torch.cat([projection.elements(units) for projection, units in parts])
        return cls(parts[0][0].dim, elements.sort().values, tuple(parts))

    def split(self, values: Tensor) -> dict[str, Delta]:
        """Split the values of the module's delta into one delta for each projection. The values are copied."""
        found = {}
        for projection, units in self.parts:
            elements = projection.elements(units)
            place = torch.searchsorted(self.index, elements).to(values.device)
            found[projection.name] = Delta(self.dim, elements, values.index_select(self.dim, place))
        return found

    def join(self, deltas: dict[str, Delta]) -> Tensor:
        """Join deltas by projection into the values of the module's delta. It is the inverse of :meth:`split`."""
        parts = [deltas[projection.name] for projection, _ in self.parts]
        order = torch.cat([delta.index for delta in parts]).argsort()
        return torch.cat([delta.values for delta in parts], self.dim).index_select(self.dim, order)


def select_units(config: S2FTPeftConfig, model: nn.Module) -> S2FTPeftConfig:
    """Select the units that an adapter trains. The model is not changed.

    Args:
        config: The config, with its options or with the units of an earlier selection.
        model: The base, with or without adapters.

    Returns:
        The config, or a copy (see :meth:`S2FTPeftConfig.updated_to`), with `units` and `module_units`.

    Raises:
        ValueError: Something can't be trained, or the base is not the config's; the message names the field or module.
    """
    with without_adapters(model):
        couplings = _couplings(model)
        selected = _maybe_include_all_linear_layers(config.as_created(), model)
        base = _fingerprint(model, couplings)
        _check_base(selected, base)
        targets = _targets(selected, model, couplings)
        check_shapes(model, targets)
        if not targets and selected.target_modules is not None:
            config.module_units = {}  # PEFT raises the error that names the pattern without a match
            return config
        selection = select(targets, _selection_config(selected, couplings, targets), model)
    found: dict[str, list[tuple[Projection, Tensor]]] = {}
    for projection in projections_of(targets):
        if projection.name in selection:
            found.setdefault(projection.path, []).append((projection, selection[projection.name]))
    selected = selected.with_units(selection, sorted(found), None if base is None else json.dumps(base))
    selected.module_units = {path: ModuleUnits.of(parts) for path, parts in found.items()}
    return config.updated_to(selected)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base: without the layers of adapters, and with nothing merged."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, S2FTPeftLayer)}
    for path, layer in layers.items():
        layer.restore_base()
        put(model, path, layer.base_layer)
    try:
        yield
    finally:
        for path, layer in layers.items():
            put(model, path, layer)
            layer.write_sum(layer.merged_adapters)


def _couplings(model: nn.Module) -> list[Coupling]:
    known = getattr(getattr(model, "config", None), "model_type", None) in known_architectures()
    return couplings_of(model) if known else []


# ---- the base ------------------------------------------------------------------------------------------


def _fingerprint(model: nn.Module, couplings: list[Coupling]) -> dict | None:
    """The base's fingerprint; None for a model of no known family, and if weights are sharded or not loaded yet."""
    weights = [weight_at(model, projection).tensor for projection in projections_of(couplings)]
    if not weights or any(w.is_meta or w.numel() == 0 or type(w.data).__name__ == "DTensor" for w in weights):
        return None
    return fingerprint(model, couplings)


def _check_base(config: S2FTPeftConfig, base: dict | None) -> None:
    if config.base_fingerprint is None or base is None:
        return
    what = difference(base, json.loads(config.base_fingerprint))
    if what:
        raise ValueError(
            f"the adapter was trained on another base: {what}. Load that base, or set config.base_fingerprint = None "
            "to skip this check"
        )


# ---- the modules ---------------------------------------------------------------------------------------


def _targets(config: S2FTPeftConfig, model: nn.Module, couplings: list[Coupling]) -> list[Targets]:
    """The projections of couplings and the modules outside any coupling that the config selects from."""
    if config.ratios and not couplings:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        raise ValueError(
            f"{', '.join(f'{key}_ratio' for key in config.ratios)}: {type(model).__name__} (model type {kind!r}) does "
            "not belong to a model family that s2ft knows: give target_modules, ratio and dim"
        )
    names = None if config.units is None else _unit_tensors(config.units, "units")
    targets = []
    for coupling in couplings:
        trained = tuple(projection for projection in coupling.projections if _is_trained(config, names, projection))
        if trained:
            targets.append(Targets(coupling.kind, coupling.layer, trained))
    _check_coupled(config, couplings, targets)
    coupled = {projection.path for projection in projections_of(couplings)}
    for path, module in model.named_modules():
        if path and path not in coupled and (_is_target(config, path) if names is None else path in names):
            targets.append(_uncoupled(config, model, path, module))
    _check_ratio(config, targets)
    if names is not None:
        _check_units(config, names, model, targets)
    return targets


def _unit_tensors(units, field: str) -> dict[str, Tensor]:
    return Selection.load(units).units if isinstance(units, str) else unit_tensors(units, field)


def _is_trained(config: S2FTPeftConfig, names: dict[str, Tensor] | None, projection: Projection) -> bool:
    if names is not None:
        trained = projection.name in names
    elif config.target_modules is not None:
        trained = _is_target(config, projection.path)
    else:  # PEFT's other fields, such as layers_to_transform, restrict the ratios
        last = SimpleNamespace(**{**vars(config), "target_modules": [projection.path.rpartition(".")[2]]})
        trained = projection.key in config.ratios and _is_target(last, projection.path)
    if trained and projection.expert is not None:
        raise ValueError(
            f"{projection.name} is one expert of a stack, which is a parameter and not a module: PEFT can't train it, "
            "so use s2ft.attach"
        )
    return trained


def _is_target(config, path: str) -> bool:
    """Whether PEFT's rules make the module a target."""
    return config.target_modules is not None and bool(check_target_module_exists(config, path))


def _uncoupled(config: S2FTPeftConfig, model: nn.Module, path: str, module: nn.Module) -> Targets:
    """A module in no coupling. Its units are single outputs or inputs."""
    check_module(module, path)
    if config.dim is None:
        raise ValueError(
            f"dim must be outputs or inputs, the units of {path}: this module is in no coupling of a model family that "
            "s2ft knows"
        )
    dim = DIMS.index(config.dim)
    shape = weight_at(model, Projection("ud"[dim], path, 1, 1, dim)).shape
    return Targets(f"module {path}", 0, (Projection("ud"[dim], path, shape[dim], 1, dim),))


def _check_coupled(config: S2FTPeftConfig, couplings: list[Coupling], targets: list[Targets]) -> None:
    """Check the fields that concern modules in couplings."""
    left = {projection.key for projection in projections_of(targets)}
    for key in {projection.key for projection in projections_of(couplings)} & config.ratios.keys() - left:
        raise ValueError(
            f"{key}_ratio: modules_to_save, exclude_modules or layers_to_transform excludes all of its modules"
        )
    for projection in projections_of(targets):
        if config.dim is not None and config.dim != DIMS[projection.dim]:
            raise ValueError(
                f"dim={config.dim!r}, but the units of {projection.path} are its {DIMS[projection.dim]}: dim is for "
                "modules that are in no coupling"
            )


def _check_ratio(config: S2FTPeftConfig, targets: list[Targets]) -> None:
    for projection in projections_of(targets):
        if config.ratio is not None and int(config.ratio * projection.count + 0.5) == 0:
            raise ValueError(f"ratio={config.ratio} selects none of the {projection.count} units of {projection.name}")


def _check_units(config: S2FTPeftConfig, names: dict[str, Tensor], model: nn.Module, targets: list[Targets]) -> None:
    """Check that all named units exist, and that they belong to the target modules."""
    missing = names.keys() - {projection.name for projection in projections_of(targets)}
    if missing:
        raise ValueError(f"units names {min(missing)}, which is not a projection or module of this model")
    if config.target_modules is None:
        return
    paths = {projection.path for projection in projections_of(targets)}
    matched = {path for path, _ in model.named_modules() if path and _is_target(config, path)}
    if paths - matched:
        raise ValueError(f"units names {min(paths - matched)}, which is not in target_modules, or is excluded")
    if matched - paths:
        raise ValueError(f"target_modules has {min(matched - paths)}, but units names no unit of it")


def _selection_config(config: S2FTPeftConfig, couplings: list[Coupling], targets: list[Targets]) -> S2FTConfig:
    """The options of the selection as an S2FTConfig."""
    if config.units is not None:
        return S2FTConfig(units=config.units)
    ratios = config.ratios
    if config.ratio is not None:
        ratios = {projection.key: config.ratio for projection in projections_of(targets)}
    return S2FTConfig(
        **{f"{key}_ratio": value for key, value in ratios.items()},
        selection=config.selection,
        order=config.order,
        allocation=config.allocation,
        budget=config.budget,
        seed=config.seed,
        match_lora_rank=config.match_lora_rank,
        exclude=_exclude(config, couplings, targets),
        layers=config.layers,
    )


def _exclude(config: S2FTPeftConfig, couplings: list[Coupling], targets: list[Targets]) -> dict[str, Tensor] | None:
    """The excluded units of the targets. An adapter that is excluded may have other projections too."""
    if config.exclude is None:
        return None
    excluded = _unit_tensors(config.exclude, "exclude")
    trained = {projection.name for projection in projections_of(targets)}
    unknown = excluded.keys() - trained - {projection.name for projection in projections_of(couplings)}
    if unknown:
        raise ValueError(f"exclude names {min(unknown)}, which is not a projection or module of this model")
    return {name: units for name, units in excluded.items() if name in trained} or None
