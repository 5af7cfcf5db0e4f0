"""A few numbers of the weights that an engine computes with, however it stores them.

A linear layer multiplies by its weight. So a row of zeros with one 1 gives a column of the weight, whether the weight is
plain, packed for a processor, or quantized.
"""

from typing import Any

import torch
from torch import Tensor

from s2ft.model.fingerprint import QUANTIZATION, SAMPLES
from s2ft.vllm.names import Targets, sizes


def live_difference(adapter_manager: Any, names: dict[str, list[tuple[str, str]]], theirs: dict[str, Any]) -> str:
    """Compare the live layers with the samples of an adapter's fingerprint, with the tolerance of quantization.

    Args:
        adapter_manager: vLLM's LoRAModelManager.
        names: The weights of the fingerprint by layer: labels and names of parameters.
        theirs: The adapter's fingerprint.

    Returns:
        The difference in words; empty if there is none.
    """
    targets, differ, compared = Targets(adapter_manager), [], 0
    for layer, pairs in names.items():
        samples = theirs["layers"].get(layer, {}).get("samples", [])
        if len(samples) != SAMPLES * len(pairs):
            return f"layer {layer} has other weights"
        ours, wanted = [], []
        for place, (_, name) in enumerate(pairs):
            found = _samples(targets, name)
            for position, value in found.items():
                ours.append(value)
                wanted.append(samples[SAMPLES * place + position])
        compared += len(ours)
        if ours and not _close(torch.tensor(wanted), torch.tensor(ours)):
            differ.append(layer)
    if not compared:
        return "none of its layers is one that vLLM serves adapters on, so that the bases can't be compared"
    return f"{len(differ)} of {len(names)} layers differ, the first is layer {differ[0]}" if differ else ""


def _close(wanted: Tensor, ours: Tensor) -> bool:
    return float((wanted - ours).abs().mean()) <= QUANTIZATION * float(wanted.abs().mean())


def _samples(targets: Targets, name: str) -> dict[int, float]:
    """The samples of a weight that this rank has, by their number in the fingerprint."""
    path, _, kind = name.rpartition(".")
    try:
        target = targets.find(path) if kind == "weight" else None
    except ValueError:
        return {}
    if target is None or not target.is_here:
        return {}
    outputs, inputs = sizes(targets.layers[target.layer], target.slot)
    if outputs is None or inputs is None:
        return {}
    step = max(1, outputs * inputs // SAMPLES)
    positions = [(n, divmod(n * step, inputs)) for n in range(SAMPLES)]
    columns = live_columns(targets.layers[target.layer], target, [column for _, (_, column) in positions])
    if columns is None:
        return {}
    values, first, has = columns
    return {
        n: float(values[row - first, n])
        for n, (row, _) in positions
        if has[n] and first <= row < first + values.shape[0]
    }
