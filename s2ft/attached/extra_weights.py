"""Extra weights: parameters outside the couplings that are trained in full, such as a new head or an unfrozen norm.

Every parameter that requires a gradient is an extra weight, unless it is a slice or belongs to a coupling. The record
keeps the values before training, so that the base can be restored. A value is recorded before its parameter is written,
and writing a recorded value twice changes nothing: after an interrupt at any moment :func:`take_off` restores the base.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from s2ft.attached.record import Attachment
from s2ft.distributed import full_tensors, has_master_copy, is_partitioned, is_sharded, reads_weights, write_units
from s2ft.model.coupling import Coupling, projections_of

UNFROZEN = (
    "s2ft gives it no gradient while its units are trained as slices: set its requires_grad to False and train "
    "more units instead (the ratios of S2FTConfig), or s2ft.detach the model first"
)


# ---- which weights these are ---------------------------------------------------------------------------


def names_of_modules(model: nn.Module, couplings: list[Coupling], modules: Sequence[str] | None) -> list[str]:
    """Return the names of the parameters that a config's `modules_to_save` asks for.

    Args:
        model: The model.
        couplings: Its couplings.
        modules: Full paths of modules, or the last parts of their paths.

    Raises:
        ValueError: A name belongs to no module, or a module has no parameter that can be trained, or it contains a
            weight of a coupling.
    """
    parameters, coupled = dict(model.named_parameters()), coupled_names(couplings)
    known = {id(parameter): name for name, parameter in parameters.items()}
    names = []
    for asked in modules or ():
        paths = [path for path, _ in model.named_modules() if path == asked or path.endswith(f".{asked}")]
        if not paths:
            raise ValueError(
                f"modules_to_save names {asked!r}, which is not a module of {type(model).__name__}: its "
                f"modules are {', '.join(name for name, _ in model.named_children())} and those inside"
            )
        found = [known[id(parameter)] for path in paths for parameter in model.get_submodule(path).parameters()]
        inside = next((name for name in found if name in coupled), None)
        if inside is not None:
            raise ValueError(
                f"modules_to_save names {asked!r}, which holds {inside}, a weight whose units are trained "
                "as slices: name modules outside the couplings, and train more units by the ratios"
            )
        if not found or not all(parameters[name].is_floating_point() for name in found):
            raise ValueError(f"modules_to_save names {asked!r}, which has no floating-point weights to train")
        names += found
    return list(dict.fromkeys(names))


def coupled_names(couplings: list[Coupling]) -> set[str]:
    """Return the names that the couplings' weights, biases and vectors have, with trainable layers mounted or not."""
    ends = ("", ".weight", ".bias", ".linear.weight", ".linear.bias")
    return {projection.path + end for projection in projections_of(couplings) for end in ends} | {
        vector.path for coupling in couplings for vector in coupling.vectors
    }


def trained_parameters(model: nn.Module, record: Attachment) -> dict[str, nn.Parameter]:
    """Return the extra weights of the trainable adapter by name, recorded or unfrozen since."""
    if record.name is None:
        return {}
    slices = {id(mount.layer.s2) for mount in record.mounts.values()}
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name in record.extra.base or (parameter.requires_grad and id(parameter) not in slices)
    }
    coupled = coupled_names(record.couplings) if len(found) > len(record.extra.base) else ()
    return {name: parameter for name, parameter in found.items() if name not in coupled}


# ---- recording values before training ------------------------------------------------------------------


def unfreeze(model: nn.Module, record: Attachment, names: Iterable[str]) -> None:
    """Record the values of parameters, then make them require a gradient."""
    parameters = dict(model.named_parameters())
    chosen = {name: parameters[name] for name in names}
    _keep(record, chosen)
    for parameter in chosen.values():
        (_with_address(model, parameter) if parameter.is_meta else parameter).requires_grad_(True)


def _with_address(model: nn.Module, parameter: nn.Parameter) -> nn.Parameter:
    """Put a parameter on the CPU in place of one on the meta device. Its memory is never written, so it costs nothing.

    accelerate tells the parameters of an optimizer apart by their address, and those on the meta device have none.
    """
    made = nn.Parameter(torch.empty_like(parameter, device="cpu"))
    for module in model.modules():
        for name in [name for name, found in module._parameters.items() if found is parameter]:
            module._parameters[name] = made
    return made


def watch(model: nn.Module, record: Attachment) -> None:
    """Record the values of parameters that were unfrozen by hand. This runs before every training forward.

    Raises:
        RuntimeError: A weight or bias of a coupling was unfrozen, or a parameter that DeepSpeed already holds.
    """
    if record.name is None:
        return
    known = {id(mount.layer.s2) for mount in record.mounts.values()}
    known |= {id(model.get_parameter(name)) for name in record.extra.base}
    if not _trains_more(model, known):
        return
    unfrozen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in known
    }
    wrong = sorted(coupled_names(record.couplings).intersection(unfrozen))
    if wrong:
        raise RuntimeError(f"{wrong[0]} requires a gradient, and {UNFROZEN}")
    for name, parameter in unfrozen.items():
        if is_partitioned(parameter) or has_master_copy(parameter):
            raise RuntimeError(
                f"{name} was unfrozen by hand, and DeepSpeed already holds it, so that its value before "
                "training can't be kept: name its module in S2FTConfig's modules_to_save instead"
            )
    _keep(record, unfrozen)


def _trains_more(model: nn.Module, known: set[int]) -> bool:
    """Whether a parameter with another id requires a gradient. It runs every step; named_parameters is slower."""
    modules = [model]
    while modules:
        module = modules.pop()
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad and id(parameter) not in known:
                return True
        modules += [child for child in module._modules.values() if child is not None]
    return False


def keep_unfrozen(model: nn.Module, record: Attachment) -> None:
    """Record the values of parameters that were unfrozen by hand, before anything but training changes them."""
    _keep(record, trained_parameters(model, record))


def _keep(record: Attachment, parameters: Mapping[str, Tensor]) -> None:
    new = {name: parameter for name, parameter in parameters.items() if name not in record.extra.base}
    if new:
        arrive = record.awaits_weights and not reads_weights()  # the values here are not the base's
        kept = {name: value.detach().to("meta") for name, value in new.items()} if arrive else copies(new)
        record.extra.base = {**record.extra.base, **kept}


def copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return full copies. Parameters that are spread over ranks are gathered: each of these ranks must call this."""
    return {name: value.clone() for name, value in full_tensors(parameters).items()}


# ---- switching -----------------------------------------------------------------------------------------


def take_off(model: nn.Module, record: Attachment) -> None:
    """Write the base into every extra weight, bit for bit. The trained values are kept."""
    extra = record.extra
    if not extra.base and not extra.overwritten:
        return
    parameters = dict(model.named_parameters())
    aside = extra.trained or {}
    if extra.base.keys() - aside.keys():  # parameters that hold trained values
        extra.trained = {**aside, **copies({name: parameters[name] for name in extra.base if name not in aside})}
    _write(parameters, {**extra.overwritten, **extra.base})
    extra.overwritten = {}


def put_on(model: nn.Module, record: Attachment, weights: Mapping[str, float]) -> None:
    """Write the extra weights of the adapters that become active. No adapter may be active."""
    extra = record.extra
    values = {
        name: value
        for adapter in weights
        if adapter != record.name
        for name, value in record.loaded[adapter].extra_weights.items()
    }
    trained = extra.trained if weights.get(record.name) == 1 and extra.trained is not None else {}
    if values or trained:
        parameters = dict(model.named_parameters())
        extra.overwritten = copies({name: parameters[name] for name in values})
        _write(parameters, {**values, **trained})
    if record.name in weights:
        extra.trained = None


def check_can_put_on(model: nn.Module, record: Attachment, weights: Mapping[str, float]) -> None:
    """Raise ValueError if an extra weight would be scaled, or two adapters have the same one."""
    owners: dict[str, str] = {}
    for adapter, weight in weights.items():
        names = trained_parameters(model, record) if adapter == record.name else record.loaded[adapter].extra_weights
        for name in names:
            if weight != 1:
                raise ValueError(
                    f"adapter {adapter!r} has {name} trained in full, which can't be scaled: give the "
                    f"adapter weight 1, not {weight:g}"
                )
            if name in owners:
                raise ValueError(
                    f"adapters {owners[name]!r} and {adapter!r} both have {name} trained in full, and the "
                    "model can hold one: make one of them active"
                )
            owners[name] = adapter


def _write(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameter = parameters[name]
        if is_sharded(parameter) or has_master_copy(parameter):
            write_units(parameter, torch.arange(value.shape[0]), value, 0)
        else:
            parameter.detach().copy_(value)


# ---- saving and loading --------------------------------------------------------------------------------


def trained_values(
    model: nn.Module, record: Attachment, state: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return copies of the trainable adapter's extra weights, by name.

    Args:
        model: The model. If it is sharded, every rank must call this.
        record: Its record.
        state: A gathered state_dict that has them. Default: the model's parameters.

    Raises:
        ValueError: The state lacks an extra weight, or has a shard of one.
    """
    parameters, aside = trained_parameters(model, record), record.extra.trained or {}
    left = {name: parameter for name, parameter in parameters.items() if name not in aside}
    if state is not None:
        for name, parameter in left.items():
            _check_in_state(name, parameter, state)
        found = {name: state[name].detach().clone() for name in left}
    else:
        found = copies(left) if left else {}
    return {name: found[name] if name in found else aside[name].clone() for name in parameters}


def _check_in_state(name: str, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
    if name not in state:
        raise ValueError(f"the state given to save has no {name}, which is trained")
    shape = getattr(parameter, "ds_shape", parameter.shape)
    if state[name].shape != shape:
        raise ValueError(
            f"the state given to save has {name} of shape {tuple(state[name].shape)}, not {tuple(shape)}: "
            "give a state that was gathered"
        )


def check_fits(model: nn.Module, record: Attachment, adapter: str, values: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a weight that the model doesn't have, that has another shape, or that is of a coupling."""
    if not values:
        return
    parameters, coupled = dict(model.named_parameters()), coupled_names(record.couplings)
    for name, value in values.items():
        if name not in parameters or name in coupled or name.endswith(".s2"):
            raise ValueError(
                f"adapter {adapter!r} is for another model: this one has no weight {name} outside its couplings"
            )
        shape = getattr(parameters[name], "ds_shape", parameters[name].shape)
        if value.shape != shape or not parameters[name].is_floating_point():
            raise ValueError(
                f"adapter {adapter!r} is for another model: {name} has shape {tuple(value.shape)}, this "
                f"model has {tuple(shape)} of {parameters[name].dtype}"
            )


def check_same(model: nn.Module, record: Attachment, values: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a saved adapter has other extra weights than this model trains."""
    ours = trained_parameters(model, record)
    more, less = sorted(values.keys() - ours.keys()), sorted(ours.keys() - values.keys())
    if more:
        raise ValueError(
            f"the adapter to load has {more[0]} trained in full, which is frozen in this model: name its "
            "module in modules_to_save, or set its requires_grad, as in the run that saved it"
        )
    if less:
        raise ValueError(
            f"this model trains {less[0]} in full, which the adapter to load does not have: freeze it, as "
            "in the run that saved the adapter"
        )


def set_trained(model: nn.Module, record: Attachment, values: Mapping[str, Tensor]) -> None:
    """Give the trainable adapter these extra weights, after the values before training are recorded."""
    if not values:
        return
    keep_unfrozen(model, record)
    if record.awaits_weights:
        record.extra.arriving = {name: value.clone() for name, value in values.items()}
        return
    if record.extra.trained is not None:  # the adapter is not active
        record.extra.trained = {**record.extra.trained, **{name: value.clone() for name, value in values.items()}}
        return
    _write(dict(model.named_parameters()), values)
