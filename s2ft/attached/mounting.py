"""Mounts the trainable layers of a model and removes them, in changes that nothing leaves half done.

An interrupt, an exception or an out-of-memory error can come at any moment. So the record of a change is on the model
before anything changes, and each step that takes a change back works whether the change was made, half made, or taken
back already. :func:`unmount_layers` and :func:`make_plain` can be called at any time.
"""

import inspect
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from s2ft.adapter.adapter import Adapter
from s2ft.attached.active import (
    activate,
    all_or_nothing,
    deactivate,
    parameters_to_save,
    unfreeze,
    write_changed_layers,
)
from s2ft.attached.hooks import (
    add_checkpoint_hooks,
    add_record_and_hooks,
    add_save_functions,
    allow_training,
    experts_modules,
    mark_layers,
    remove_checkpoint_hooks,
    remove_hooks,
    remove_record_and_hooks,
    remove_save_functions,
    replace_forward,
    restore_forwards,
    restore_quantizer,
)
from s2ft.attached.record import (
    WITHOUT,
    Mount,
    Part,
    Record,
    check_plain_and_untied,
    check_slices_are_here,
    find_record,
    on_unwrapped,
    record_of,
)
from s2ft.codecs.gguf_file import GgufFile
from s2ft.codecs.packed_folder import PackedFolder, has_codecs
from s2ft.config import S2FTConfig
from s2ft.distributed import (
    Place,
    check_not_in_engine,
    check_same_as_first_rank,
    fsdp_follow,
    fsdp_release_slices,
    fsdp_shard_slices,
    is_dtensor,
    managed_by_fsdp,
    reshard_all,
    split_of,
    will_be_loaded_again,
)
from s2ft.layers import EXPERTS, SPLIT_LINEAR, S2Layer, forward_of, kind_of
from s2ft.layers.base import FileRounding
from s2ft.model.checkpoint import is_here, packed_base
from s2ft.model.coupling import Coupling, Projection, by_key, projections_of
from s2ft.model.fingerprint import digest, structure_of
from s2ft.model.weights import (
    Move,
    any_on_meta,
    check_own_memory,
    contiguous_range,
    coupling_order,
    find,
    inverse,
    layers_that_repack,
    memory_of,
    order_in_blocks,
    parameter_position,
    put,
    set_repacking,
    split_of_units,
    tensors_of,
    weight_at,
)
from s2ft.selection import Selection

logger = logging.getLogger(__name__)

# ---- training through the codec of a packed base --------------------------------------------------------------------


def set_codecs(model: nn.Module, record: Record, config: S2FTConfig) -> None:
    """Let each mounted layer compute with what the base's files can hold, if the config says so and they are packed.

    This comes after the proof, whose deltas no file could hold.

    Raises:
        ValueError: A weight is not that of the files, its type has no codec, or something spreads or shares it.
    """
    if config.codec == "none":
        return
    base = files_of(model)
    if base is None:
        logger.warning("warning: codec=%r does nothing here: the base's files are not quantized", config.codec)
        return
    if record.awaits_weights:
        raise ValueError(f"codec={config.codec!r} needs the weights of {base.path}: load them before attach")
    coded = {path: _rounding_of(base, path, mounted) for path, mounted in record.mounts.items()}
    for path, rounding in coded.items():
        record.mounts[path].layer.rounding = rounding
    blocks = {one.codec.block for one in coded.values() if one.blocks.codes.shape[-1] < one.codec.block}
    if blocks and config.units is None:
        logger.warning(
            "warning: scales stay where single inputs are trained: group=%d trains them too, as one is for so many",
            max(blocks),
        )


def files_of(model: nn.Module) -> GgufFile | PackedFolder | None:
    """The packed files that a model was loaded from; None if they are not packed, or without a codec."""
    config = getattr(model, "config", None)
    name = str(getattr(config, "_name_or_path", ""))
    if name.endswith(".gguf") or is_here(name):  # a .gguf file that is gone is an error
        return packed_base(name)
    settings: Any = getattr(config, "quantization_config", None)
    if has_codecs(settings.to_dict() if hasattr(settings, "to_dict") else settings):
        logger.warning("warning: %r is not found here, so the codec of the quantized base is not used", name)
    return None


@on_unwrapped
def set_rounding(model: nn.Module, share: float) -> None:
    """Let a model with ``codec="auto"`` compute with weights between base + delta and what the base's file can hold.

    Training learns most if it begins without rounding and ends with it. The trainers of `s2ft.train` go from 0 to 1
    between 30 % and 70 % of the updates. Without a call the share is 1. A merged file has what share 1 computes with.
    With a share between 0 and 1 the last bit of a weight may differ between devices.

    Args:
        model: Model with a trainable adapter. Nothing changes without a codec.
        share: 0 for base + delta, 1 for the values of the file.

    Raises:
        ValueError: The model has no adapters, or the share is not between 0 and 1.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1, codec="auto"))
        >>> s2ft.set_rounding(model, 0.5)
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share!r}")
    for mounted in record_of(model).mounts.values():
        if mounted.layer.rounding is not None and mounted.layer.rounding.share != share:
            mounted.layer.rounding.share = share
            mounted.layer.write_before_next_forward()


def _rounding_of(base: GgufFile | PackedFolder, path: str, mounted: Mount) -> FileRounding:
    layer, (part, *others) = mounted.layer, mounted.parts
    is_part = bool(others) or part.projection.size is not None  # of a weight of several projections
    if is_part or mounted.original is None or layer.kind.transposed or layer.is_managed:
        raise ValueError(f"codec: {path} is not one plain weight of {base.path} on one device")
    coded = FileRounding(*base.unit_blocks(path, part.elements, layer.dim), part.positions, layer.dim)
    matrix = layer.kind.matrix(layer).detach()
    now = matrix.index_select(layer.dim, layer.selected_units().to(matrix.device)).cpu()
    is_same = torch.equal(coded.base.to(now.dtype), now)
    if not is_same and getattr(base, "conversions", None):  # unpacked in the model's dtype, which rounds in between
        error = 4 * torch.finfo(now.dtype).eps
        close = torch.isclose(coded.base, now.float(), rtol=error, atol=error * float(coded.base.abs().median()))
        is_same = float(close.float().mean()) > 0.99
    if not is_same:
        raise ValueError(f"codec: the weight of {path} is not that of {base.path}, which may have been replaced")
    return coded


# ---- mounting ------------------------------------------------------------------------------------------


def mount(model: nn.Module, record: Record, config: S2FTConfig, selection: Selection, name: str) -> None:
    """Freeze the model, reorder units (layout `permuted`) and mount trainable layers, in :func:`starting_from_base`.

    Args:
        model: Model that has the record, with the base in its weights.
        record: Record of the model. It gets the new adapter, which is active.
        config: Config of the new adapter.
        selection: Units of the new adapter.
        name: Name of the new adapter.

    Raises:
        ValueError: Something can't be trained.
        RuntimeError: Another rank trains other units or has another base.
    """
    check_not_in_engine(model, "a trainable adapter")
    reshard_all(model)
    trained = trained_couplings(record.couplings, selection)
    check_split_layers(model, trained)
    check_one_place(model, trained, selection)
    moves = _moves(model, trained, selection) if config.layout == "permuted" else []
    check_gradients_pass(model)
    check_shards(model, trained)
    check_own_memory(model, list(projections_of(trained)))
    for coupling in trained:
        for module in experts_modules(coupling):
            forward_of(model.get_submodule(module))  # raises
    extra_names = parameters_to_save(model, record.couplings, config.modules_to_save)
    check_same_as_first_rank(
        f"adapter {name!r}", {"its selection": selection.digest, "the base": digest(record.fingerprint)}
    )
    record.structure = structure_of(model, record.couplings, selection.units)
    # the name last, so that an interrupt finds the rest with it
    record.selection, record.config, record.trainable = selection, config, name
    _make_layers(model, record, trained, moves, config, selection)
    mount_layers(model, record, extra_names)
    record.active = {name: 1.0}


def trained_couplings(couplings: list[Coupling], selection: Selection) -> list[Coupling]:
    """The couplings of which a selection has units."""
    return [coupling for coupling in couplings if any(one.name in selection for one in coupling.projections)]


def _make_layers(
    model: nn.Module,
    record: Record,
    trained: list[Coupling],
    moves: list[Move],
    config: S2FTConfig,
    selection: Selection,
) -> None:
    """Record the moves and the trainable layers of a new adapter. No layer is replaced yet."""
    record.awaits_weights = any_on_meta(model, record.couplings) or will_be_loaded_again()
    record.repacking_stopped = layers_that_repack(model)
    record.moves += moves
    record.move_of |= {projection.name: move for move in moves for projection in move.coupling.projections}
    parts: dict[str, list[Part]] = {}
    for coupling in trained:
        order = None
        if coupling.movable and config.layout == "permuted":
            # s2 has this order also where tensor parallelism orders the weights in another way. So s2 and its
            # optimizer's state have the same order on any number of ranks.
            order = coupling_order(coupling.count, *_selected(coupling, selection))
        for projection in coupling.projections:
            if projection.name in selection:
                units = selection[projection.name]
                # First the positions in the whole weight, if its units have `order`. `_layer` makes them those in s2.
                positions = projection.elements(units if order is None else inverse(order)[units])
                parts.setdefault(projection.path, []).append(Part(projection, positions, projection.elements(units)))
    for path, parts_here in parts.items():
        found = find(model, path)
        if isinstance(found, nn.Parameter):
            layer, position = _stack(found, parts_here, config), parameter_position(model, path)
            record.mounts[path] = Mount(None, layer, parts_here, position)
        else:
            record.mounts[path] = Mount(found, _layer(found, parts_here, record, config), parts_here)


def mount_layers(model: nn.Module, record: Record, extra_names: Iterable[str]) -> None:
    """Mount the layers of a record. It can be called again if it, or :func:`unmount_layers`, was interrupted.

    Args:
        model: Model of the record.
        record: Its record, with the moves and the layers.
        extra_names: Names of the parameters that are trained in full.
    """
    model.requires_grad_(False)
    set_repacking(record.repacking_stopped, False)
    allow_training(model)
    for move in record.moves:
        move.do(model, later=record.awaits_weights)
    for path, mounted in record.mounts.items():
        put(model, path, mounted.layer)
        if mounted.original is not None:
            mounted.layer.take_over(mounted.original)
        mounted.layer.s2.requires_grad_(True)
        if isinstance(model.get_submodule(path.rpartition(".")[0]), nn.TransformerEncoderLayer):
            mounted.layer.register_forward_pre_hook(run_by_module)
    fsdp_follow(model, _places(model, record))
    fsdp_shard_slices(model, [mounted.layer for mounted in record.mounts.values()])
    mark_layers(record)
    for coupling in trained_couplings(record.couplings, cast(Selection, record.selection)):
        replace_forward(model, coupling, record)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.grad = None  # of a backward before: an optimizer would step with it
    add_checkpoint_hooks(model, record.mounts)
    add_save_functions(model, record)
    unfreeze(model, record, extra_names)


def run_by_module(*_: Any) -> None:
    """Forward pre-hook that does nothing. With one, nn.TransformerEncoderLayer runs its layers in evaluation mode too.

    Its fast path would read their weights, and give the slices no gradient.
    """


def _places(model: nn.Module, record: Record) -> list[tuple[Place, Place]]:
    """Where FSDP2 finds each parameter without the trainable layers, and with them."""
    found: list[tuple[Place, Place]] = []
    for path, mounted in record.mounts.items():
        if mounted.original is None:
            owner, _, name = path.rpartition(".")
            found.append(((model.get_submodule(owner), name), (mounted.layer, "weight")))
        else:
            found += [((mounted.original, name), (mounted.layer, name)) for name in mounted.original._parameters]
    return found


def _layer(original: Any, parts: list[Part], record: Record, config: S2FTConfig) -> S2Layer:
    """Make a module's layer: on a slice if the parts fill one, else on an index. Their positions become those in s2."""
    dim = parts[0].projection.dim
    found = contiguous_range(torch.cat([part.positions for part in parts]))
    if found is None:
        _number_positions(parts)
    else:
        for part in parts:
            part.positions = part.positions - found[0]
    # Tensor parallelism puts the units elsewhere: then an index, in the order of s2.
    kind, index = kind_of(original), _current_index(parts, record)
    is_slice = found is not None and kind is not SPLIT_LINEAR and torch.equal(index, torch.arange(*found, device="cpu"))
    where: dict[str, Any] = {"start": found[0], "end": found[1]} if found and is_slice else {"index": index}
    delta_dtype = config.delta_dtype_for(original.weight.dtype)
    layer = cast("tuple[type[Any], ...]", kind.layers)[dim].from_module(original, **where, delta_dtype=delta_dtype)
    if (style := style_of(original)) is not None:  # transformers' tensor parallelism runs the layer by it
        layer.install(style)
    return layer


def _current_index(parts: list[Part], record: Record) -> Tensor:
    """Where the elements of s2 are in the weight once the moves are done, in the order of s2, shape [n], int64."""
    index = torch.empty(sum(part.elements.numel() for part in parts), dtype=torch.int64, device="cpu")
    for part in parts:
        move = record.move_of.get(part.projection.name)
        index[part.positions] = part.elements if move is None else move.places(part.projection)[part.elements]
    return index


def _stack(original: nn.Parameter, parts: list[Part], config: S2FTConfig) -> S2Layer:
    """Make the layer of an expert stack."""
    parts.sort(key=lambda part: cast(int, part.projection.expert))
    index = by_key((cast(int, part.projection.expert), part.positions) for part in parts)
    _number_positions(parts)
    return EXPERTS.layers[parts[0].projection.dim](
        original,
        {expert: torch.cat(places) for expert, places in index.items()},
        config.delta_dtype_for(original.dtype),
        parts[0].projection.transposed,
    )


def _number_positions(parts: list[Part]) -> None:
    """Set the parts' positions in an s2 that holds one part after the other."""
    first = 0
    for part in parts:
        part.positions = torch.arange(first, first + part.elements.numel(), device="cpu")
        first += part.elements.numel()


def _moves(model: nn.Module, trained: list[Coupling], selection: Selection) -> list[Move]:
    """Make the moves that bring selected units together, after checks. With tensor parallelism no unit changes ranks.

    A coupling without a move is trained in place: its units can't move, or no rank has them whole.
    """
    check_can_move(model, trained)
    blocks = [(coupling, unit_blocks(model, coupling)) for coupling in trained if coupling.movable]
    return [
        Move(coupling, order_in_blocks(found, *_selected(coupling, selection)))
        for coupling, found in blocks
        if found is not None
    ]


def _selected(coupling: Coupling, selection: Selection) -> tuple[list[Tensor], Tensor | None]:
    """The selected units of the producers and of the consumer."""
    consumer = coupling.consumer
    return (
        [selection[p.name] for p in coupling.producers if p.name in selection],
        selection[consumer.name] if consumer is not None and consumer.name in selection else None,
    )


# ---- what can be trained -------------------------------------------------------------------------------------------
#
# transformers splits a layer by a style: the weight becomes a DTensor, and the style replaces the layer's forward by
# one that brings inputs and outputs into the layouts that the split needs. A trainable layer gets the same style.

STYLES = ("ColwiseParallel", "RowwiseParallel", "PackedColwiseParallel")  # of transformers, for linear layers


def check_can_move(model: nn.Module, couplings: list[Coupling]) -> None:
    """Raise ValueError if the units of a movable coupling can't be reordered with the weights as they are."""
    names = _names_of_parameters(model)
    for coupling in (one for one in couplings if one.movable):
        handles = [weight_at(model, projection) for projection in coupling.projections]
        obstacles = [
            f"{handle.path} is a quantized weight ({type(handle.holder).__name__})"
            for handle in handles
            if handle.read_only
        ]
        tied = [names.get(memory_of(tensor), []) for tensor in tensors_of(model, coupling)]
        obstacles += [f"{' and '.join(found)} are one tied weight" for found in tied if len(found) > 1]
        if obstacles:
            raise ValueError(f"{obstacles[0]}, whose units can't change place: use layout='indexed'")


def _names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, by its memory."""
    return by_key((memory_of(parameter), name) for name, parameter in model.named_parameters(remove_duplicate=False))


def check_one_place(model: nn.Module, couplings: list[Coupling], selection: Selection) -> None:
    """Raise ValueError if a layer to train, or its weight, is in several places of the model.

    Only one of these places would get a trainable layer, and the others would compute with its slice, whose gradient
    would lack their part.
    """
    names = _names_of_parameters(model)
    for projection in projections_of(couplings):
        tied = names.get(memory_of(weight_at(model, projection).tensor), [])
        if projection.name in selection and len(tied) > 1:
            raise ValueError(
                f"{' and '.join(tied)} are one tied weight, which can't be trained, because each place would need the "
                "gradients of the others: give each place a layer with a weight of its own, or leave its layer out"
            )


def check_gradients_pass(model: nn.Module) -> None:
    """Raise ValueError for a quantized layer, trained or not, that passes no gradient to its input."""
    for path, module in model.named_modules():
        if not kind_of(module).passes_gradient(module):
            raise ValueError(
                f"{path} ({type(module.weight).__name__}) passes no gradient to its input, because it "
                "quantizes that too: use a configuration that quantizes weights only"
            )


def check_shards(model: nn.Module, couplings: list[Coupling]) -> None:
    """Raise ValueError for a weight that is spread over ranks by something else than FSDP2 and tensor parallelism."""
    managed = managed_by_fsdp(model)
    for projection in projections_of(couplings):
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


def check_split_layers(model: nn.Module, couplings: list[Coupling]) -> None:
    """Raise ValueError for a layer of these couplings that tensor parallelism runs in a way that can't be trained."""
    for path, projection in {projection.path: projection for projection in projections_of(couplings)}.items():
        handle = weight_at(model, projection)
        obstacle = _obstacle(handle.holder, handle.tensor, handle.kind.read_only is not None)
        if obstacle:
            raise ValueError(f"{path} {obstacle}: train other projections, or {WITHOUT}")


def _obstacle(found: nn.Module | Tensor, weight: Any, is_quantized: bool) -> str:
    """The reason why a layer can't be trained under tensor parallelism, in words; an empty string if it can."""
    # as transformers and accelerate name them
    is_split = is_dtensor(weight) and not {"tp", "ep"}.isdisjoint(weight.device_mesh.mesh_dim_names or ())
    if isinstance(found, Tensor):
        return (
            "holds experts that are split by tensor or expert parallelism, which s2ft can't train" if is_split else ""
        )
    style = style_of(found)
    by = (
        getattr(found.forward, "__qualname__", "another forward")
        if style is None
        else f"the style {type(style).__name__}"
    )
    if kind_of(found) is SPLIT_LINEAR:
        if split_of(weight) is None:
            return f"is replicated by tensor parallelism ({weight.placements}), which s2ft can't train"
        is_known = type(style).__name__ in STYLES and type(style).__module__.startswith("transformers.")
        if style is None and "forward" in found.__dict__ or style is not None and not is_known:
            return f"is split by tensor parallelism, and {by} has replaced its forward"
        return ""
    if style is not None and is_quantized:
        return "is a quantized weight that is split by tensor parallelism, which s2ft can't train"
    if style is not None or is_split:
        return f"is run by tensor parallelism ({by}) in a way that s2ft can't train"
    return ""


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


# ---- unmounting ----------------------------------------------------------------------------------------


def unmount_layers(model: nn.Module, record: Record) -> None:
    """Undo :func:`mount_layers`: plain modules, with the weights as they are and the units in original order.

    A merge calls it alone; all else calls `deactivate` before, which puts the base back into the weights. It can be
    called again if it was interrupted, and does nothing if nothing is mounted. The record still contains what was
    mounted; call :meth:`Record.forget_trainable` afterwards if the model keeps the record.
    """
    if record.snapshot is not None:  # a proof was interrupted
        record.snapshot.restore()
    remove_save_functions(model, record)
    restore_forwards(model, record)
    remove_checkpoint_hooks(model)
    reshard_all(model)
    fsdp_release_slices(model, [mounted.layer for mounted in record.mounts.values()])
    for path, mounted in sorted(record.mounts.items(), key=lambda item: item[1].position or 0):
        if mounted.original is None:
            put(model, path, cast(nn.Parameter, mounted.layer.weight), mounted.position)
        else:
            remove_hooks(mounted.layer._forward_pre_hooks, run_by_module)
            mounted.layer.give_back(mounted.original)
            mounted.original.train(mounted.layer.training)
            mounted.original._is_full_backward_hook = mounted.layer._is_full_backward_hook  # the dicts are shared
            put(model, path, mounted.original)
    fsdp_follow(model, [(there, here) for here, there in _places(model, record)])
    for move in reversed(record.moves):
        move.undo(model)
    set_repacking(record.repacking_stopped, True)
    restore_quantizer(model)


def make_plain(model: nn.Module, record: Record) -> nn.Module:
    """Return the plain model, without a record, with the weights as they are and the units in original order."""
    unmount_layers(model, record)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(record.required_grad.get(key, parameter.requires_grad))
    remove_record_and_hooks(model)
    for mounted in record.mounts.values():  # a graph may keep the layer: an optimizer's step would write its slice
        mounted.layer.base, mounted.layer.enabled = None, False
    return model


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
    blocks = torch.zeros(coupling.count, dtype=torch.int64, device="cpu")
    for number, owners in enumerate(_owners(model, coupling)):
        blocks = owners[:, 0] if number == 0 else blocks
        if bool((owners != blocks[:, None]).any()):
            return None
    return blocks


def _owners(model: nn.Module, coupling: Coupling) -> Iterator[Tensor]:
    """Yield the ranks [units, elements of a unit] for every weight and vector that is split along the units."""
    units = torch.arange(coupling.count, device="cpu")
    for projection in coupling.projections:
        split = split_of_units(model, projection)
        if split is not None:
            yield split.owners[projection.elements(units)].view(coupling.count, -1)
    for vector in coupling.vectors:
        tensor = find(model, vector.path)
        split = split_of(tensor) if is_dtensor(tensor) and "tp" in (tensor.device_mesh.mesh_dim_names or ()) else None
        if split is not None and split.dim == (vector.expert is not None):
            side = Projection("u", vector.path, len(units), vector.unit, 0, start=vector.start, size=vector.size)
            yield split.owners[side.elements(units)].view(coupling.count, -1)


# ---- whole changes --------------------------------------------------------------------------------------------------


@contextmanager
def starting_from_base(model: nn.Module, record: Record) -> Iterator[None]:
    """Switch all adapters off and give the model its record, so that the body can mount; undone if it fails.

    If the body fails, everything is as before: the active adapters are active again, and a model that had no adapters
    is plain. If it succeeds, the loaded adapters stay off.
    """
    active, required = dict(record.active), [(one, one.requires_grad) for one in model.parameters()]
    try:
        add_record_and_hooks(model, record)
        deactivate(model, record)
        yield
    except BaseException:
        _drop_trainable(model, record)
        if record.loaded:
            activate(model, record, active)
        else:
            make_plain(model, record)
        for parameter, was_required in required:
            parameter.requires_grad_(was_required)
        raise


def _drop_trainable(model: nn.Module, record: Record) -> None:
    """Remove the trainable layers. No adapter is active then, and nothing is trained."""
    deactivate(model, record)
    unmount_layers(model, record)
    record.forget_trainable()
    model.requires_grad_(False)


def remove_all(model: nn.Module, record: Record) -> None:
    """Remove all adapters and the record: the model is the plain base, bit for bit."""

    def change() -> None:
        if find_record(model) is not None:
            deactivate(model, record)
            make_plain(model, record)

    all_or_nothing(change)


def end_training(model: nn.Module, record: Record, adapter: Adapter | None = None) -> None:
    """Remove the trainable layers. What was active is active again, with the same bits in the weights.

    Args:
        model: Model of the record.
        record: Record with a trainable adapter.
        adapter: A copy of the trainable adapter, which can be written into the weights and is loaded in its place.
    """
    active = dict(record.active)

    def replace() -> None:
        _drop_trainable(model, record)
        if adapter is not None:
            record.loaded[adapter.name] = adapter

    def change() -> None:
        replace()
        activate(model, record, active)

    all_or_nothing(change, recover=replace)  # then no adapter is active


@on_unwrapped
def detach(model: nn.Module) -> nn.Module:
    """Remove every adapter and return the base model, bit for bit as it was before attach.

    It also does this after an earlier call of any function was interrupted.

    Args:
        model: Model with adapters.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no adapters, or ZeRO-3 has sharded it. ``set_adapter(model, None)`` restores the base
            of such a model.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> s2ft.detach(model) is model
        True
    """
    record = record_of(model)
    check_not_in_engine(model, "detach", removes=True)
    remove_all(model, record)
    return model


@on_unwrapped
def merge(model: nn.Module) -> nn.Module:
    """Keep the active adapters in the weights and return the plain model, with units in original order.

    The weights equal those that the adapter was trained with, bit for bit. The base is kept until the end: after an
    interrupt the adapter is still there, and no adapter is active.

    Args:
        model: Model with an active adapter.

    Returns:
        The same model, without adapters.

    Raises:
        ValueError: No adapter is active, the base is quantized, or ZeRO-3 has sharded the model.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> s2ft.merge(model).save_pretrained("merged")
        >>> s2ft.list_adapters(model)
        []
    """
    record = record_of(model)
    check_not_in_engine(model, "merge", removes=True)
    if not record.active:
        raise ValueError("no adapter is active, so there is nothing to merge: set_adapter first, or detach")
    check_slices_are_here(record, in_weights=True)
    if record.trains:
        check_plain_and_untied(model, record, record.parts)

    def change() -> nn.Module:
        with torch.enable_grad():  # else values that were written through `.data` are not looked for
            write_changed_layers(model, record)
        return make_plain(model, record)  # the weights hold base + s2, and merging is leaving it there

    def recover() -> None:
        if find_record(model) is not None:  # else all was done: the record goes last
            add_record_and_hooks(model, record)
            for move in record.moves:
                move.recover(model)
            if record.trainable is None:
                model.requires_grad_(False)
            else:  # the layers restore the base in their own order of units
                mount_layers(model, record, record.extra.base)
            deactivate(model, record)

    return all_or_nothing(change, recover)
