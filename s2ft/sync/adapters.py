"""An adapter as slices of the tensors of a checkpoint, so that it can be written into an engine's weights."""

import torch
from torch import Tensor, nn

from s2ft.adapter import Adapter
from s2ft.model.coupling import projections_of
from s2ft.model.registry import couplings_of
from s2ft.model.weights import weight_at
from s2ft.sync.names import CheckpointNames, Piece, joined
from s2ft.sync.receiver import AdapterSlices
from s2ft.sync.wire import SliceSpec


def adapter_slices(adapter: Adapter, model: nn.Module) -> AdapterSlices:
    """Find the tensors of a checkpoint that an adapter changes.

    Args:
        adapter: The adapter.
        model: A model of the adapter's base. It may be on the meta device: only its structure is used.

    Returns:
        The slices with their deltas, and the adapter's weights in full.

    Raises:
        ValueError: The adapter is of another model, or the checkpoint holds a weight in a form in which slices have no
            place. The message names it.

    Example:
        >>> from s2ft.sync.adapters import adapter_slices
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> slices = adapter_slices(s2ft.get_adapter(model, "default"), s2ft.detach(model))
        >>> slices.specs[0].name, slices.specs[0].dim, tuple(slices.deltas[0].shape) == slices.specs[0].values_shape
        ('model.layers.0.mlp.down_proj.weight', 1, True)
    """
    names = CheckpointNames(model)
    deltas = list(adapter.deltas.values())
    pieces = dict(enumerate(_pieces(adapter, model, names)))
    specs, values = [], {}
    for name, shares in joined(pieces).items():
        first = shares[0][1]
        index, order = torch.cat([piece.index for _, piece in shares]).sort()
        if bool((index.diff() == 0).any()):
            raise ValueError(f"{name}: two projections of the adapter change the same unit")
        parts = [piece.of(deltas[number].values, deltas[number].dim) for number, piece in shares]
        values[len(specs)] = torch.cat(parts, first.dim).index_select(first.dim, order).contiguous()
        specs.append(_spec(name, first.shape, first.dim, index))
    wholes = {}
    for weight, value in adapter.extra_weights.items():
        for name, tensor in names.whole(weight, value).items():
            wholes[len(specs)] = tensor
            specs.append(_spec(name, tuple(tensor.shape), 0, torch.arange(tensor.shape[0])))
    return AdapterSlices(adapter.name, specs, values, wholes)


def _pieces(adapter: Adapter, model: nn.Module, names: CheckpointNames) -> list[list[Piece]]:
    known = {one.name: one for one in projections_of(couplings_of(model, adapter.couplings))}
    found = []
    for path, delta in adapter.deltas.items():
        if path not in known:
            raise ValueError(f"the adapter {adapter.name!r} has {path}, which {type(model).__name__} does not have")
        handle = weight_at(model, known[path])
        weight = handle.path if handle.expert is not None else f"{handle.path}.weight"
        shape, across = handle.tensor.shape, handle.shape[1 - delta.dim]
        if delta.values.shape[1 - delta.dim] != across or int(delta.index[-1]) >= handle.shape[delta.dim]:
            raise ValueError(
                f"{path} of the adapter {adapter.name!r} has values of shape {tuple(delta.values.shape)}, and the "
                f"weight of the served model is {tuple(shape)}"
            )
        found.append(names.pieces(weight, shape, delta.dim, delta.index, handle.expert, handle.kind.transposed))
    return found


def _spec(name: str, shape: tuple[int, ...], dim: int, index: Tensor) -> SliceSpec:
    return SliceSpec(name, tuple(shape), dim, index, torch.zeros_like(index))
