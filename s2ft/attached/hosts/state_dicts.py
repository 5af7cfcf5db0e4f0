"""State dicts of models that s2ft has changed: they contain the base's weights in the base's own order.

Trained weights hold base + delta, and in layout `permuted` the units of coupled weights are in another order than in
the base. So ``state_dict()`` returns copies of these weights with the base's values in original order. A parameter that
a trainable layer has replaced keeps its name. The copies load into a plain model of the base, and into one with other
units selected. ``load_state_dict`` accepts only the base, in either order: the weights are frozen, so loading it
changes nothing, and anything else is an error. Loaded adapters that are active stay in the copies, as they are in
the weights.

Weights that FSDP2 or ZeRO-3 has sharded stay in their order, because no rank has all the units that would move, and
under the name in their layer, by which FSDP looks for them. Under tensor parallelism each rank puts its own units in
order. Packed weights are gathered for that, so every rank must call ``state_dict()`` if there are any.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.attached.extra_weights import keep_unfrozen
from s2ft.attached.record import Attachment, Mount, attachment_of
from s2ft.distributed import is_dtensor, is_sharded
from s2ft.distributed.fsdp import managed_by_fsdp
from s2ft.layers import kind_of
from s2ft.model.permutation import MovingTensor, inverse, moving_tensors
from s2ft.model.weights import tensors_of, weight_at
from s2ft.ops import swap_


class _BaseOrder:
    """Makes copies of a model's weights in the base's order."""

    def __init__(self, model: nn.Module, record: Attachment) -> None:
        self.model, self.record = model, record
        self.moves: dict[int, list[MovingTensor]] = {}  # by id of a tensor: the moves that restore its order
        for move in record.moves:
            if move.is_done:
                for moving in moving_tensors(model, move.coupling, inverse(move.order)):
                    self.moves.setdefault(id(moving.tensor), []).append(moving)
        self.layers = {
            id(mounted.layer.weight): mounted.layer
            for mounted in record.mounts.values()
            if "weight" in mounted.layer._parameters
        }
        self.written = {id(weight_at(model, entry.projection).tensor) for entry in record.written}

    def changed(self, tensor: Tensor) -> bool:
        """Whether a tensor may differ from its entry in a state dict."""
        return id(tensor) in self.moves or id(tensor) in self.layers or id(tensor) in self.written

    def copy_of(self, tensor: Tensor, without_written: bool = False) -> Tensor:
        """Copy a parameter or buffer, without the trainable adapter, in original order.

        Args:
            tensor: Parameter or buffer of the model.
            without_written: Whether to leave out the adapters that are written into it.
        """
        layer = self.layers.get(id(tensor))
        copy = (tensor if layer is None else layer.base_weight()).detach().clone()
        for moving in self.moves.get(id(tensor), ()):
            (moving.permute_shard if is_dtensor(copy) else moving.permute)(copy)
        for entry in reversed(self.record.written) if without_written else ():
            handle = weight_at(self.model, entry.projection)
            if not entry.is_local and handle.tensor is tensor:
                view = handle.view(copy)
                swap_(view, entry.index.to(view.device), entry.base.to(view, copy=True), entry.projection.dim)
        return copy


def _tensors(model: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (key in a state dict, tensor) for parameters and buffers; a tied tensor under each of its names."""
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            yield prefix + name, tensor


def put_in_order(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Post-hook of state_dict: replace weights that differ from the base by copies in the base's order."""
    record = attachment_of(model)
    if record.awaits_weights or not (record.moves or record.mounts):
        return  # no unit has moved and no trainable layer runs
    order, copies, is_fsdp = _BaseOrder(model, record), {}, bool(managed_by_fsdp(model))
    for key, tensor in _tensors(model, prefix):
        found = state.get(key)
        # keep_vars=True returns the parameters themselves
        if not isinstance(found, Tensor) or found is tensor or not order.changed(tensor):
            continue
        if is_sharded(tensor) and (not is_dtensor(tensor) or is_fsdp):
            continue
        if id(tensor) not in copies:
            copies[id(tensor)] = order.copy_of(tensor, without_written=True)
        state[key] = copies[id(tensor)]
    replaced = [key for key, mounted in _of_parameters(record, prefix) if not mounted.layer.is_managed]
    names = {f"{key}.weight": key for key in replaced}
    entries = [(names.get(key, key), value) for key, value in state.items()]
    state.clear()  # in place, and the order stays
    state.update(entries)


def _of_parameters(record: Attachment, prefix: str) -> Iterator[tuple[str, Mount]]:
    """Yield the trainable layers that have replaced a parameter, with the parameter's key in a state dict."""
    for path, mounted in record.mounts.items():
        if mounted.original is None:
            yield prefix + path, mounted


def check_is_base(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Pre-hook of load_state_dict: check that the weights of couplings are the base's, and keep them unchanged.

    The base of weights that were unfrozen by hand is recorded first.

    Raises:
        ValueError: They are not. Nothing has changed.
    """
    record = attachment_of(model)
    keep_unfrozen(model, record)
    for key, _ in _of_parameters(record, prefix):
        if key in state:
            state[f"{key}.weight"] = state.pop(key)
    if record.awaits_weights:
        return  # weights that arrive are checked when they are complete, see s2ft.attached.arrival
    order, frozen, same = _BaseOrder(model, record), _coupled(model, record), {}
    for key, tensor in _tensors(model, prefix):
        found = state.get(key)
        if id(tensor) in frozen and isinstance(found, Tensor) and not is_sharded(tensor) and not is_sharded(found):
            if found.shape != tensor.shape or found.is_meta or tensor.is_meta:
                continue  # PyTorch raises an error that names what does not fit
            if not _is_same(order, tensor, found):
                raise ValueError(
                    f"{key} is not the weight of the base that this model's adapters belong to: call "
                    "s2ft.detach(model) first, load the state, and attach again or load the adapter again"
                )
            same[key] = tensor
    state.update(same)  # load_state_dict then copies each onto itself


def _coupled(model: nn.Module, record: Attachment) -> set:
    """Return the ids of the couplings' tensors, except those of quantized layers, which load them themselves."""
    found = {id(tensor) for coupling in record.couplings for tensor in tensors_of(model, coupling)}
    return found - {
        id(parameter) for module in model.modules() if kind_of(module).read_only for parameter in module.parameters()
    }


def _is_same(order: _BaseOrder, tensor: Tensor, found: Tensor) -> bool:
    """Whether `found` is the base of `tensor` in original order, or the present value of `tensor` in either order."""
    found = found.to(tensor)
    return (
        torch.equal(found, tensor)
        or torch.equal(found, order.copy_of(tensor))
        or (bool(order.record.written) and torch.equal(found, order.copy_of(tensor, without_written=True)))
    )
