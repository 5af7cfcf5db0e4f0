"""Checks that run before an attached model is changed.

transformers splits a layer by a style: the weight becomes a DTensor, and the style replaces the layer's forward by one
that brings inputs and outputs into the layouts that the split needs. A trainable layer gets the same style.
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.adapter.adapter import Adapter
from s2ft.attached.record import WITHOUT, Attachment
from s2ft.config import refuse
from s2ft.distributed import (
    check_can_follow,
    full_shape,
    has_master_copy,
    is_dtensor,
    is_run_by_engine,
    is_sharded,
    managed_by_fsdp,
    will_be_loaded_again,
)
from s2ft.files.plain_text import by_key
from s2ft.layers import SPLIT_LINEAR, kind_of
from s2ft.layers.kind import split_of
from s2ft.model.coupling import Coupling, Projection, projections_of
from s2ft.model.weights import tensors_of, weight_at
from s2ft.ops.in_place import check_distinct, check_private
from s2ft.selection import Selection

# ---- layers and weights --------------------------------------------------------------------------------


def check_not_in_engine(model: nn.Module, what: str, removes: bool = False) -> None:
    """Raise ValueError if DeepSpeed's engine holds the model.

    Args:
        model: The model.
        what: The change, for the message.
        removes: Whether the change only takes layers away. ZeRO-1 and ZeRO-2 leave the weights whole, so that a model
            can be taken out of their engines.
    """
    if is_run_by_engine(model) or (not removes and any(map(has_master_copy, model.parameters()))):
        raise ValueError(
            f"{what} would change the layers of a model that DeepSpeed's engine holds, and its hooks and its optimizer "
            "know only what was there when deepspeed.initialize made them: do this before deepspeed.initialize (before "
            "Trainer.train, or accelerator.prepare), or call s2ft.save_adapter now and go on with a new model"
        )


def check_shards(model: nn.Module, couplings: list[Coupling]) -> None:
    """Raise ValueError for a weight that is spread over ranks by something else than FSDP2 and tensor parallelism.

    Raises:
        RuntimeError: This version of PyTorch does not have what a model of FSDP2 needs.
    """
    check_can_follow(model)
    managed = managed_by_fsdp(model)
    for coupling in couplings:
        for projection in coupling.projections:
            handle = weight_at(model, projection)
            weight, (owner, _, name) = handle.tensor, projection.path.rpartition(".")
            is_module = isinstance(handle.holder, nn.Module)
            place = (id(handle.holder), "weight") if is_module else (id(model.get_submodule(owner)), name)
            if is_dtensor(weight) and handle.split is None and place not in managed:
                raise ValueError(
                    f"{projection.path} is spread over ranks ({weight.placements}), and neither FSDP2 nor a style of "
                    "tensor parallelism that s2ft knows has done it: load the model without it, attach, and shard it "
                    "by FSDP2 or ZeRO"
                )


def check_weights_are_here(model: nn.Module, record: Attachment) -> None:
    """Raise ValueError if the weights are not here yet, so that an adapter would be written into nothing."""
    weights = [weight_at(model, projection).tensor for projection in record.projections.values()]
    if any(weight.is_meta for weight in weights) or (
        will_be_loaded_again() and not any(is_sharded(weight) for weight in weights)
    ):
        raise ValueError(
            "the weights have not arrived on every rank, so an adapter can't be written into them: load it with "
            "trainable=True or active=False, and make it active when the model has been prepared and its weights loaded"
        )


def check_can_move(model: nn.Module, couplings: list[Coupling]) -> None:
    """Raise ValueError if the units of one of the couplings can't be reordered with the weights as they are."""
    names = _names_of_parameters(model)
    for coupling in couplings:
        handles = [weight_at(model, projection) for projection in coupling.projections]
        obstacles = [
            f"{handle.path} is a quantized weight ({type(handle.holder).__name__})"
            for handle in handles
            if handle.read_only
        ]
        tied = [names.get(id(tensor), []) for tensor in tensors_of(model, coupling)]
        obstacles += [f"{' and '.join(found)} are one tied weight" for found in tied if len(found) > 1]
        if obstacles:
            raise ValueError(f"{obstacles[0]}, whose units can't change place: use layout='indexed'")


def _names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, by its id."""
    named = model.named_parameters(remove_duplicate=False)
    return by_key((id(parameter), name) for name, parameter in named)


def check_one_place(model: nn.Module, couplings: list[Coupling], selection: Selection) -> None:
    """Raise ValueError if a layer to train, or its weight, is in several places of the model.

    Only one of these places would get a trainable layer, and the others would compute with its slice, whose gradient
    would lack their part.
    """
    names = _names_of_parameters(model)
    for projection in projections_of(couplings):
        tied = names.get(id(weight_at(model, projection).tensor), [])
        if projection.name in selection and len(tied) > 1:
            raise ValueError(
                f"{' and '.join(tied)} are one tied weight, which can't be trained, because each place would need the "
                "gradients of the others: give each place a layer with a weight of its own, or leave its layer out"
            )


def check_memory(model: nn.Module, projections: list[Projection]) -> None:
    """Raise ValueError for a weight in read-only or shared memory, computed from others, or not quantized yet."""
    for path, projection in {projection.path: projection for projection in projections}.items():
        handle = weight_at(model, projection)
        found = handle.holder
        if handle.read_only and handle.tensor.is_meta:
            raise ValueError(
                f"{path} is on the meta device ({type(found).__name__}), and its quantization is known only when it is "
                "loaded: load the quantized weights, on every rank"
            )
        if handle.read_only:
            continue
        if isinstance(found, nn.Module) and "weight" not in found._parameters:
            raise ValueError(
                f"{path}.weight is not a parameter but is computed by a hook, as by torch.nn.utils.prune and "
                "weight_norm: make it a parameter first (prune.remove, remove_weight_norm)"
            )
        if not is_sharded(handle.tensor):
            check_private(f"{path}.weight" if isinstance(found, nn.Module) else path, handle.tensor)


def check_gradients_pass(model: nn.Module) -> None:
    """Raise ValueError for a quantized layer, trained or not, that passes no gradient to its input."""
    for path, module in model.named_modules():
        if not kind_of(module).passes_gradient(module):
            raise ValueError(
                f"{path} ({type(module.weight).__name__}) passes no gradient to its input, because it "
                "quantizes that too: use a configuration that quantizes weights only"
            )


def check_writable(model: nn.Module, record: Attachment, names: Iterable[str]) -> None:
    """Raise ValueError if a weight of these projections is quantized, or tied to another one of theirs."""
    paths: dict[int, str] = {}
    for name in names:
        handle = weight_at(model, record.projections[name])
        path, other = handle.path, paths.setdefault(id(handle.tensor), handle.path)
        if handle.read_only:
            raise ValueError(f"{path} is quantized: {handle.read_only}")
        if other != path:  # their updates differ, so that none of them could be kept
            raise ValueError(
                f"{other} and {path} are one tied weight, and an adapter that trains each by itself can't be written "
                "into it: train one of them only, by couplings= or by the config's layers"
            )


# ---- tensor parallelism ---------------------------------------------------------------------------------------------

STYLES = ("ColwiseParallel", "RowwiseParallel", "PackedColwiseParallel")  # of transformers, for linear layers


def check_split_layers(model: nn.Module, couplings: list[Coupling]) -> None:
    """Raise ValueError for a layer of these couplings that tensor parallelism runs in a way that can't be trained."""
    for path, projection in {projection.path: projection for projection in projections_of(couplings)}.items():
        handle = weight_at(model, projection)
        obstacle = _obstacle(handle.holder, handle.tensor, handle.kind.read_only is not None)
        if obstacle:
            raise ValueError(f"{path} {obstacle}: train other projections, or {WITHOUT}")


def _obstacle(found: nn.Module | Tensor, weight: Any, is_quantized: bool) -> str:
    """The reason why a layer can't be trained under tensor parallelism, in words; an empty string if it can."""
    names = weight.device_mesh.mesh_dim_names if is_dtensor(weight) else None
    is_split = bool({"tp", "ep"} & set(names or ()))  # as transformers and accelerate name them
    if isinstance(found, Tensor):
        return (
            "holds experts that are split by tensor or expert parallelism, which s2ft can't train" if is_split else ""
        )
    style = style_of(found)
    if kind_of(found) is SPLIT_LINEAR:
        if split_of(weight) is None:
            return f"is replicated by tensor parallelism ({weight.placements}), which s2ft can't train"
        is_known = type(style).__name__ in STYLES and type(style).__module__.startswith("transformers.")
        if style is None and "forward" in found.__dict__ or style is not None and not is_known:
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


def style_of(module: nn.Module) -> Any:
    """The style that transformers has installed on a module, or None.

    transformers keeps it nowhere but in the function by which the style replaces the forward. A plan by names would not
    say what a plan of the user's own has done.
    """
    forward = module.__dict__.get("forward")
    if not inspect.isfunction(forward):
        return None
    style = inspect.getclosurevars(forward).nonlocals.get("self")
    return style if hasattr(style, "transform_inputs_pre_forward") else None


# ---- an adapter and a model -----------------------------------------------------------------------------------------


def check_fits(adapter: Adapter, model: nn.Module, record: Attachment) -> None:
    """Raise ValueError, naming what does not fit, if `adapter` was not trained on this model."""
    known = record.projections
    for path, delta in adapter.deltas.items():
        if path not in known:
            is_mixed = any(name.endswith(".i") for name in (path, *known))
            hint = ", and adapters of i_ratio and of other ratios do not go into one model" if is_mixed else ""
            raise ValueError(f"adapter {adapter.name!r} is for another model: this one has no projection {path}{hint}")
        shape = list(weight_at(model, known[path]).shape)
        size, shape[delta.dim] = shape[delta.dim], delta.index.numel()
        if delta.dim != known[path].dim or shape != list(delta.values.shape):
            raise ValueError(
                f"adapter {adapter.name!r} is for another model: {path}.delta has shape "
                f"{tuple(delta.values.shape)} for dim {delta.dim}, this model needs dim {known[path].dim} and shape "
                f"{tuple(shape)}"
            )
        check_distinct(f"adapter {adapter.name!r}", delta.index, size, f"{path}.index")
    # without a fingerprint the weights are compared when they arrive
    if record.fingerprint is not None:
        adapter.check_base(record.fingerprint)
    check_extra_fits(model, record, adapter.name, adapter.extra_weights)
    for path, delta in adapter.deltas.items():
        projection, units = known[path], adapter.selection[path]
        last = int(units.max())
        refuse(
            (
                last >= projection.count,  # in a weight of several projections, the element may belong to another one
                f"adapter {adapter.name!r}: {path} has units 0..{projection.count - 1}; there is no unit {last}",
            ),
            (
                not torch.equal(projection.elements(units), delta.index),
                f"adapter {adapter.name!r}: {path}.index does not name the selected units, each of {projection.unit} "
                "elements",
            ),
        )


def coupled_names(couplings: list[Coupling]) -> set[str]:
    """Return the names that the couplings' weights, biases and vectors have, with trainable layers mounted or not."""
    ends = ("", ".weight", ".bias", ".linear.weight", ".linear.bias")
    return {projection.path + end for projection in projections_of(couplings) for end in ends} | {
        vector.path for coupling in couplings for vector in coupling.vectors
    }


def check_extra_fits(model: nn.Module, record: Attachment, adapter: str, values: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a weight that the model doesn't have, that has another shape, or that is of a coupling."""
    if not values:
        return
    parameters, coupled = dict(model.named_parameters()), coupled_names(record.couplings)
    for name, value in values.items():
        if name not in parameters or name in coupled or name.endswith(".s2"):
            raise ValueError(
                f"adapter {adapter!r} is for another model: this one has no weight {name} outside its couplings"
            )
        shape = full_shape(parameters[name])
        if value.shape != shape or not parameters[name].is_floating_point():
            raise ValueError(
                f"adapter {adapter!r} is for another model: {name} has shape {tuple(value.shape)}, this "
                f"model has {tuple(shape)} of {parameters[name].dtype}"
            )
