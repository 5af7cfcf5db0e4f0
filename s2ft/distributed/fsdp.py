"""FSDP2 that was applied before an adapter was attached.

FSDP2 keeps a list of the parameters it shards and of the module that has each of them. It puts the shard or the
gathered parameter into that module whenever it changes between the two. So a trainable layer that takes a frozen weight
over has to take the module's place in that list. Its s2 has to be on the list too, to be sharded and to get its
gradient reduced over the ranks: it joins the group of the frozen weight, and is gathered and reduced with its block.

PyTorch has no public way for either. The private names that are needed are looked up in this file only, and
:func:`check_can_follow` raises a clear error if one is missing. They are the same in torch 2.11 to 2.13.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

Place = tuple[nn.Module, str]  # a module and the name that its parameter has there


def fsdp_modules() -> type | tuple:
    """The class of modules to which FSDP2 was applied, for isinstance; no class if FSDP2 is not in use."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return () if fsdp is None or not dist.is_initialized() else fsdp.FSDPModule


def _groups(model: nn.Module) -> list[Any]:
    """Every group of parameters that FSDP2 gathers together."""
    found: dict[int, Any] = {}
    kind = fsdp_modules()
    for module in model.modules() if kind else ():
        if isinstance(module, kind):
            state = module._get_fsdp_state()
            groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
            found.update({id(group): group for group in groups if group is not None})
    return list(found.values())


def check_can_follow(model: nn.Module) -> None:
    """Raise RuntimeError if this version of PyTorch has other private names than this file needs."""
    kind = fsdp_modules()
    if not kind or not any(isinstance(module, kind) for module in model.modules()):
        return
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo  # noqa: F401

        for group in _groups(model):
            for name in ("mesh_info", "post_forward_mesh_info", "device", "mp_policy", "offload_policy"):
                getattr(group, name)
            for parameter in group.fsdp_params:
                for name in ("module", "param_name", "shared_modules", "shared_param_names"):
                    getattr(parameter._module_info, name)
                getattr(parameter, "_post_load_hook_handle")  # noqa: B009
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"attaching to a model that FSDP2 has sharded needs names inside PyTorch that {torch.__version__} does not "
            f"have ({error}): attach or load the adapter first, then shard the model"
        ) from error


def managed_by_fsdp(model: nn.Module) -> set[tuple[int, str]]:
    """The parameters that FSDP2 manages, by the id of the module that has one and its name there.

    They are not told by their own ids: a parameter that was loaded is new to FSDP2 until the next forward.
    """
    places = set()
    for group in _groups(model):
        for info in (parameter._module_info for parameter in group.fsdp_params):
            places.add((id(info.module), info.param_name))
            places.update((id(module), name) for module, name in zip(info.shared_modules, info.shared_param_names))
    return places


def follow(model: nn.Module, moved: Iterable[tuple[Place, Place]]) -> None:
    """Tell FSDP2 where parameters are now. It can be called again.

    Args:
        model: The model.
        moved: The old and the new place of each parameter.
    """
    new = {(id(module), name): there for (module, name), there in moved}
    for group in _groups(model) if new else ():
        for parameter in group.fsdp_params:
            info = parameter._module_info
            here = id(info.module), info.param_name
            info.module, info.param_name = new.get(here, (info.module, info.param_name))
            for i, (module, name) in enumerate(zip(info.shared_modules, info.shared_param_names)):
                place = new.get((id(module), name), (module, name))
                info.shared_modules[i], info.shared_param_names[i] = place


@contextmanager
def following(model: nn.Module, here: Place, there: Place) -> Iterator[None]:
    """Inside, FSDP2 knows that a parameter is there; before and afterwards it is here."""
    try:
        follow(model, [(here, there)])
        yield
    finally:
        follow(model, [(there, here)])


def shard_slices(model: nn.Module, layers: list[nn.Module]) -> None:
    """Shard the s2 of layers in the groups of their frozen weights. Layers without such a group stay as they are.

    Args:
        model: The model.
        layers: Trainable layers, whose weights FSDP2 manages.
    """
    wanted = {id(layer): layer for layer in layers}
    for group in _groups(model):
        inside = {id(p._module_info.module): None for p in group.fsdp_params if id(p._module_info.module) in wanted}
        has_s2 = {id(p._module_info.module) for p in group.fsdp_params if p._module_info.param_name == "s2"}
        for layer in (wanted[key] for key in inside if key not in has_s2):
            group.fsdp_params.append(_sharded_slice(group, layer))
        if inside and "_orig_dtype" in vars(group):  # a first forward has been run
            group._init_mp_dtypes()


def _sharded_slice(group: Any, layer: nn.Module) -> Any:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

    if not layer.s2.is_meta:
        layer.s2.data = layer.s2.data.to(group.device)
    return FSDPParam(
        layer.s2,
        ParamModuleInfo(layer, "s2"),
        group.mesh_info,
        group.post_forward_mesh_info,
        group.device,
        None,
        group.mp_policy,
        group.offload_policy,
    )


def release_slices(model: nn.Module, layers: list[nn.Module]) -> None:
    """Undo :func:`shard_slices`: FSDP2 forgets the s2 of these layers. It can be called again."""
    known = {id(layer) for layer in layers}
    for group in _groups(model) if known else ():
        for parameter in list(group.fsdp_params):
            if id(parameter._module_info.module) in known and parameter._module_info.param_name == "s2":
                parameter._post_load_hook_handle.remove()
                group.fsdp_params.remove(parameter)
