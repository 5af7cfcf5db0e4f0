"""Weights that arrive after an adapter was attached, on ranks that started without them.

Under FSDP2 with cpu_ram_efficient_loading only the first rank of a machine reads the base. On the other ranks the model
is on the meta device while the trainable layers are mounted, and the weights arrive when it has been sharded: by
load_state_dict, in the base's order. Until then the record waits for them, the units have not moved, and the trainable
layers refuse to run. When the weights are there, on all ranks together: they are compared with the base's fingerprint,
the base of the extra weights is kept, and the units move on the shards.

A layer that runs writes its own slice if s2 has changed. A hook of the model does it for all layers first: for code
that reads a weight past its layer, and for weights that are spread over ranks, where each rank writes what it owns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code

from s2ft.attached.active import full_copies, record_unfrozen, set_extra, write_slices
from s2ft.attached.record import Attachment, attachment_of, find_attachment
from s2ft.distributed import fsdp_modules, is_sharded, ranks_sharing, reshard_all, wait_for_ranks, will_be_loaded_again
from s2ft.model.fingerprint import difference, fingerprint
from s2ft.model.weights import tensors_of
from s2ft.ops._library import transforms_active

# ---- waiting -------------------------------------------------------------------------------------------


def expect_weights(model: nn.Module, record: Attachment) -> None:
    """Make the record wait for the weights if they are on the meta device, or will be sent there to be sharded."""
    record.awaits_weights = _any_on_meta(model, record) or will_be_loaded_again()


def expect_none(record: Attachment) -> None:
    """Make the model run as it is: it is a copy without numbers, for which no weights will arrive."""
    record.awaits_weights, record.has_taken_up = False, True
    for mount in record.mounts.values():
        mount.layer.awaits_order = False


def after_apply(model: nn.Module, record: Attachment) -> None:
    """Make the record wait for the weights if the model has been moved to the meta device."""
    if record.mounts and _any_on_meta(model, record):
        for move in record.moves:
            move.forget(model)
        record.awaits_weights = True
        mark_layers(record)


def mark_layers(record: Attachment) -> None:
    """Tell each trainable layer whether its units have yet to move, and what its states contain until then."""
    waiting = {projection.path for move in record.moves if move.is_pending for projection in move.coupling.projections}
    for path, mount in record.mounts.items():
        mount.layer.awaits_order = path in waiting
        if record.awaits_weights:
            mount.layer.leave_units_out_of_states()


def _any_on_meta(model: nn.Module, record: Attachment) -> bool:
    return any(tensor.is_meta for coupling in record.couplings for tensor in tensors_of(model, coupling))


@contextmanager
def not_awaiting(model: nn.Module, record: Attachment) -> Iterator[None]:
    """Inside, a model whose weights are here, and will be loaded again, runs with its units in the new order."""
    if not record.awaits_weights:
        yield
        return
    record.awaits_weights = False
    try:
        for move in record.moves:
            move.finish(model)
        mark_layers(record)
        yield
    finally:
        for move in record.moves:
            move.postpone(model)
        record.awaits_weights = True
        mark_layers(record)


# ---- arriving ------------------------------------------------------------------------------------------


def after_load(model: nn.Module, *_: Any) -> None:
    """Post-hook of load_state_dict: take up weights that were loaded."""
    if not take_up(model):
        _reorder_if_base_was_loaded(model)


def _reorder_if_base_was_loaded(model: nn.Module) -> None:
    """Reorder the shards of FSDP2 again if a state has brought them in the base's order.

    The state of a sharded model has the model's own order, and a checkpoint of the base has the base's. Nothing but the
    fingerprint tells one from the other. Every rank loads a state of a sharded model, so every rank calls this.
    """
    record = find_attachment(model)
    if record is None or record.awaits_weights or record.written or not any(move.is_done for move in record.moves):
        return
    if not any(isinstance(module, fsdp_modules()) for module in model.modules()):
        return
    reshard_all(model)
    if difference(fingerprint(model, record.couplings), record.fingerprint):
        return
    for move in record.moves:
        move.start_again()
    mark_layers(record)
    for move in record.moves:
        move.finish(model)
    mark_layers(record)


def take_up(model: nn.Module) -> bool:
    """Take up weights that have arrived since the last call. Every rank of a sharded model calls this.

    Returns:
        Whether any have arrived.

    Raises:
        RuntimeError: They are not those of the base. The units have not moved.
    """
    record = find_attachment(model)
    if record is None or not record.mounts or not _has_to_take_up(model, record):
        return False
    reshard_all(model)
    if _any_on_meta(model, record):
        return False
    for move in record.moves:
        move.start_again()  # what was loaded is in the base's order
    mark_layers(record)
    _check_is_base(model, record)
    for mount in record.mounts.values():
        if mount.layer.s2.is_meta:
            raise RuntimeError(
                "the weights were loaded, and the slices (s2) are still on the meta device: call model.to_empty(device="
                "...) before you load the state of the base, or load a state that has the slices"
            )
    try:
        for move in record.moves:
            move.finish(model)
        _keep_extra_base(model, record)
        record.awaits_weights, record.has_taken_up = False, True
    except BaseException:  # an interrupt: the next call starts from the base's order again
        for move in record.moves:
            move.postpone(model)
        raise
    for mount in record.mounts.values():
        mount.layer.forget_first_values()
    mark_layers(record)
    values, record.extra.arriving = record.extra.arriving, {}
    set_extra(model, record, values)
    return True


def _has_to_take_up(model: nn.Module, record: Attachment) -> bool:
    """Whether this rank, or another rank with a shard of the same weights, waits for them."""
    if record.awaits_weights:
        return True
    if record.has_taken_up or not record.base.key:
        return False
    if not isinstance(model, fsdp_modules()) and not any(is_sharded(m.layer.weight) for m in record.mounts.values()):
        return False
    record.has_taken_up = not record.base.is_for_others
    return not record.has_taken_up


def _check_is_base(model: nn.Module, record: Attachment) -> None:
    found = fingerprint(model, record.couplings)
    record.expect_base(found)
    differing = difference(found, record.fingerprint)
    if differing:
        raise RuntimeError(
            f"the weights that were loaded are not those of the base that {record.name!r} belongs to: {differing}. "
            "Load the base's own state, in its own order of units"
        )


def _keep_extra_base(model: nn.Module, record: Attachment) -> None:
    """Keep the base of the extra weights, which this rank may not have had."""
    names = list(record.extra.base)
    if names:
        parameters = {name: model.get_parameter(name) for name in names}
        source = _rank_that_has(record, ranks_sharing(parameters.values()))
        if source is None:
            record.extra.base = full_copies(parameters)
        else:
            record.extra.base = {name: _sent(record, name, parameters[name], source) for name in names}


def _rank_that_has(record: Attachment, ranks: list[int] | None) -> int | None:
    """The first rank that has the base of the extra weights; None if none has, or if the weights are whole here."""
    if ranks is None:
        return None
    has = not any(value.is_meta for value in record.extra.base.values())
    key = wait_for_ranks("who has the base of the extra weights", ranks, str(int(has)))
    store = dist.distributed_c10d._get_default_store()
    return next((rank for rank in ranks if store.get(f"{key}/{rank}") == b"1"), None)


def _sent(record: Attachment, name: str, parameter: Tensor, source: int) -> Tensor:
    """Send the base of an extra weight from one rank to all."""
    value = record.extra.base[name].detach()
    device = parameter.device_mesh.device_type
    value = value.new_empty(parameter.shape, device=device) if value.is_meta else value.to(device)
    dist.broadcast(value, source)
    return value.to(parameter.device)


# ---- before a forward -----------------------------------------------------------------------------------------------


def before_forward(model: nn.Module, *_: Any) -> None:
    """Forward pre-hook of a model with adapters.

    Weights that have arrived are taken up, the base of weights that were unfrozen by hand is recorded, and changed
    slices are written.

    Raises:
        RuntimeError: A weight or bias of a coupling was unfrozen, which would get no gradient, or the weights that have
            arrived are not the base's.
    """
    if torch.compiler.is_compiling() or transforms_active():
        return  # in another function's graph each layer checks what its weight holds; torch.func runs them on copies
    record, hooks = attachment_of(model), model._forward_pre_hooks
    is_first = next(iter(hooks.values())) is before_forward
    if not is_first:  # FSDP2 was applied since
        hooks.move_to_end(next(key for key, hook in hooks.items() if hook is before_forward), last=False)
    is_gathered = not is_first and isinstance(model, fsdp_modules())  # by the hook of FSDP2, which came first
    if take_up(model) and is_gathered:
        model.unshard()  # again
    if model.training and torch.is_grad_enabled() and record.rest is None:  # a proof unfreezes weights for its time
        record_unfrozen(model, record)
    if not is_gathered:  # else layers compute with copies, this once
        write_slices(model, record)


skip_code(before_forward.__code__)  # a compiled model runs its hooks outside of the graph: this one as it is
