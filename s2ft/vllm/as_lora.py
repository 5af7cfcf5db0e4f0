"""An adapter of S²FT as vLLM's own LoRA in memory, with all checks before anything changes.

One factor of each module is the trained slice, the other selects its rows or columns. The layers of
:mod:`s2ft.vllm.layers` take the positions and the slice instead.
"""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2ft.adapter import native
from s2ft.adapter.adapter import Adapter
from s2ft.config import refuse
from s2ft.model.fingerprint import LINEAR, TRANSPOSED, Location
from s2ft.model.weights import Delta
from s2ft.vllm import layers
from s2ft.vllm.compatibility import part_of, private
from s2ft.vllm.served_base import ServedBase, served_base
from s2ft.vllm.slice_layer import encode
from s2ft.vllm.wrapped_layers import MERGED, WrappedLayers, sizes

logger = logging.getLogger("vllm.s2ft")  # vLLM prints what loggers below its own say


def lora_of(manager: Any, request: Any, folder: Path) -> Any:
    """Read an adapter as a LoRA of vLLM.

    Args:
        manager: vLLM's WorkerLoRAManager.
        request: vLLM's LoRARequest.
        folder: The adapter's folder.

    Returns:
        A LoRAModel.

    Raises:
        ValueError: The adapter is damaged, is of another base, or can't be served by this server; the message names
            the adapter and says why. Nothing has changed.
    """
    began = time.perf_counter()
    try:
        adapter = native.read(folder)
        base = served_base(manager)
        loras = _weights(adapter, manager, base)
        base.check(adapter)
    except (OSError, ValueError) as error:
        words = str(error).replace(str(folder), request.lora_path)  # the folder may be a copy
        raise ValueError(f"S²FT adapter {request.lora_name!r} ({request.lora_path}): {words}") from error
    rank = max(weights.rank for weights in loras.values())
    lora = part_of(manager, "_lora_model_cls")(request.lora_int_id, rank, loras)
    lora.is_3d_lora_weight = False
    logger.info("s2ft: loaded adapter %s in %.3f s", request.lora_name, time.perf_counter() - began)
    return lora


def _weights(adapter: Adapter, manager: Any, base: ServedBase) -> dict[str, Any]:
    """vLLM's LoRALayerWeights of each module, by the name under which vLLM looks for them."""
    if adapter.extra_weights:
        raise ValueError(
            f"it has {next(iter(adapter.extra_weights))} trained in full, and vLLM's adapters have no whole weights: "
            f"{MERGED}"
        )
    config, adapter_manager = part_of(manager, "lora_config"), part_of(manager, "_adapter_manager")
    locations, targets = base.structure(adapter).locations, WrappedLayers(adapter_manager)
    by_path: dict[str, list[str]] = {}
    for name in adapter.deltas:
        location = locations[name]
        is_expert = location.expert is not None or "experts" in location.storage
        is_linear = location.storage in (LINEAR, TRANSPOSED)
        refuse(
            (is_expert, f"{name} is the weight of experts, which are not served as adapters: {MERGED}"),
            (not is_linear, f"{name} is no linear layer, and vLLM's adapters are of linear layers: {MERGED}"),
        )
        by_path.setdefault(location.path, []).append(name)
    found = {}
    for path, names in by_path.items():
        target = targets.find(path)
        deltas = [adapter.deltas[name] for name in names]
        whole = _sizes_of(path, deltas, locations[names[0]])
        if target.is_here:
            served = sizes(targets.layers[target.layer], target.slot)
            if any(other is not None and other != own for own, other in zip(whole, served)):
                raise ValueError(
                    f"it is of another base: {path} has {whole[0]} outputs and {whole[1]} inputs there, {served[0]} "
                    f"and {served[1]} in the served model"
                )
        rank = sum(delta.index.numel() for delta in deltas)
        if not layers.enabled() and rank > config.max_lora_rank:
            raise ValueError(_too_wide(path, adapter, names, rank, config.max_lora_rank))
        a, b = _factors(deltas, whole, config.lora_dtype)
        found[target.name] = private("vllm.lora.lora_weights", "LoRALayerWeights")(
            target.name, rank, rank, a, b, scaling=1
        )
    return found


# ---- checks ----------------------------------------------------------------------------------------------


def _sizes_of(path: str, deltas: list[Delta], location: Location) -> tuple[int, int]:
    """Outputs and inputs of a weight, by the adapter's file."""
    dim, across = deltas[0].dim, {delta.values.shape[1 - delta.dim] for delta in deltas}
    last = max(int(delta.index.max()) for delta in deltas)
    if len(across) != 1 or any(delta.dim != dim for delta in deltas) or last >= location.size:
        raise ValueError(f"{path}: its slices do not fit a weight of {location.size} {('outputs', 'inputs')[dim]}")
    return (location.size, across.pop()) if dim == 0 else (across.pop(), location.size)


def _too_wide(path: str, adapter: Adapter, names: list[str], rank: int, limit: int) -> str:
    units = sum(adapter.selection[name].numel() for name in names)
    ranks = private("vllm.config.lora", "MaxLoRARanks").__args__
    enough = next((allowed for allowed in ranks if allowed >= rank), None)
    return (
        f"{path} trains {rank} rows or columns ({units} units), and --max-lora-rank is {limit}: "
        + ("no rank of vLLM is enough, so s" if enough is None else f"set it to {enough} or more, or s")
        + "tart the server with S2FT_VLLM_SLICES=1, where adapters have no rank"
    )


def _factors(deltas: list[Delta], whole: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What stands for A [rank, inputs] and B [outputs, rank], with B @ A = the delta.

    One of them selects rows or columns. Layers that hold slices take the index and a row of values for each position.
    """
    dim = deltas[0].dim
    values = torch.cat([delta.values.to(dtype) for delta in deltas], dim).contiguous()
    index = torch.cat([delta.index for delta in deltas])
    if layers.enabled():
        return encode(index, dim), values if dim == 0 else values.t().contiguous()
    one_hot = torch.zeros(index.numel(), whole[dim], dtype=dtype)
    one_hot.scatter_(1, index[:, None], 1)
    return (values, one_hot.t().contiguous()) if dim == 0 else (one_hot, values)
