"""Which modules a config trains, and which of the requested ones it can't."""

import inspect
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn

from s2ft.layers import OTHER, forward_of, kind_of
from s2ft.model.coupling import SIDES, Coupling, Projection, by_key, projections_of, unit_name
from s2ft.model.parts import couplings_in_towers
from s2ft.model.registry import check_module
from s2ft.model.weights import weight_at
from s2ft.peft.adapter_config import S2FTPeftConfig
from s2ft.selection import unit_tensors

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the head
HEADS = {  # which PEFT trains in full by itself, by the task
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
SHOWN = 5  # names in a warning


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


def warn_of_skipped(skipped: dict[str, str], trained: int) -> None:
    """Warn about what is not trained, with the count and the first names.

    Args:
        skipped: Why modules or projections that a config asks for are not trained, by name.
        trained: How many others are trained.
    """
    if not skipped:
        return
    by_reason = by_key((reason, name) for name, reason in skipped.items())
    parts = (
        f"{len(names)} {reason} ({', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)})"
        for reason, names in by_reason.items()
    )
    warnings.warn(
        f"{len(skipped)} of {len(skipped) + trained} layers are not trained: {'; '.join(parts)}. "
        "config.skipped has their names",
        stacklevel=2,
    )


def find_targets(
    config: S2FTPeftConfig, model: nn.Module, couplings: list[Coupling]
) -> tuple[S2FTPeftConfig, list[Any], list[str], dict[str, str]]:
    """Find what a config trains of a model.

    Args:
        config: The config, with its options or with the units of an earlier selection.
        model: The base, without the layers of adapters.
        couplings: Its couplings.

    Returns:
        - The config, with the names of the modules in place of "all-linear".
        - The projections from which units are selected, as :class:`Targets`.
        - Paths of the modules that are in no coupling. Their units are single inputs or outputs.
        - Why modules or projections that the config asks for are not trained, by name.

    Raises:
        ValueError: Something can't be trained; the message names the field or module.
    """
    config, skipped = _named_linears(config, model)
    names = None if config.units is None else unit_tensors(config.units, "units")
    if names is not None:  # modules that were in no coupling when the adapter was made stay so, in a later s2ft
        apart = set(config.uncoupled or ())
        couplings = [one for one in couplings if not any(projection.path in apart for projection in one.projections)]
    if config.ratios:
        couplings = couplings_in_towers(model, couplings, config)
    targets: list[Any] = []  # Targets
    for coupling in couplings:
        trained = tuple(projection for projection in coupling.projections if _is_trained(config, names, projection))
        if trained:
            targets.append(Targets(coupling.kind, coupling.layer, trained))
    _check_coupled(config, couplings, targets)
    coupled = {projection.path for projection in projections_of(couplings)}
    uncoupled = [
        path
        for path, _ in model.named_modules()
        if path and path not in coupled and (_is_target(config, path) if names is None else path in names)
    ]
    targets += [_uncoupled(config, model, path) for path in uncoupled]
    stacks = [
        path for path, _ in model.named_parameters() if path not in coupled and _is_target_parameter(config, path)
    ]
    targets += [_uncoupled_stack(config, model, path) for path in stacks]
    targets = _large_enough(config, targets, skipped)
    if names is not None:
        _check_units(config, names, model, targets)
    paths = {projection.path for projection in projections_of(targets)}
    return config, targets, [path for path in uncoupled if path in paths], skipped


# ---- all-linear ----------------------------------------------------------------------------------------


def _named_linears(config: S2FTPeftConfig, model: nn.Module) -> tuple[S2FTPeftConfig, dict[str, str]]:
    """Replace "all-linear" by the names of the modules that can be trained. PEFT decides which are linear layers.

    Returns:
        A config with names, and why other linear layers are left out, by name.
    """
    if not isinstance(config.target_modules, str) or config.target_modules.lower() != ALL_LINEAR:
        return config, {}
    named: Any = _maybe_include_all_linear_layers(replace(config), model)
    inside = tuple(f"{path}." for path, one in model.named_modules() if isinstance(one, AuxiliaryTrainingWrapper))
    heads = HEADS.get(cast(str, config.task_type), ())
    named.target_modules = {
        path for path in named.target_modules if not path.startswith(inside) and path.partition(".")[0] not in heads
    }
    owners, skipped, saves_heads = _owners(model), {}, _saves_heads(model)
    for path in sorted(named.target_modules):
        reason = _obstacle(model, path, owners)
        if reason is None and path in EMBEDDING_LAYER_NAMES and not saves_heads:
            reason = "that is a head, which PEFT can't save for this model"
        if reason is not None and _is_target(named, path):
            skipped[path] = reason
    if skipped and not any(_is_target(named, path) for path in named.target_modules - skipped.keys()):
        name = min(skipped)
        raise ValueError(f"target_modules={ALL_LINEAR!r}: no linear layer can be trained; {name} {skipped[name]}")
    named.target_modules -= skipped.keys()
    return named, skipped


def _owners(model: nn.Module) -> Counter:
    """In how many places each module and parameter is, by its id."""
    parts = (part for one in model.modules() for part in (*one._modules.values(), *one._parameters.values()))
    return Counter(id(part) for part in parts)


def _saves_heads(model: nn.Module) -> bool:
    """Whether PEFT can save a head in `target_modules`. It asks the model for its embeddings then, which may fail."""
    try:
        getattr(model, "get_input_embeddings", list)()
    except NotImplementedError:
        return False
    return True


def _obstacle(model: nn.Module, path: str, owners: Counter) -> str | None:
    """Why a linear layer can't be trained, as a sentence without its subject; None if it can."""
    module = model.get_submodule(path)
    kind = kind_of(module)
    parent, _, name = path.rpartition(".")
    if kind.layers is None:
        return f"of type {type(module).__name__}" if kind is OTHER else f"of the kind {kind.name}"
    if owners[id(module)] > 1 or owners[id(module.weight)] > 1:
        return "with a weight that other modules use too"
    if _only_reads_weight(type(model.get_submodule(parent)), name):  # type: ignore[arg-type]
        return "whose weight is used without running the layer"
    return None


@cache
def _only_reads_weight(parent: type, name: str) -> bool:
    """Whether the code of a class reads the weight of a layer and never calls the layer, such as some routers do.

    A layer in its place would have no effect. If there is no code to read, the layer counts as one that is called.
    """
    try:
        own = [one for one in parent.__mro__ if not f"{one.__module__}.".startswith(("torch.", "builtins."))]
        code = "".join(map(inspect.getsource, own))
    except (OSError, TypeError):
        return False
    return f"self.{name}.weight" in code and f"self.{name}(" not in code


# ---- what is trained -----------------------------------------------------------------------------------


def _is_trained(config: S2FTPeftConfig, names: dict[str, Tensor] | None, projection: Projection) -> bool:
    if names is not None:
        return projection.name in names
    if projection.expert is not None and not config.ratios:
        return _is_target_parameter(config, projection.path)
    if config.target_modules is not None or config.target_parameters is not None:
        return projection.expert is None and _is_target(config, projection.path)
    # PEFT's other fields, such as layers_to_transform, restrict the ratios
    last = SimpleNamespace(**{**vars(config), "target_modules": [projection.path.rpartition(".")[2]]})
    return projection.key in config.ratios and _is_target(last, projection.path)


def _is_target(config, path: str) -> bool:
    """Whether PEFT's rules make the module a target."""
    return config.target_modules is not None and bool(check_target_module_exists(config, path))


def _is_target_parameter(config, path: str) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in config.target_parameters or ())


def _uncoupled(config: S2FTPeftConfig, model: nn.Module, path: str) -> Targets:
    """A module in no coupling. Its units are single inputs, or single outputs if the config says so."""
    check_module(model.get_submodule(path), path)
    dim = SIDES.index(config.dim or "inputs")
    shape = weight_at(model, Projection("ud"[dim], path, 1, 1, dim)).shape
    return Targets(f"module {path}", 0, (Projection("ud"[dim], path, shape[dim], 1, dim),))


def _uncoupled_stack(config: S2FTPeftConfig, model: nn.Module, path: str) -> Targets:
    """Stacked experts in no coupling. Their units are single inputs, or single outputs if the config says so."""
    owner, weight = model.get_submodule(path.rpartition(".")[0]), model.get_parameter(path)
    if weight.dim() != 3:
        raise ValueError(
            f"target_parameters names {path}, a parameter of {weight.dim()} dimensions, and stacked experts have 3: "
            "name the module of a layer in target_modules"
        )
    forward_of(owner)  # raises for a module that runs its experts in an unknown way
    dim, transposed = SIDES.index(config.dim or "inputs"), bool(getattr(owner, "is_transposed", False))
    count = weight.shape[2 - dim if transposed else 1 + dim]
    parts = (
        Projection("ud"[dim], path, count, 1, dim, expert=expert, transposed=transposed)
        for expert in range(weight.shape[0])
    )
    return Targets(f"experts {path}", 0, tuple(parts))


def _large_enough(config: S2FTPeftConfig, targets: list[Any], skipped: dict[str, str]) -> list[Any]:
    """The targets that have a unit to train at the config's ratio. The others are added to `skipped`.

    Raises:
        ValueError: None of them has.
    """
    if config.ratio is None:
        return targets
    found = []
    for target in targets:
        kept = tuple(one for one in target.projections if int(config.ratio * one.count + 0.5))
        small = [one.name for one in target.projections if one not in kept]
        skipped.update(dict.fromkeys(small, f"with less than one unit at ratio={config.ratio}"))
        if kept:
            found.append(replace(target, projections=kept))
    if targets and not found:
        largest = max(projections_of(targets), key=lambda projection: projection.count)
        raise ValueError(
            f"ratio={config.ratio} selects none of the {largest.count} {unit_name(largest)} of {largest.name}, and no "
            "target module has more units: use a higher ratio"
        )
    return found


# ---- checks --------------------------------------------------------------------------------------------


def _check_coupled(config: S2FTPeftConfig, couplings: list[Coupling], targets: list[Any]) -> None:
    """Check the fields that concern modules in couplings."""
    left = {projection.key for projection in projections_of(targets)}
    for key in {projection.key for projection in projections_of(couplings)} & config.ratios.keys() - left:
        raise ValueError(
            f"{key}_ratio: modules_to_save, exclude_modules or layers_to_transform excludes all of its modules"
        )
    for projection in projections_of(targets):
        if config.dim is not None and config.dim != SIDES[projection.dim]:
            raise ValueError(
                f"dim={config.dim!r}, but the units of {projection.path} are its {SIDES[projection.dim]}: dim is for "
                "modules that are in no coupling"
            )


def _check_units(config: S2FTPeftConfig, names: dict[str, Tensor], model: nn.Module, targets: list[Any]) -> None:
    """Check that all named units exist, and that they belong to the target modules."""
    missing = names.keys() - {projection.name for projection in projections_of(targets)}
    if missing:
        raise ValueError(f"units names {min(missing)}, which is not a projection or module of this model")
    if config.target_modules is None:
        return
    paths = {projection.path for projection in projections_of(targets) if projection.expert is None}
    matched = {path for path, _ in model.named_modules() if path and _is_target(config, path)}
    unmatched, unnamed = sorted(paths - matched), sorted(matched - paths)
    if unmatched:
        raise ValueError(f"units names {unmatched[0]}, which is not in target_modules, or is excluded")
    if unnamed:
        raise ValueError(f"target_modules has {unnamed[0]}, but units names no unit of it")
