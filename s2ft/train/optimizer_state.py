"""The state of an optimizer in one file that does not depend on the number of ranks or on how they share parameters.

The tensors are complete, and each parameter has its name in the model. Otherwise the file is the state_dict of torch's
optimizers, so an optimizer of whole parameters loads it as it is.
"""

# Tried instead: get_optimizer_state_dict and set_optimizer_state_dict of torch.distributed.checkpoint (torch 2.13) with
# full_state_dict. They refuse a parameter that has no state yet (an expert without tokens) and fail for an optimizer
# without states (SGD), set runs a step of the optimizer, and neither knows ZeRO, so that names and groups stayed here.

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import count, islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2ft.distributed import (
    all_ranks,
    full_shape,
    full_tensors,
    is_dtensor,
    is_partitioned,
    reshard_all,
    wait_for_ranks,
)

NAMES = "parameter_names"  # for each group, the names of its parameters
OF_GROUPS = ("base_lrs", "_last_lr", "lr_lambdas")  # of the state of a schedule: lists with an entry for each group
WRAPPERS = re.compile(r"_checkpoint_wrapped_module\.|_orig_mod\.")  # what wrappers add to names


def gather_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return the state of an optimizer with complete tensors, on the CPU.

    Every rank must call this if parameters are spread over ranks.

    Args:
        optimizer: The optimizer.
        model: The model that has its parameters.

    Raises:
        RuntimeError: A rank did not call in time, or has ended.
    """
    reshard_all(model)
    state = optimizer.state_dict()
    full = full_tensors(
        {
            f"{number} {key}": value
            for number, values in state["state"].items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }
    )
    complete = {
        number: {
            key: full[f"{number} {key}"].cpu() if isinstance(value, Tensor) else value for key, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": complete, NAMES: names_of(_groups(optimizer), model)}


def load_state(optimizer: torch.optim.Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> list[int | None]:
    """Load what :func:`gather_state` returned, on any number of ranks. Each rank takes its shards.

    Args:
        optimizer: An optimizer of the same class.
        model: The model that has its parameters.
        saved: The state.

    Returns:
        The number of the saved group for each group of the optimizer, for :func:`load_schedule`.

    Raises:
        ValueError: The state is of an optimizer with other parameters. Nothing has changed.
    """
    reshard_all(model)
    groups = _groups(optimizer)
    places = places_of(saved, names_of(groups, model))
    placed = [pair for group, of_group in zip(groups, places) for pair in zip(group, of_group)]
    state = {
        number: {key: _spread(value, parameter) for key, value in saved["state"][place].items()}
        for number, (parameter, place) in enumerate(placed)
        if place in saved["state"]
    }
    order = order_of(saved, places)
    options = in_order(saved["param_groups"], order, optimizer.param_groups)
    optimizer.load_state_dict({**saved, "state": state, "param_groups": numbered(options, groups)})
    return order


def names_of(groups: Iterable[Iterable[nn.Parameter]], model: nn.Module) -> list[list[str]]:
    """Return the names of the parameters of each group, without what wrappers add to names."""
    names = {id(parameter): WRAPPERS.sub("", name) for name, parameter in model.named_parameters()}
    numbers = count()  # of parameters outside of the model, such as a loss's
    return [[names.get(id(one)) or f"outside of the model {next(numbers)}" for one in group] for group in groups]


def places_of(saved: Mapping[str, Any], names: Sequence[Sequence[str]]) -> list[list[int]]:
    """Return the numbers that parameters have in a saved state, for each group.

    Args:
        saved: The saved state.
        names: The names of the parameters of each group.

    Raises:
        ValueError: The state is of an optimizer with other parameters.
    """
    if sorted(sorted(group) for group in names if group) != sorted(sorted(group) for group in saved[NAMES] if group):
        raise ValueError("the optimizer's state is of other parameters than this run trains, or of other groups")
    places = {
        name: place
        for group, of_group in zip(saved["param_groups"], saved[NAMES])
        for name, place in zip(of_group, group["params"])
    }
    return [[places[name] for name in of_group] for of_group in names]


def order_of(saved: Mapping[str, Any], places: Sequence[Sequence[int]]) -> list[int | None]:
    """Return the number of the saved group for each group; None for one without parameters, which DeepSpeed removes.

    Args:
        saved: The saved state.
        places: What :func:`places_of` returned.
    """
    by_place = {place: number for number, group in enumerate(saved["param_groups"]) for place in group["params"]}
    return [by_place[place[0]] if place else None for place in places]


def in_order(saved: Sequence[Any], order: Sequence[int | None], present: Sequence[Any]) -> list[Any]:
    """Return an entry for each group: the saved one, or the present one for a group that has none."""
    return [now if number is None else saved[number] for number, now in zip(order, present)]


def load_schedule(schedule: Any, saved: Mapping[str, Any], order: Sequence[int | None]) -> None:
    """Load the state of a schedule, which has an entry for each group of its optimizer.

    Args:
        schedule: The schedule.
        saved: Its state.
        order: What :func:`order_of` returned.
    """
    present = schedule.state_dict()
    changed = {name: in_order(saved[name], order, present[name]) for name in OF_GROUPS if name in saved}
    schedule.load_state_dict({**saved, **changed})


def numbered(options: Iterable[Mapping[str, Any]], groups: Iterable[Sequence[Any]]) -> list[dict[str, Any]]:
    """Return the options of groups as a state_dict has them, with a number for each parameter."""
    numbers = count()
    return [{**options_of(one), "params": [*islice(numbers, len(group))]} for one, group in zip(options, groups)]


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group, such as the learning rate, without its parameters."""
    return {key: value for key, value in group.items() if key != "params"}


def _groups(optimizer: torch.optim.Optimizer) -> list[list[nn.Parameter]]:
    return [group["params"] for group in optimizer.param_groups]


def _spread(value: Any, parameter: Tensor) -> Any:
    """Return a value of the state, divided over the ranks as its parameter is."""
    if not isinstance(value, Tensor) or not is_dtensor(parameter) or value.dim() == 0:
        return value
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = parameter.device_mesh  # other shapes are such as the sums of rows and columns of Adafactor
    placements = parameter.placements if value.shape == parameter.shape else [Replicate()] * mesh.ndim
    return distribute_tensor(value, mesh, placements, src_data_rank=None)  # without communication


# ---- DeepSpeed's ZeRO -----------------------------------------------------------------------------------


COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")  # attributes of DeepSpeed's engine
ENGINE, SCALER = "deepspeed_engine", "deepspeed_loss_scaler"
# Attributes of ZeRO's optimizers: the lists of parameters, and of this rank's flat part of each list. The first is of
# stages 1 and 2, the second of stage 1 in bfloat16, the third of stage 3, whose lists are parts of the groups.
LISTS = (
    ("bit16_groups", "single_partition_of_fp32_groups"),
    ("bf16_groups", "fp32_groups_flat_partition"),
    ("fp16_groups", "fp32_partitioned_groups_flat"),
)


def is_zero(engine) -> bool:
    """Whether ZeRO divides the state of a DeepSpeed engine's optimizer, in a way that is known here."""
    return any(hasattr(engine.optimizer, lists) and hasattr(engine.optimizer, parts) for lists, parts in LISTS)


def gather_zero_state(engine) -> dict[str, Any]:
    """Return the state of the optimizer of a DeepSpeed engine with complete tensors, on the CPU.

    Every rank must call this.

    Args:
        engine: The engine, with ZeRO of any stage.

    Raises:
        RuntimeError: A rank did not call in time, or has ended.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    wait_for_ranks("gathering the optimizer's state", all_ranks())
    zero, base = engine.optimizer, engine.optimizer.optimizer
    groups, state = _zero_groups(zero), {}
    flat = next((flat for flat, _ in _parts(zero) if base.state.get(flat)), None)
    values = {} if flat is None else base.state[flat]
    whole = [key for key, value in values.items() if isinstance(value, Tensor) and value.shape == flat.shape]
    common = {key: value for key, value in values.items() if key not in whole}
    for number, parameter in enumerate(parameter for group in groups for parameter in group if values):
        full = {key: safe_get_full_optimizer_state(parameter, key).cpu() for key in whole}
        state[number] = {**{key: copy.deepcopy(value) for key, value in common.items()}, **full}
    scaler = vars(zero.loss_scaler) if hasattr(zero, "loss_scaler") else {}
    return {
        "state": state,
        "param_groups": numbered(base.param_groups, groups),
        NAMES: names_of(groups, engine.module),
        ENGINE: {name: getattr(engine, name) for name in COUNTERS},
        SCALER: {name: value for name, value in scaler.items() if isinstance(value, (bool, int, float))},
    }


def load_zero_state(engine, saved: Mapping[str, Any]) -> list[int | None]:
    """Load a state of any number of ranks, of ZeRO or of an optimizer of whole parameters.

    Args:
        engine: An engine that has not trained yet.
        saved: What :func:`gather_zero_state` or :func:`~s2ft.train.optimizer_state.gather_state` returned.

    Returns:
        The number of the saved group for each group of the optimizer.

    Raises:
        ValueError: The state is of an optimizer with other parameters. Nothing has changed.
    """
    zero, base = engine.optimizer, engine.optimizer.optimizer
    groups = _zero_groups(zero)
    places = places_of(saved, names_of(groups, engine.module))
    values = {
        parameter: saved["state"].get(place, {})
        for group, of_group in zip(groups, places)
        for parameter, place in zip(group, of_group)
    }
    order = order_of(saved, places)
    for group, options in zip(base.param_groups, in_order(saved["param_groups"], order, base.param_groups)):
        group.update(options_of(options))
    for flat, parameters in _parts(zero):
        base.state[flat] = {
            key: torch.zeros_like(flat) if _is_whole(value, parameters[0]) else copy.deepcopy(value)
            for key, value in values[parameters[0]].items()
        }
    if not any(map(is_partitioned, values)):  # stages 1 and 2 look a state up by its parameter
        zero._lazy_init_hp_params_optimizer_state()
    for parameter, of_parameter in values.items():
        for key, value in of_parameter.items():
            if _is_whole(value, parameter):
                _set(parameter, key, value)
    for owner, entries in ((engine, saved.get(ENGINE)), (getattr(zero, "loss_scaler", None), saved.get(SCALER))):
        for name, value in (entries or {}).items():
            setattr(owner, name, value)
    return order


def _parts(zero) -> list[tuple[Tensor, list[nn.Parameter]]]:
    """This rank's flat parts, each with the parameters that it is a part of."""
    lists, parts = next(names for names in LISTS if all(hasattr(zero, name) for name in names))
    return list(zip(getattr(zero, parts), getattr(zero, lists)))


def _zero_groups(zero) -> list[list[nn.Parameter]]:
    """The trained parameters of each group of the optimizer."""
    lists = [parameters for _, parameters in _parts(zero)]
    if not hasattr(zero, "sub_group_to_group_id"):
        return [list(group) for group in lists]
    groups: list[list[nn.Parameter]] = [[] for _ in zero.optimizer.param_groups]
    for number, parameters in enumerate(lists):
        groups[zero.sub_group_to_group_id[number]] += parameters
    return groups


def _is_whole(value: Any, parameter: nn.Parameter) -> bool:
    """Whether a value of the state has an entry for each entry of the parameter."""
    return isinstance(value, Tensor) and value.shape == full_shape(parameter)


def _set(parameter: nn.Parameter, key: str, value: Tensor) -> None:
    """Write this rank's part of a complete tensor of the state."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not is_partitioned(parameter):
        safe_set_full_optimizer_state(parameter, value, key)
        return
    size, group = parameter.ds_tensor.numel(), parameter.ds_process_group
    padded = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size(group) - value.numel()))
    safe_set_local_optimizer_state(parameter, padded.narrow(0, size * dist.get_rank(group), size), key)
