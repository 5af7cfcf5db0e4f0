"""The state of DeepSpeed's ZeRO optimizers in the form of :mod:`s2ft.train.optimizer_state`.

ZeRO flattens the parameters of a group and gives each rank a part, so DeepSpeed's own checkpoints can only be loaded by
the same number of ranks.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2ft.distributed import all_ranks, is_partitioned, wait_for_ranks
from s2ft.train.optimizer_state import NAMES, in_order, names_of, numbered, options_of, order_of, places_of

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

    ranks = all_ranks()
    if ranks is not None:
        wait_for_ranks("gathering the optimizer's state", ranks)
    zero, base = engine.optimizer, engine.optimizer.optimizer
    groups, state = _groups(zero), {}
    flat = next((flat for flat, _ in _parts(zero) if base.state.get(flat)), None)
    values = {} if flat is None else base.state[flat]
    whole = [key for key, value in values.items() if isinstance(value, Tensor) and value.shape == flat.shape]
    common = {key: value for key, value in values.items() if key not in whole}
    for number, parameter in enumerate(parameter for group in groups for parameter in group if values):
        full = {key: safe_get_full_optimizer_state(parameter, key).cpu() for key in whole}
        state[number] = {**{key: _copy(value) for key, value in common.items()}, **full}
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
    groups = _groups(zero)
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
            key: torch.zeros_like(flat) if _is_whole(value, parameters[0]) else _copy(value)
            for key, value in values[parameters[0]].items()
        }
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2 look a state up by its parameter
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


def _groups(zero) -> list[list[nn.Parameter]]:
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
    return isinstance(value, Tensor) and value.shape == getattr(parameter, "ds_shape", parameter.shape)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _set(parameter: nn.Parameter, key: str, value: Tensor) -> None:
    """Write this rank's part of a complete tensor of the state."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not is_partitioned(parameter):
        safe_set_full_optimizer_state(parameter, value, key)
        return
    size, group = parameter.ds_tensor.numel(), parameter.ds_process_group
    padded = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size(group) - value.numel()))
    safe_set_local_optimizer_state(parameter, padded.narrow(0, size * dist.get_rank(group), size), key)
