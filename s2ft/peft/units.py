"""Which modules an adapter trains, and which units of them, from its config and the model."""

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
    """What is trained of one coupling, or a module outside any: what a selection looks at instead of the coupling."""

    kind: str
    layer: int
    projections: tuple[Projection, ...]
    vectors: tuple = ()

    @property
    def producers(self) -> tuple[Projection, ...]:
        return tuple(projection for projection in self.projections if projection.dim == 0)


@dataclass(frozen=True)
class Site:
    """What an adapter trains of one module: the elements `index` [n] int64, ascending, along `dim` of its weight."""

    dim: int
    index: Tensor
    parts: tuple[tuple[Projection, Tensor], ...]  # with their units

    @classmethod
    def of(cls, parts: list[tuple[Projection, Tensor]]) -> "Site":
        elements = torch.cat([projection.elements(units) for projection, units in parts])
        return cls(parts[0][0].dim, elements.sort().values, tuple(parts))

    def deltas(self, values: Tensor) -> dict[str, Delta]:
        """By projection, of the module's delta, copied."""
        found = {}
        for projection, units in self.parts:
            elements = projection.elements(units)
            place = torch.searchsorted(self.index, elements).to(values.device)
            found[projection.name] = Delta(self.dim, elements, values.index_select(self.dim, place))
        return found

    def joined(self, deltas: dict[str, Delta]) -> Tensor:
        """The module's delta, of those by projection."""
        mine = [deltas[projection.name] for projection, _ in self.parts]
        order = torch.cat([delta.index for delta in mine]).argsort()
        return torch.cat([delta.values for delta in mine], self.dim).index_select(self.dim, order)


def settle(config: S2FTPeftConfig, model: nn.Module) -> S2FTPeftConfig:
    """`config`, or a copy, see :class:`S2FTPeftConfig`, that names the units to train and has its `sites`; the model
    stays as it is.

    Raises: ValueError naming the field or the module for what can't be trained, or a base that is not the config's.
    """
    with plain(model):
        couplings = _couplings(model)
        settled = _maybe_include_all_linear_layers(config.as_asked(), model)
        base = _fingerprint(model, couplings)
        _check_base(settled, base)
        targets = _targets(settled, model, couplings)
        check_shapes(model, targets)
        if not targets and settled.target_modules is not None:
            config.sites = {}  # PEFT says what does not match, and why
            return config
        selection = select(targets, _choice(settled, couplings, targets), model)
    found: dict[str, list[tuple[Projection, Tensor]]] = {}
    for projection in projections_of(targets):
        if projection.name in selection:
            found.setdefault(projection.path, []).append((projection, selection[projection.name]))
    settled = settled.with_units(selection, sorted(found), None if base is None else json.dumps(base))
    settled.sites = {path: Site.of(parts) for path, parts in found.items()}
    return config.become(settled)


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Within, the model is its base: without the layers of other adapters, and nothing merged."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, S2FTPeftLayer)}
    for path, layer in layers.items():
        layer.take_back()
        put(model, path, layer.base_layer)
    try:
        yield
    finally:
        for path, layer in layers.items():
            put(model, path, layer)
            layer.put_in(layer.merged_adapters)


def _couplings(model: nn.Module) -> list[Coupling]:
    known = getattr(getattr(model, "config", None), "model_type", None) in known_architectures()
    return couplings_of(model) if known else []


# ---- the base ------------------------------------------------------------------------------------------


def _fingerprint(model: nn.Module, couplings: list[Coupling]) -> dict | None:
    """None where there is no family to read it by, or where weights are elsewhere: sharded, or not loaded yet."""
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
            f"the adapter was trained on another base: {what}. Load that one, or take the risk by "
            "config.base_fingerprint = None"
        )


# ---- the modules ---------------------------------------------------------------------------------------


def _targets(config: S2FTPeftConfig, model: nn.Module, couplings: list[Coupling]) -> list[Targets]:
    """What the config asks for: projections of couplings, and modules outside of any."""
    if config.ratios and not couplings:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        raise ValueError(
            f"{', '.join(f'{key}_ratio' for key in config.ratios)}: {type(model).__name__} (model type "
            f"{kind!r}) is not of a model family that s2ft knows: give target_modules, ratio and dim"
        )
    names = None if config.units is None else _read(config.units, "units")
    targets = []
    for coupling in couplings:
        wanted = tuple(projection for projection in coupling.projections if _is_wanted(config, names, projection))
        if wanted:
            targets.append(Targets(coupling.kind, coupling.layer, wanted))
    _check_inside(config, couplings, targets)
    coupled = {projection.path for projection in projections_of(couplings)}
    for path, module in model.named_modules():
        if path and path not in coupled and (_is_target(config, path) if names is None else path in names):
            targets.append(_outside(config, model, path, module))
    _check_ratio(config, targets)
    if names is not None:
        _check_units(config, names, model, targets)
    return targets


def _read(units, field: str) -> dict[str, Tensor]:
    return Selection.load(units).units if isinstance(units, str) else unit_tensors(units, field)


def _is_wanted(config: S2FTPeftConfig, names: dict[str, Tensor] | None, projection: Projection) -> bool:
    if names is not None:
        wanted = projection.name in names
    elif config.target_modules is not None:
        wanted = _is_target(config, projection.path)
    else:  # PEFT's other fields narrow it down
        last = SimpleNamespace(**{**vars(config), "target_modules": [projection.path.rpartition(".")[2]]})
        wanted = projection.key in config.ratios and _is_target(last, projection.path)
    if wanted and projection.expert is not None:
        raise ValueError(
            f"{projection.name} is one of a stack of experts, a parameter and no module, which PEFT has "
            "no place for: train it by s2ft.attach"
        )
    return wanted


def _is_target(config, path: str) -> bool:
    """As PEFT sees it."""
    return config.target_modules is not None and bool(check_target_module_exists(config, path))


def _outside(config: S2FTPeftConfig, model: nn.Module, path: str, module: nn.Module) -> Targets:
    """A module in no coupling: its units are single outputs or inputs."""
    check_module(module, path)
    if config.dim is None:
        raise ValueError(
            f"dim must say what the units of {path} are, outputs or inputs: it is in no coupling of a "
            "model family that s2ft knows"
        )
    dim = DIMS.index(config.dim)
    shape = weight_at(model, Projection("ud"[dim], path, 1, 1, dim)).shape
    return Targets(f"module {path}", 0, (Projection("ud"[dim], path, shape[dim], 1, dim),))


def _check_inside(config: S2FTPeftConfig, couplings: list[Coupling], targets: list[Targets]) -> None:
    """Of couplings only."""
    left = {projection.key for projection in projections_of(targets)}
    for key in {projection.key for projection in projections_of(couplings)} & config.ratios.keys() - left:
        raise ValueError(
            f"{key}_ratio: modules_to_save or exclude_modules or layers_to_transform leaves none of its modules"
        )
    for projection in projections_of(targets):
        if config.dim is not None and config.dim != DIMS[projection.dim]:
            raise ValueError(
                f"dim={config.dim!r}, but the units of {projection.path} are its {DIMS[projection.dim]}: "
                "dim is for modules that are in no coupling"
            )


def _check_ratio(config: S2FTPeftConfig, targets: list[Targets]) -> None:
    for projection in projections_of(targets):
        if config.ratio is not None and int(config.ratio * projection.count + 0.5) == 0:
            raise ValueError(f"ratio={config.ratio} comes to none of the {projection.count} units of {projection.name}")


def _check_units(config: S2FTPeftConfig, names: dict[str, Tensor], model: nn.Module, targets: list[Targets]) -> None:
    """All are there, and they are those of the target modules."""
    missing = names.keys() - {projection.name for projection in projections_of(targets)}
    if missing:
        raise ValueError(f"units names {min(missing)}, which is no projection or module of this model")
    if config.target_modules is None:
        return
    paths = {projection.path for projection in projections_of(targets)}
    aimed = {path for path, _ in model.named_modules() if path and _is_target(config, path)}
    if paths - aimed:
        raise ValueError(f"units names {min(paths - aimed)}, which is none of target_modules, or is excluded")
    if aimed - paths:
        raise ValueError(f"target_modules has {min(aimed - paths)}, and units names no unit of it")


def _choice(config: S2FTPeftConfig, couplings: list[Coupling], targets: list[Targets]) -> S2FTConfig:
    """What the selection is asked for."""
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
    """Of what is trained here; an adapter that is excluded may train more."""
    if config.exclude is None:
        return None
    read, mine = _read(config.exclude, "exclude"), {projection.name for projection in projections_of(targets)}
    unknown = read.keys() - mine - {projection.name for projection in projections_of(couplings)}
    if unknown:
        raise ValueError(f"exclude names {min(unknown)}, which is no projection or module of this model")
    return {name: units for name, units in read.items() if name in mine} or None
