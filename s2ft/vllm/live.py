"""A few numbers of the weights that an engine computes with, however it stores them.

A linear layer multiplies by its weight. So a row of zeros with one 1 gives a column of the weight, whether the weight
is plain, packed for a processor, or quantized. vLLM's own layers say which rows and columns of an adapter a rank takes:
where these are not the rows and columns of the weight that the rank has, an adapter would change others.
"""

from typing import Any

import torch
from torch import Tensor, nn

from s2ft.model.fingerprint import QUANTIZATION, SAMPLES, TOLERANCE
from s2ft.vllm.compatibility import part_of
from s2ft.vllm.names import Target, Targets, sizes

PROBES = 8  # columns of a weight that are compared


# Some columns of a weight as a rank has them: the rows of the whole weight that the rank has, [m] int64; which of the
# columns it has, [k] bool; and the numbers, float32 [m, k], with zeros in columns that another rank has.
Columns = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def live_columns(layer: nn.Module, target: Target, columns: Tensor) -> Columns | None:
    """Read columns of a module of the checkpoint from the layer that computes it.

    Args:
        layer: The layer, which vLLM has wrapped for LoRA.
        target: Where the module lies in it.
        columns: Numbers of the columns, [k] int64.

    Returns:
        The columns; None for a layer that does not say its sizes.
    """
    outputs, inputs = sizes(layer, target.slot)
    if outputs is None or inputs is None:
        return None
    base, slot = part_of(layer, "base_layer"), target.slot
    x = torch.zeros(columns.numel(), inputs)
    x[torch.arange(columns.numel()), columns] = 1
    rows, first = torch.arange(outputs)[:, None], 0
    count = 1 if slot is None else part_of(layer, "n_slices")
    if part_of(layer, "tp_size") > 1:  # the rows and columns that vLLM takes of an adapter here
        x = _take(layer, "slice_lora_a", x, slot, count)
        rows = _take(layer, "slice_lora_b", rows, slot, count)
    if slot is not None:
        first = sum(part_of(layer, "output_slices")[:slot])
    device = part_of(layer, "device")
    y = base.quant_method.apply(base, x.to(device, part_of(base, "params_dtype")), None)
    rows = rows[:, 0]
    return rows, x.any(1), y[:, first : first + rows.numel()].t().float().cpu()


def _take(layer: nn.Module, name: str, values: Tensor, slot: int | None, count: int) -> Tensor:
    """What vLLM takes of one factor of an adapter on this rank. Layers that shard LoRA take parts of its rank, too."""
    take = next(vars(one)[name] for one in type(layer).__mro__ if name in vars(one) and "Sharded" not in one.__name__)
    if slot is None:
        return take(layer, values)
    return take(layer, [values if n == slot else None for n in range(count)])[slot]


# ---- the same base ------------------------------------------------------------------------------------


def live_difference(
    adapter_manager: Any, names: dict[str, list[tuple[str, str]]], theirs: dict[str, Any], is_quantized: bool
) -> str:
    """Compare the live layers with the samples of an adapter's fingerprint.

    Args:
        adapter_manager: vLLM's LoRAModelManager.
        names: The weights of the fingerprint by layer: labels and names of parameters.
        theirs: The adapter's fingerprint.
        is_quantized: Whether one of both bases is quantized. The tolerance is that of quantization then, else that of
            rounding.

    Returns:
        The difference in words; empty if there is none.
    """
    targets, differ, compared = Targets(adapter_manager), [], 0
    for layer, pairs in names.items():
        samples = theirs["layers"].get(layer, {}).get("samples", [])
        if len(samples) != SAMPLES * len(pairs):
            return f"layer {layer} has other weights"
        found = [
            (samples[SAMPLES * place + n], value)
            for place, (_, name) in enumerate(pairs)
            for n, value in _samples(targets, name).items()
        ]
        compared += len(found)
        if found:
            wanted, ours = torch.tensor(found).t()
            close = torch.allclose(wanted, ours, rtol=TOLERANCE, atol=TOLERANCE * float(wanted.abs().mean()))
            if not (_close(wanted, ours) if is_quantized else close):
                differ.append(layer)
    if differ:
        return f"{len(differ)} of {len(names)} layers differ, the first is layer {differ[0]}"
    return "" if compared else "vLLM serves adapters on none of the layers whose numbers the adapter has recorded"


def _close(wanted: Tensor, ours: Tensor) -> bool:
    return float((wanted - ours).abs().mean()) <= QUANTIZATION * float(wanted.abs().mean())


def _samples(targets: Targets, name: str) -> dict[int, float]:
    """The samples of a weight that this rank has, by their number in the fingerprint."""
    path, _, kind = name.rpartition(".")
    try:
        target = targets.find(path) if kind == "weight" else None
    except ValueError:  # no layer for adapters
        return {}
    if target is None or not target.is_here:
        return {}
    outputs, inputs = sizes(targets.layers[target.layer], target.slot)
    if outputs is None or inputs is None:
        return {}
    positions = torch.arange(SAMPLES) * max(1, outputs * inputs // SAMPLES)
    found = live_columns(targets.layers[target.layer], target, positions % inputs)
    if found is None:
        return {}
    here, present, values = found
    place = {int(row): n for n, row in enumerate(here)}
    rows = (positions // inputs).tolist()
    return {n: float(values[place[row], n]) for n, row in enumerate(rows) if row in place and present[n]}


# ---- the same layout ------------------------------------------------------------------------------------


def has_layout(targets: Targets, path: str, weight: Tensor) -> bool:
    """Whether a layer has the rows and columns of a checkpoint's weight where vLLM adds those of an adapter.

    Args:
        targets: The layers.
        path: Path of the module in the model of transformers.
        weight: The checkpoint's weight, [outputs, inputs].
    """
    target = targets.find(path)
    if not target.is_here:
        return True
    columns = torch.linspace(0, weight.shape[1] - 1, PROBES).long()
    found = live_columns(targets.layers[target.layer], target, columns)
    if found is None or not bool(found[1].any()):
        return True
    rows, present, values = found
    return _close(weight[rows][:, columns].float()[:, present], values[:, present])
