"""What tensor and pipeline parallelism ask of a model: which split layers can be trained, and how units may move.

transformers splits a layer by a style: the weight becomes a DTensor, and the style replaces the layer's forward by one
that brings inputs and outputs into the layouts that the split needs. A trainable layer gets the same style.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.distributed import is_dtensor
from s2ft.layers import SPLIT_LINEAR, kind_of
from s2ft.layers.split import split_of
from s2ft.model.coupling import Coupling, Projection, Vector, projections_of
from s2ft.model.weights import find, split_of_units, weight_at

STYLES = ("ColwiseParallel", "RowwiseParallel", "PackedColwiseParallel")  # of transformers, for linear layers
WITHOUT = "load the model without tensor parallelism, attach, and shard it by FSDP2 or ZeRO"

# ---- what is refused -----------------------------------------------------------------------------------


def check_parallelism(model: nn.Module) -> None:
    """Raise ValueError for a model that is cut into pipeline stages, or split in a way that s2ft can't read."""
    for path, module in model.named_modules():
        if "_pp_stage" in module.__dict__ or "pippy_stage" in module.__dict__:
            raise ValueError(
                f"{path or type(model).__name__} is cut into pipeline stages. The stages of transformers (pp_size) and "
                "of accelerate (prepare_pippy) run forwards only and pass no gradient, so nothing can be trained: load "
                "the model without stages, and use FSDP2, ZeRO-3 or tensor parallelism for a model that does not fit "
                "on one device"
            )
        size = module.__dict__.get("_tp_size") or 1
        if size > 1 and not any(map(is_dtensor, module.parameters())):
            raise ValueError(
                f"{path or type(model).__name__} is split over {size} ranks by tensor parallelism, in tensors that do "
                "not say of which weight they are a part. This release of transformers makes no DTensors: update "
                f"transformers, or {WITHOUT}"
            )


def check_split_layers(model: nn.Module, couplings: list[Coupling]) -> None:
    """Raise ValueError for a layer of these couplings that tensor parallelism runs in a way that can't be trained."""
    for path, projection in {projection.path: projection for projection in projections_of(couplings)}.items():
        handle = weight_at(model, projection)
        obstacle = _obstacle(handle.holder, handle.tensor, handle.kind.read_only is not None)
        if obstacle:
            raise ValueError(f"{path} {obstacle}: train other projections, or {WITHOUT}")


def _obstacle(found: nn.Module | Tensor, weight: Tensor, is_quantized: bool) -> str:
    """The reason why a layer can't be trained under tensor parallelism, in words; an empty string if it can."""
    names = weight.device_mesh.mesh_dim_names if is_dtensor(weight) else None
    is_split = bool({"tp", "ep"} & set(names or ()))  # as transformers and accelerate name them
    if isinstance(found, Tensor):
        return (
            "holds experts that are split by tensor or expert parallelism, which s2ft can't train" if is_split else ""
        )
    style = _style_of(found)
    if kind_of(found) is SPLIT_LINEAR:
        if split_of(weight) is None:
            return f"is replicated by tensor parallelism ({weight.placements}), which s2ft can't train"
        if style is None and "forward" in found.__dict__ or style is not None and not _is_known(style):
            return f"is split by tensor parallelism, and {_name(found, style)} has replaced its forward"
        return ""
    if style is not None and is_quantized:
        return "is a quantized weight that is split by tensor parallelism, which s2ft can't train"
    if style is not None or is_split:
        return f"is run by tensor parallelism ({_name(found, style)}) in a way that s2ft can't train"
    return ""


def _name(module: nn.Module, style: Any) -> str:
    if style is not None:
        return f"the style {type(style).__name__}"
    forward = module.__dict__.get("forward")
    return type(module).__name__ if forward is None else getattr(forward, "__qualname__", type(forward).__name__)


# ---- transformers' styles ------------------------------------------------------------------------------


def install_style(original: nn.Module, layer: nn.Module) -> None:
    """Install the style of the layer that a trainable layer replaces around the trainable one, if it has a style."""
    style = _style_of(original)
    if style is not None:
        layer.install(style)


def _style_of(module: nn.Module) -> Any:
    """The style that transformers has installed on a module, or None.

    transformers keeps it nowhere but in the function by which the style replaces the forward. A plan by names would not
    say what a plan of the user's own has done.
    """
    forward = module.__dict__.get("forward")
    if not inspect.isfunction(forward):
        return None
    style = inspect.getclosurevars(forward).nonlocals.get("self")
    return style if hasattr(style, "transform_inputs_pre_forward") else None


def _is_known(style: Any) -> bool:
    return type(style).__name__ in STYLES and type(style).__module__.startswith("transformers.")


# ---- how units may move --------------------------------------------------------------------------------


def unit_blocks(model: nn.Module, coupling: Coupling) -> Tensor | None:
    """Find the rank of the tensor-parallel group that has each unit of a coupling.

    Args:
        model: The model.
        coupling: A coupling whose units may move.

    Returns:
        The ranks [units] int64; all 0 if no weight is split along the units. None if a unit is divided among ranks, or
        two weights have it on different ranks, so that no rank can reorder its own parts by itself.
    """
    blocks = torch.zeros(coupling.count, dtype=torch.int64)
    for number, owners in enumerate(_owners(model, coupling)):
        blocks = owners[:, 0] if number == 0 else blocks
        if bool((owners != blocks[:, None]).any()):
            return None
    return blocks


def _owners(model: nn.Module, coupling: Coupling) -> Iterator[Tensor]:
    """Yield the ranks [units, elements of a unit] for every weight and vector that is split along the units."""
    units = torch.arange(coupling.count)
    for projection in coupling.projections:
        split = split_of_units(model, projection)
        if split is not None:
            yield split.owners[projection.elements(units)].view(coupling.count, -1)
    for vector in coupling.vectors:
        tensor = find(model, vector.path)
        split = split_of(tensor) if is_dtensor(tensor) and "tp" in (tensor.device_mesh.mesh_dim_names or ()) else None
        if split is not None and split.dim == (vector.expert is not None):
            yield split.owners[_entries(vector, units)].view(coupling.count, -1)


def _entries(vector: Vector, units: Tensor) -> Tensor:
    return Projection("u", vector.path, len(units), vector.unit, 0, start=vector.start, size=vector.size).elements(
        units
    )
