"""The state of an optimizer in one file that does not depend on the number of ranks or on how they share parameters.

The tensors are complete, and each parameter has its name in the model. Otherwise the file is the state_dict of torch's
optimizers, so an optimizer of whole parameters loads it as it is.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.distributed import full_tensors, is_dtensor, reshard_all

NAMES = "parameter_names"  # for each group, the names of its parameters
INSIDE_NAMES = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")  # what wrappers add to names


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
    spread = {
        f"{number} {key}": value
        for number, values in state["state"].items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }
    full = full_tensors(spread)
    complete = {
        number: {
            key: full[f"{number} {key}"].cpu() if isinstance(value, Tensor) else value for key, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": complete, NAMES: _names(optimizer, model)}


def load_state(optimizer: torch.optim.Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Load what :func:`gather_state` returned, on any number of ranks. Each rank takes its shards.

    Args:
        optimizer: An optimizer of the same class.
        model: The model that has its parameters.
        saved: The state.

    Raises:
        ValueError: The state is of an optimizer with other parameters. Nothing has changed.
    """
    reshard_all(model)
    names = _names(optimizer, model)
    if [sorted(group) for group in names] != [sorted(group) for group in saved[NAMES]]:
        mine, theirs = ({name for group in groups for name in group} for groups in (names, saved[NAMES]))
        different = ", ".join(sorted(mine ^ theirs)[:3]) or "the same ones in other groups"
        raise ValueError(f"the optimizer's state is of other parameters than this run trains: {different}")
    numbers = {
        name: number
        for group, of_group in zip(saved["param_groups"], saved[NAMES])
        for name, number in zip(of_group, group["params"])
    }
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ordered = [numbers[name] for group in names for name in group]
    state = {
        place: {key: _like(value, parameter) for key, value in saved["state"][number].items()}
        for place, (number, parameter) in enumerate(zip(ordered, parameters))
        if number in saved["state"]
    }
    places = iter(range(len(parameters)))
    groups = [
        {**group, "params": [next(places) for _ in of_group]} for group, of_group in zip(saved["param_groups"], names)
    ]
    rest = {key: value for key, value in saved.items() if key not in (NAMES, "state", "param_groups")}
    optimizer.load_state_dict({**rest, "state": state, "param_groups": groups})


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    names = {id(parameter): _plain(name) for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _plain(name: str) -> str:
    for part in INSIDE_NAMES:
        name = name.replace(part, "")
    return name


def _like(value: Any, parameter: Tensor) -> Any:
    """Return a value of the state, divided over the ranks as its parameter is."""
    if not isinstance(value, Tensor) or not is_dtensor(parameter) or value.dim() == 0:
        return value
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    if value.shape != parameter.shape:  # such as the sums of rows and columns of Adafactor
        placements = [Replicate()] * mesh.ndim
    return distribute_tensor(value, mesh, placements, src_data_rank=None)  # without communication
