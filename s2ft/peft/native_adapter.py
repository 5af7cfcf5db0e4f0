"""Units of PEFT's layers, and adapters of s2ft in a PeftModel."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from s2ft.adapter.adapter import Adapter
from s2ft.attached.loading import read_adapter
from s2ft.attached.mounting import check_one_place
from s2ft.config import CHOOSING, S2FTConfig, refuse
from s2ft.model.coupling import Coupling, Projection, by_key, projections_of
from s2ft.model.fingerprint import difference, fingerprint
from s2ft.model.registry import check_shapes, couplings_of, input_couplings, is_known
from s2ft.model.weights import Delta, put, weight_at
from s2ft.peft.adapter_config import S2FTPeftConfig
from s2ft.peft.layer import S2FTPeftLayer
from s2ft.peft.targets import find_targets, warn_of_skipped
from s2ft.selection import Selection, select, unit_tensors

# ---- units ----------------------------------------------------------------------------------------------------------


class ModuleUnits:
    """The units of one module that an adapter trains.

    Args:
        parts: The module's projections with their units.

    Attributes:
        dim: The dimension of the weight along which the units lie.
        index: The elements of all units along `dim`, [n] int64, ascending. Those of stacked experts are counted
            through: element u of expert e is e times the elements of an expert, plus u.
        parts: See above.
    """

    def __init__(self, parts: list[tuple[Projection, Tensor]]) -> None:
        elements = torch.cat([_counted_through(projection, projection.elements(units)) for projection, units in parts])
        self.dim, self.index, self.parts = parts[0][0].dim, elements.sort().values, parts

    @property
    def transposed(self) -> bool:
        """Whether the weights are stacked experts [experts, inputs, outputs]."""
        return self.parts[0][0].transposed

    def split(self, values: Tensor) -> dict[str, Delta]:
        """Split the values of the module's delta into one delta for each projection. The values are copied."""
        found = {}
        for projection, units in self.parts:
            elements = projection.elements(units)
            place = torch.searchsorted(self.index, _counted_through(projection, elements)).to(values.device)
            found[projection.name] = Delta(self.dim, elements, values.index_select(self.dim, place))
        return found

    def join(self, deltas: dict[str, Delta]) -> Tensor:
        """Join deltas by projection into the values of the module's delta. It is the inverse of :meth:`split`."""
        parts = [(projection, deltas[projection.name]) for projection, _ in self.parts]
        order = torch.cat([_counted_through(projection, delta.index) for projection, delta in parts]).argsort()
        return torch.cat([delta.values for _, delta in parts], self.dim).index_select(self.dim, order)


def _counted_through(projection: Projection, elements: Tensor) -> Tensor:
    return elements if projection.expert is None else elements + projection.expert * projection.extent


def select_units(config: S2FTPeftConfig, model: nn.Module) -> S2FTPeftConfig:
    """Select the units that an adapter trains. Neither the config nor the model is changed.

    Args:
        config: The config, with its options or with the units of an earlier selection.
        model: The base, with or without adapters.

    Returns:
        A copy of the config with `units` and `module_units`.

    Raises:
        ValueError: Something can't be trained, or the base is not the config's; the message names the field or module.
    """
    with without_adapters(model):
        couplings, has_family = _couplings(config, model), is_known(model)
        base = _fingerprint(model, couplings)
        _check_base(config, base)
        named, targets, uncoupled, skipped = find_targets(config, model, couplings)
        check_shapes(model, targets)
        if not targets and not (config.target_modules is None and config.target_parameters is None):
            selected = replace(config)  # PEFT raises the error that names the pattern without a match
            selected.module_units = {}
            return selected
        selection = select(targets, _selection_config(named, couplings, targets), model)
        check_one_place(model, targets, selection)
    warn_of_skipped(skipped, sum(len(target.projections) for target in targets))
    modules = _by_path(targets, selection)
    selected = named.with_units(
        selection,
        sorted(path for path, units in modules.items() if "" in units),
        sorted(f"{path}.{weight}" for path, units in modules.items() for weight in units if weight),
        None if base is None else json.dumps(base),
        uncoupled,
        list(skipped),
    )
    if couplings and (config.i_ratio or not has_family):
        selected.couplings = [coupling.to_dict() for coupling in couplings]  # loading finds none again
    selected.module_units = modules
    return selected


def _by_path(targets: list[Any], selection: Selection) -> dict[str, dict[str, ModuleUnits]]:
    """The selected units by module and weight; "" is the weight of a layer, others are those of stacked experts."""
    chosen = (one for one in projections_of(targets) if one.name in selection)
    parts = by_key((one.path, (one, selection[one.name])) for one in chosen)
    modules: dict[str, dict[str, ModuleUnits]] = {}
    for path, found in parts.items():
        owner, _, weight = (path, "", "") if found[0][0].expert is None else path.rpartition(".")
        modules.setdefault(owner, {})[weight] = ModuleUnits(found)
    return modules


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


def _couplings(config: S2FTPeftConfig, model: nn.Module) -> list[Coupling]:
    """The model's couplings; none for a model of no known family, in which all units are single inputs or outputs.

    Raises:
        ValueError: A projection's ratio is asked for in a model whose couplings can't be found.
    """
    if config.couplings is not None:
        return [Coupling.from_dict(one) for one in config.couplings]
    if not (config.ratios or is_known(model)):
        return []
    try:
        found = couplings_of(model)
        return input_couplings(model, found) if config.i_ratio else found
    except ValueError as error:
        if is_known(model):
            raise
        raise ValueError(
            f"{', '.join(f'{key}_ratio' for key in config.ratios)}: {error}. Or give target_modules and ratio, for "
            "instance target_modules='all-linear'"
        ) from None


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


# ---- the selection -------------------------------------------------------------------------------------


def _selection_config(config: S2FTPeftConfig, couplings: list[Coupling], targets: list[Any]) -> S2FTConfig:
    """The options of the selection as an S2FTConfig."""
    if config.units is not None:
        return S2FTConfig(units=config.units)
    options = {name: getattr(config, name) for name in (*CHOOSING, "seed")}
    if config.ratio is not None:
        options.update({f"{projection.key}_ratio": config.ratio for projection in projections_of(targets)})
    return S2FTConfig(**{**options, "exclude": _exclude(config, couplings, targets)})


def _exclude(config: S2FTPeftConfig, couplings: list[Coupling], targets: list[Any]) -> dict[str, Tensor] | None:
    """The excluded units of the targets. An adapter that is excluded may have other projections too."""
    if config.exclude is None:
        return None
    excluded = unit_tensors(config.exclude, "exclude")
    trained = {projection.name for projection in projections_of(targets)}
    unknown = excluded.keys() - trained - {projection.name for projection in projections_of(couplings)}
    if unknown:
        raise ValueError(f"exclude names {min(unknown)}, which is not a projection or module of this model")
    return {name: units for name, units in excluded.items() if name in trained} or None


# ---- adapters of s2ft -----------------------------------------------------------------------------------------------


def to_native(model: PeftModel, adapter_name: str = "default") -> Adapter:
    """Return an adapter of a PeftModel as an adapter of s2ft.

    Args:
        model: A PeftModel whose base belongs to a family that s2ft knows.
        adapter_name: Name of the adapter.

    Returns:
        The adapter, for :func:`s2ft.load_adapter` and for arithmetic, on the CPU. It shares no memory with the model.

    Raises:
        ValueError: The name is unknown, the base belongs to no known family or is sharded, or the adapter trains
            modules in no coupling, or single tokens.

    Example:
        >>> from peft import get_peft_model
        >>> from s2ft.peft import S2FTPeftConfig, to_native
        >>> peft_model = get_peft_model(model, S2FTPeftConfig(d_ratio=0.1), "math")
        >>> adapter = to_native(peft_model, "math")
        >>> base = peft_model.unload()
        >>> _ = s2ft.load_adapter(base, adapter)
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"no adapter is called {adapter_name!r}; there are {', '.join(model.peft_config)}")
    config, base = cast(Any, model.peft_config[adapter_name]), model.get_base_model()
    refuse(
        (
            config.base_fingerprint is None,
            f"adapter {adapter_name!r} has no fingerprint of its base: {type(base).__name__} does not belong to a "
            "model family that s2ft knows, or its weights are sharded",
        ),
        (
            config.uncoupled,
            f"adapter {adapter_name!r} trains {', '.join(config.uncoupled or ())} in no coupling, which an adapter of "
            "s2ft can't hold: keep it in PEFT's form, or merge it",
        ),
        (
            config.trainable_token_indices is not None,
            f"adapter {adapter_name!r} has embeddings of single tokens (trainable_token_indices), which an adapter of "
            "s2ft can't hold: keep it in PEFT's form, or merge it",
        ),
    )
    deltas = {
        name: delta
        for units, values in _values(base, config, adapter_name)
        for name, delta in units.split(values.detach().cpu()).items()
    }
    selection = Selection(unit_tensors(config.units, "units"))
    extra_weights = {
        f"{path}.{name}": value.detach().cpu().clone()
        for path, module in saved_modules(base, [adapter_name]).items()
        for name, value in module.modules_to_save[adapter_name].named_parameters()
    }
    return Adapter(
        adapter_name,
        S2FTConfig(units=config.units, layout="indexed"),
        selection,
        json.loads(config.base_fingerprint),
        deltas,
        {"base_model": config.base_model_name_or_path, **(config.info or {})},
        None if config.couplings is None else [Coupling.from_dict(one) for one in config.couplings],
        extra_weights=extra_weights,
    )


def saved_modules(base: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """Return the modules that adapters train in full, by path; of those that share a weight, the first.

    Args:
        base: The base of a PeftModel.
        names: Names of the adapters.

    Raises:
        ValueError: One shares its weight with a module that PEFT does not train with it.
    """
    found = {
        path: one
        for path, one in base.named_modules()
        if isinstance(one, ModulesToSaveWrapper) and set(names) & set(one.modules_to_save)
    }
    inside = tuple(f"{path}." for path in found)
    firsts = {id(getattr(one.original_module, "weight", one)): path for path, one in reversed(found.items())}
    for path, module in base.named_modules():
        first = firsts.get(id(getattr(module, "weight", module)))
        if first is not None and path not in found and not path.startswith(inside):
            raise ValueError(
                f"{first} shares its weight with {path}, which is not trained: set ensure_weight_tying=True"
            )
    return {path: found[path] for path in reversed(firsts.values())}


def _values(base: nn.Module, config: Any, adapter_name: str) -> Iterator[tuple[ModuleUnits, Tensor]]:
    """The units and the values of an adapter's delta on each weight."""
    for path, units in config.module_units.items():
        deltas = cast(S2FTPeftLayer, base.get_submodule(path)).deltas_of(adapter_name)
        yield from ((one, deltas[weight].values) for weight, one in units.items())


def from_native(
    model: nn.Module | PeftModel, adapter: Adapter | str, adapter_name: str = "default", **config
) -> PeftModel:
    """Add an adapter of s2ft to a PeftModel.

    Args:
        model: A PeftModel, or a plain base, which is wrapped in a new PeftModel.
        adapter: An :class:`s2ft.Adapter`, its folder, or its repository on the hub.
        adapter_name: Name of the adapter in the PeftModel.
        config: Further fields of :class:`S2FTPeftConfig`, for example task_type.

    Returns:
        The PeftModel.

    Raises:
        ValueError: The adapter has another base, or has extra weights.

    Example:
        >>> from s2ft.peft import from_native
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> adapter = s2ft.get_adapter(model, "default")
        >>> model = s2ft.detach(model)
        >>> peft_model = from_native(model, adapter, "math", task_type="CAUSAL_LM")
        >>> peft_model.active_adapter
        'math'
    """
    adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    if adapter.extra_weights:
        raise ValueError(
            f"adapter {adapter.name!r} has {next(iter(adapter.extra_weights))} trained in full, which can't be added "
            "to a PeftModel: load it with s2ft.load_adapter"
        )
    config = {
        "couplings": adapter.couplings,
        "base_fingerprint": json.dumps(adapter.fingerprint),
        "info": adapter.info or None,
        **config,
    }
    settings = S2FTPeftConfig(units=cast(Any, adapter.selection), **config)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, settings)
    else:
        model = get_peft_model(model, settings, adapter_name)
    base = model.get_base_model()
    with torch.no_grad():
        for units, values in _values(base, model.peft_config[adapter_name], adapter_name):
            values.copy_(units.join(adapter.deltas))
    return model
