"""A model with trainable layers in place: what s2ft knows about it, and how they come in and go out again.

An interrupt, an exception or an out-of-memory error may come at any moment. So the record of what is about to change
is made first and is on the model before anything changes, and each step of taking changes back works whether the
change was made, half made, or taken back already. :func:`unmount` and :func:`release` can be called at any time.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.attached import extra
from s2ft.attached.hosts.checkpointing import close_blocks, open_blocks
from s2ft.attached.hosts.quantizers import allow_training, restore_quantizer
from s2ft.attached.hosts.state_dicts import add_state_hooks, remove_state_hooks
from s2ft.attached.record import RECORD, Attachment, Mount, Part, attachment_of
from s2ft.config import S2FTConfig
from s2ft.distributed import check_same_as_first_rank, is_sharded
from s2ft.layers import EXPERTS, S2Layer, experts_forward, gate_of, kind_of
from s2ft.model.coupling import Coupling, Projection
from s2ft.model.fingerprint import digest
from s2ft.model.permutation import Move, contiguous_range, coupling_order, inverse
from s2ft.model.weights import (
    allow_packing,
    find,
    layers_that_pack,
    parameter_position,
    put,
    stop_packing,
    tensors_of,
    weight_at,
)
from s2ft.ops import act_mul
from s2ft.ops._memory import check_private
from s2ft.selection import Selection

# What the packages above do to a model that trainable layers come into, and undo when they go out
EXTENSIONS: list[tuple[Callable[[nn.Module], None], Callable[[nn.Module], None]]] = []


def check_not_sharded(model: nn.Module, what: str) -> None:
    """Raises: ValueError where weights are spread over ranks, by FSDP2 or ZeRO-3."""
    path = next((path for path, parameter in model.named_parameters() if is_sharded(parameter)), None)
    if path is not None:
        raise ValueError(
            f"{what} would change the layers of a model that is sharded ({path}), and what shards it "
            "knows only those that there were: do it before, or s2ft.save_adapter here and go on with a "
            "base that is not sharded"
        )


# ---- in ----------------------------------------------------------------------------------------------


def claim(model: nn.Module, record: Attachment) -> None:
    """Give the model its record. Do so before anything changes."""
    setattr(model, RECORD, record)
    model._apply = partial(_apply_to_all, model)
    add_state_hooks(model)


def _apply_to_all(model: nn.Module, function: Callable[[Tensor], Tensor], *args: Any, **options: Any) -> nn.Module:
    """The model's _apply: casts and moves (to, half, cuda) also reach the recorded base, which is in no module."""
    type(model)._apply(model, function, *args, **options)
    record = model.__dict__[RECORD]
    for entry in record.written:
        entry.base = function(entry.base)
    record.extra.apply(function)
    return model


def mount(model: nn.Module, record: Attachment, config: S2FTConfig, selection: Selection, name: str) -> None:
    """Freeze the model, move units (layout permuted) and put trainable layers in. Checks come first.

    Args:
        model: with the record on it and the base in its weights.
        record: of the model; it gets the new adapter.
        config: of the new adapter.
        selection: its units.
        name: its name.

    Raises:
        ValueError: something can't be trained; nothing has changed.
        RuntimeError: another rank trains other units or has another base.
    """
    check_not_sharded(model, "a trainable adapter")
    touched = [
        coupling
        for coupling in record.couplings
        if any(projection.name in selection for projection in coupling.projections)
    ]
    orders = {}
    if config.layout == "permuted":
        movable = [coupling for coupling in touched if coupling.movable]
        _check_can_move(model, movable)
        orders = {coupling: _order(coupling, selection) for coupling in movable}
    check_gradients_pass(model)
    check_memory(model, [projection for coupling in touched for projection in coupling.projections])
    for coupling in touched:
        if coupling.consumer.expert is not None:
            gate_of(model.get_submodule(coupling.consumer.path.rpartition(".")[0]))
    whole_names = extra.names_of_modules(model, record.couplings, config.modules_to_save)
    check_same_as_first_rank(
        f"adapter {name!r}", {"its selection": selection.digest, "the base": digest(record.fingerprint)}
    )
    try:
        record.name, record.config, record.selection = name, config, selection
        _mount_all(model, record, touched, orders)
        extra.start(model, record, whole_names, before_forward, before_load)
        record.active = {name: 1.0}
    except BaseException:  # out of memory, an interrupt: leave no half-converted model
        unmount(model, record)
        raise


def before_forward(model: nn.Module, inputs: tuple) -> None:
    """Forward pre-hook of a model with a trainable adapter: keep the base of weights that were unfrozen by hand.

    Raises:
        RuntimeError: A weight or bias of a coupling was unfrozen, which would get no gradient.
    """
    if not torch.compiler.is_compiling() and model.training and torch.is_grad_enabled():
        extra.watch(model, attachment_of(model))


def before_load(model: nn.Module, *_: Any) -> None:
    """load_state_dict pre-hook, likewise."""
    extra.keep_unfrozen(model, attachment_of(model))


def _mount_all(model: nn.Module, record: Attachment, touched: list[Coupling], orders: dict[Coupling, Tensor]) -> None:
    model.requires_grad_(False)
    record.unpacked = layers_that_pack(model)
    stop_packing(model, record.unpacked)
    allow_training(model)
    sites: dict[str, list[Part]] = {}
    for coupling in touched:
        order = orders.get(coupling)
        if order is not None:
            record.moves.append(Move(coupling, order))
            record.moves[-1].do(model)
        for projection in coupling.projections:
            if projection.name in record.selection:
                part = _part(projection, record.selection[projection.name], order)
                sites.setdefault(projection.path, []).append(part)
    tied = {id(weight) for weight in _tied_weights(model)}
    for path, parts in sites.items():
        _mount(model, path, parts, record, tied)
    for coupling in touched:
        _replace_forward(model, coupling, record)
    open_blocks(model, record.mounts)
    for come, _ in EXTENSIONS:
        come(model)


def _tied_weights(model: nn.Module) -> Iterator[Tensor]:
    """Parameters that more than one module has."""
    seen = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            yield parameter
        seen.add(id(parameter))


def _part(projection: Projection, units: Tensor, order: Tensor | None) -> Part:
    """With the elements' present places in the weight as positions."""
    places = units if order is None else inverse(order)[units]
    return Part(projection, projection.elements(places), projection.elements(units))


def _mount(model: nn.Module, path: str, parts: list[Part], record: Attachment, tied: set) -> None:
    original = find(model, path)
    if isinstance(original, nn.Parameter):
        made = Mount(None, _stack(original, parts, record.config), parts, parameter_position(model, path))
    else:
        made = Mount(original, _layer(original, parts, record.config), parts)
    made.layer.is_tied = id(made.layer.weight) in tied
    record.mounts[path] = made
    put(model, path, made.layer)
    if made.original is not None and not made.layer.wraps_plain:
        # the layer's alone: a second owner would keep them whole where the layer's are sharded or moved
        made.original.weight = made.original.bias = None


def _layer(original: nn.Module, parts: list[Part], config: S2FTConfig) -> S2Layer:
    """A slice where the parts fill one, else an index; the parts' positions become those in it."""
    dim = parts[0].projection.dim
    places = torch.cat([part.positions for part in parts])
    found = contiguous_range(places)
    if found is not None:
        where = {"start": found[0], "end": found[1]}
        for part in parts:
            part.positions = part.positions - found[0]
    else:
        where = {"index": places}
        _count_positions(parts)
    layer = kind_of(original).layers[dim]
    return layer.from_module(original, **where, delta_dtype=config.delta_dtype_for(original.weight.dtype))


def _stack(original: nn.Parameter, parts: list[Part], config: S2FTConfig) -> S2Layer:
    parts.sort(key=lambda part: part.projection.expert)
    index: dict[int, list[Tensor]] = {}
    for part in parts:
        index.setdefault(part.projection.expert, []).append(part.positions)
    _count_positions(parts)
    return EXPERTS.layers[parts[0].projection.dim](
        original,
        {expert: torch.cat(places) for expert, places in index.items()},
        config.delta_dtype_for(original.dtype),
    )


def _count_positions(parts: list[Part]) -> None:
    """Parts lie one after the other."""
    first = 0
    for part in parts:
        part.positions = torch.arange(first, first + part.elements.numel())
        first += part.elements.numel()


def _order(coupling: Coupling, selection: Selection) -> Tensor:
    producers = [selection[p.name] for p in coupling.producers if p.name in selection]
    consumer = selection[coupling.consumer.name] if coupling.consumer.name in selection else None
    return coupling_order(coupling.consumer.count, producers, consumer)


def _check_can_move(model: nn.Module, couplings: list[Coupling]) -> None:
    why = next((why for why in _obstacles(model, couplings) if why), "")
    if why:
        raise ValueError(f"{why}, whose units can't change place: use layout='indexed'")


def that_can_move(model: nn.Module, couplings: list[Coupling]) -> list[Coupling]:
    """Those whose units can change place, by themselves and with the weights as they are."""
    movable = [coupling for coupling in couplings if coupling.movable]
    return [coupling for coupling, why in zip(movable, _obstacles(model, movable)) if not why]


def _obstacles(model: nn.Module, couplings: list[Coupling]) -> Iterator[str]:
    """For each coupling what of its weights keeps its units in place, in words; empty where nothing does."""
    owners: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(key)
    for coupling in couplings:
        handles = [weight_at(model, projection) for projection in coupling.projections]
        read_only = next((handle for handle in handles if handle.read_only), None)
        names = (owners.get(id(tensor), []) for tensor in tensors_of(model, coupling))
        tied = next((found for found in names if len(found) > 1), None)
        if read_only is not None:
            yield f"{read_only.path} is a quantized weight ({type(read_only.holder).__name__})"
        else:
            yield f"{' and '.join(tied)} are one tied weight" if tied else ""


def check_memory(model: nn.Module, projections: list[Projection]) -> None:
    """Raises: ValueError for weights in shared or read-only memory, or that are computed from other parameters."""
    for path, projection in {projection.path: projection for projection in projections}.items():
        handle = weight_at(model, projection)
        if handle.read_only:
            continue
        found = handle.holder
        if isinstance(found, nn.Module) and "weight" not in found._parameters:
            raise ValueError(
                f"{path}.weight is no parameter but is computed by a hook, as torch.nn.utils.prune and "
                "weight_norm do: make it one first (prune.remove, remove_weight_norm)"
            )
        if not is_sharded(handle.tensor):
            check_private(f"{path}.weight" if isinstance(found, nn.Module) else path, handle.tensor)


def check_gradients_pass(model: nn.Module) -> None:
    """Anywhere in the model: layers that aren't trained stand between the loss and those that are."""
    for path, module in model.named_modules():
        if not kind_of(module).passes_gradient(module):
            raise ValueError(
                f"{path} ({type(module.weight).__name__}) passes no gradient to its input, for it "
                "quantizes that too: use a configuration that quantizes weights only"
            )


def check_can_merge(record: Attachment) -> None:
    """Raises: ValueError for a quantized base."""
    for path, mount in record.mounts.items():
        if mount.layer.kind.read_only:
            raise ValueError(f"{path}: {mount.layer.kind.read_only}")


# ---- forwards of our own -------------------------------------------------------------------------------


def gated_forward(block: nn.Module, x: Tensor, activation: str) -> Tensor:
    """The forward of a gated FFN, x [..., width] → [..., width], that keeps gate and up for the backward
    and of their product only what the down projection keeps."""
    return block.down_proj(act_mul(block.gate_proj(x), block.up_proj(x), activation))


def _replace_forward(model: nn.Module, coupling: Coupling, record: Attachment) -> None:
    """Experts must have :func:`experts_forward`; the block of a gated FFN gets :func:`gated_forward`, unless
    someone has replaced its forward already.

    They are partial objects: a bound method of the module could not be loaded from a file.
    """
    if coupling.consumer.expert is not None:
        path, forward, options = coupling.consumer.path.rpartition(".")[0], experts_forward, {}
    elif coupling.activation is not None and record.config.ffn_kernel:
        path, forward, options = coupling.block, gated_forward, {"activation": coupling.activation}
    else:
        return
    block = model.get_submodule(path)
    if "forward" in block.__dict__:
        if forward is experts_forward and path not in record.forwards:
            raise ValueError(
                f"the forward of {path} has been replaced, and that one can't run experts that are trained"
            )
        return
    record.forwards[path] = partial(forward, block, **options)
    block.forward = record.forwards[path]


# ---- out -----------------------------------------------------------------------------------------------


def unmount(model: nn.Module, record: Attachment) -> None:
    """Take the trainable layers out: plain modules with the weights as they are, units in original order.

    It can be called again where it was interrupted, and does nothing where nothing is mounted. The record still says
    what was mounted: :meth:`Attachment.forget_mounts` comes after it where the record stays.
    """
    extra.remove_hooks_of(model, before_forward, before_load)
    for _, go in EXTENSIONS:
        go(model)
    for path, forward in record.forwards.items():
        block = model.get_submodule(path)
        if block.__dict__.get("forward") is forward:  # else someone has replaced ours
            block.__dict__.pop("forward", None)
    close_blocks(model)
    for path, mounted in reversed(record.mounts.items()):
        if mounted.original is None:
            put(model, path, mounted.layer.weight, mounted.position)
        else:
            if not mounted.layer.wraps_plain:
                mounted.original.weight, mounted.original.bias = mounted.layer.weight, mounted.layer.bias
            mounted.original.train(mounted.layer.training)
            put(model, path, mounted.original)
    for move in reversed(record.moves):
        move.undo(model)
    allow_packing(model, record.unpacked)
    restore_quantizer(model)


def remount(model: nn.Module, record: Attachment) -> None:
    """Take an interrupted :func:`unmount` back: the trainable layers are in place again, and off."""
    for move in record.moves:
        move.do(model)
    model.requires_grad_(False)
    for path, mounted in record.mounts.items():
        put(model, path, mounted.layer)
        if mounted.original is not None and not mounted.layer.wraps_plain:
            mounted.original.weight = mounted.original.bias = None
        mounted.layer.s2.requires_grad_(True)
    for path, forward in record.forwards.items():
        model.get_submodule(path).__dict__.setdefault("forward", forward)
    stop_packing(model, record.unpacked)
    allow_training(model)
    close_blocks(model)
    open_blocks(model, record.mounts)
    for come, go in EXTENSIONS:
        go(model)
        come(model)
    extra.start(model, record, list(record.extra.base), before_forward, before_load)


def release(model: nn.Module, record: Attachment) -> nn.Module:
    """The plain model with the weights as they are, in original order, and without a record."""
    unmount(model, record)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(record.required_grad.get(key, parameter.requires_grad))
    remove_state_hooks(model)
    model.__dict__.pop("_apply", None)
    model.__dict__.pop(RECORD, None)
    return model
