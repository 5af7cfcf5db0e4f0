"""The base that a vLLM engine serves, as adapters have to know it: its fingerprint, and the layout of its layers.

An adapter belongs to a base whose weights have the numbers of its fingerprint. They are compared with the files that
vLLM has loaded, once for each engine. Where the files can't be read one weight at a time (a quantized checkpoint,
another format), a few numbers of the live layers are compared.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.adapter import native
from s2ft.adapter.adapter import Adapter
from s2ft.config import refuse
from s2ft.model.checkpoint import Checkpoint, StoredWeights, open_checkpoint
from s2ft.model.coupling import Coupling, by_key
from s2ft.model.fingerprint import (
    LINEAR,
    QUANTIZATION,
    QUANTIZED,
    SAMPLES,
    TOLERANCE,
    TRANSPOSED,
    Location,
    difference,
    layer_print,
    read_print,
    structure_of,
)
from s2ft.model.registry import couplings_of
from s2ft.model.weights import Delta
from s2ft.vllm import layers
from s2ft.vllm.compatibility import logger, part_of, private
from s2ft.vllm.layers import MERGED, NO_PLACES, Target, WrappedLayers
from s2ft.vllm.slice_layer import encode

THREADS = 4  # that read weights
Names = dict[str, list[tuple[str, str]]]  # by layer: labels in the fingerprint, and names of parameters


class ServedBase:
    """The model that a vLLM engine was started with."""

    def __init__(self, vllm_config: Any, adapter_manager: Any) -> None:
        """Remember where the model is. Nothing is read.

        Args:
            vllm_config: vLLM's VllmConfig.
            adapter_manager: vLLM's LoRAModelManager.
        """
        self._config, self._manager = vllm_config, adapter_manager
        self._hollow: dict[str, tuple[nn.Module, list[Coupling]]] = {}  # by custom couplings
        self._fingerprints: dict[tuple, dict[str, Any]] = {}  # by dtype and names
        self._compared: list[dict[str, Any]] = []  # fingerprints of adapters of this base
        self._known_layouts: set[tuple[str, str]] = set()  # last words of modules, with their storage

    # ---- the model ---------------------------------------------------------------------------------

    def model_of(self, adapter: Adapter) -> tuple[nn.Module, list[Coupling]]:
        """The served model on the meta device, and the couplings of an adapter in it."""
        from s2ft.text.models import hollow_model

        key = "" if adapter.couplings is None else repr(adapter.couplings)
        if key not in self._hollow:
            folder = self._folder()
            model = hollow_model(str(self._config.model_config.model if folder is None else folder))
            self._hollow[key] = model, couplings_of(model, adapter.couplings)
        return self._hollow[key]

    def _folder(self) -> Path | None:
        """The folder of the checkpoint that vLLM has loaded; None if it is no folder and not in the hub's cache."""
        config = self._config.model_config
        if Path(config.model).is_dir():
            return Path(config.model)
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(
                    config.model,
                    revision=config.revision,
                    cache_dir=self._config.load_config.download_dir,
                    local_files_only=True,
                )
            )
        except (OSError, ValueError):  # not in the cache: a GGUF file, for instance
            return None

    # ---- fingerprint -------------------------------------------------------------------------------

    def check(self, adapter: Adapter) -> None:
        """Compare the served base with the one that an adapter was trained on.

        Raises:
            ValueError: They differ, or vLLM has put rows or columns that the adapter changes in another order.
        """
        if adapter.fingerprint not in self._compared:
            found = self._difference(adapter)
            if found:
                raise ValueError(f"it was trained on another base than the served one: {found}")
            self._compared.append(adapter.fingerprint)
        self._check_layout(adapter)

    def _difference(self, adapter: Adapter) -> str:
        """The difference between the served base and an adapter's, in words; empty if there is none."""
        found, theirs = None, adapter.fingerprint
        dtype, is_quantized = theirs["dtype"], theirs["dtype"].startswith(QUANTIZED)
        stored = None if is_quantized else getattr(torch, dtype, None)
        for ours in self._read(adapter, stored, lambda files: self._fingerprint(files, dtype)):
            found = difference(ours, theirs)
            if not found:
                return ""
        if found is not None:
            return found
        names, config = adapter.structure.base_weights, self._config.model_config
        ways = getattr(config.hf_config, "quantization_config", None), getattr(config, "quantization", None)
        return live_difference(self._manager, names, theirs, is_quantized or ways != (None, None))

    def _check_layout(self, adapter: Adapter) -> None:
        """Compare a few columns of the live layers with the files: once for each kind of module, because vLLM loads
        the modules of one name in one way."""
        targets = WrappedLayers(self._manager)
        for location in adapter.structure.locations.values():
            kind = location.path.rpartition(".")[2], location.storage
            weight = None if kind in self._known_layouts else self._weight(adapter, location)
            if weight is not None and not has_layout(targets, location.path, weight):
                raise ValueError(
                    f"vLLM keeps the rows or columns of {location.path} in another order than the checkpoint, or this "
                    "engine has changed its weights: " + MERGED
                )
            self._known_layouts.add(kind)

    def _weight(self, adapter: Adapter, location: Location) -> Tensor | None:
        """A weight as the files have it, [outputs, inputs]; None if they can't be read."""
        weight = next(self._read(adapter, None, lambda files: files[1](f"{location.path}.weight")), None)
        return weight.t() if weight is not None and location.storage == TRANSPOSED else weight

    def _fingerprint(self, files: "Files", dtype: str) -> dict[str, Any]:
        """The fingerprint of the files in a dtype, computed once, with several weights at a time."""
        names, read = files
        key = dtype, str(names)
        if key not in self._fingerprints:
            weights = [pair for pairs in names.values() for pair in pairs]
            with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
                prints = pool.map(lambda pair: read_print(pair[0], read(pair[1])), weights)
                layers = {layer: layer_print(islice(prints, len(pairs))) for layer, pairs in names.items()}
            self._fingerprints[key] = {"dtype": dtype, "layers": layers}
        return self._fingerprints[key]

    # ---- files -------------------------------------------------------------------------------------

    def _read(self, adapter: Adapter, dtype: torch.dtype | None, read: Callable[["Files"], Any]) -> Iterator[Any]:
        """Yield what a function makes of the files in each way in which they can be read."""
        for way in (self._by_name, self._by_model):
            try:
                checkpoint = self.checkpoint()
                files = checkpoint and way(checkpoint, adapter, dtype)
                if files:
                    yield read(files)
            except (AttributeError, KeyError, OSError, ValueError) as error:  # CannotStream is a ValueError
                logger.info("s2ft: the base's files are not compared in this way: %s", error)

    def checkpoint(self) -> Checkpoint | None:
        """The files with the weights; None if they are quantized or of another format."""
        config, folder = self._config.model_config, self._folder()
        if getattr(config.hf_config, "quantization_config", None) is not None or folder is None:
            return None
        return open_checkpoint(folder)

    def _by_name(self, checkpoint: Checkpoint, adapter: Adapter, dtype: torch.dtype | None) -> "Files | None":
        """The tensors of the files as they are, where they have the names that the adapter has recorded."""
        names = adapter.structure.base_weights
        listed = {name for pairs in names.values() for _, name in pairs}
        patterns = {re.sub(r"\d+", "#", name) for name in listed} if adapter.couplings is None else set()
        if any(re.sub(r"\d+", "#", name) in patterns and name not in listed for name in checkpoint.tensors):
            return None  # there are more layers: the adapter's base may be a part of this one
        return names, lambda name: checkpoint.tensors[name].read().to(dtype=dtype)

    def _by_model(self, checkpoint: Checkpoint, adapter: Adapter, dtype: torch.dtype | None) -> "Files":
        """The weights that transformers makes from the files. This builds the structure of the model."""
        model, couplings = self.model_of(adapter)
        weights = StoredWeights(model.to(checkpoint.dtype if dtype is None else dtype), checkpoint)
        return structure_of(model, couplings, ()).base_weights, weights.read


# The weights that a fingerprint covers, and what reads one by its name.
Files = tuple[Names, Callable[[str], Tensor]]


# ---- a few numbers of the weights that an engine computes with -----------------------------------------
#
# A linear layer multiplies by its weight. So a row of zeros with one 1 gives a column of the weight, whether the weight
# is plain, packed for a processor, or quantized. vLLM's own layers say which rows and columns of an adapter a rank
# takes: where these are not the rows and columns of the weight that the rank has, an adapter would change others.

PROBES = 8  # columns of a weight that are compared


# Some columns of a weight as a rank has them: the rows of the whole weight that the rank has, [m] int64; which of the
# columns it has, [k] bool; and the numbers, float32 [m, k], with zeros in columns that another rank has.
Columns = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def live_columns(target: Target, columns: Tensor) -> Columns:
    """Read columns of a module of the checkpoint from the layer that computes it.

    Args:
        target: The layer, which says its sizes.
        columns: Numbers of the columns, [k] int64.
    """
    (outputs, inputs), layer, slot = target.sizes, target.layer, target.slot
    base = part_of(layer, "base_layer")
    x = nn.functional.one_hot(columns, inputs).float()
    rows = torch.arange(outputs)[:, None]
    if part_of(layer, "tp_size") > 1:  # the rows and columns that vLLM takes of an adapter here
        x, rows = _take(layer, "slice_lora_a", x, slot), _take(layer, "slice_lora_b", rows, slot)
    first = 0 if slot is None else sum(part_of(layer, "output_slices")[:slot])
    y = base.quant_method.apply(base, x.to(part_of(layer, "device"), part_of(base, "params_dtype")), None)
    rows = rows[:, 0]
    return rows, x.any(1), y[:, first : first + rows.numel()].t().float().cpu()


def _take(layer: nn.Module, name: str, values: Tensor, slot: int | None) -> Tensor:
    """What vLLM takes of one factor of an adapter on this rank. Layers that shard LoRA take parts of its rank, too."""
    take = next(vars(one)[name] for one in type(layer).__mro__ if name in vars(one) and "Sharded" not in one.__name__)
    if slot is None:
        return take(layer, values)
    return take(layer, [values if n == slot else None for n in range(part_of(layer, "n_slices"))])[slot]


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
    targets, differ, compared = WrappedLayers(adapter_manager), [], 0
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


def _samples(targets: WrappedLayers, name: str) -> dict[int, float]:
    """The samples of a weight that this rank has, by their number in the fingerprint."""
    path, _, kind = name.rpartition(".")
    try:
        target = targets.find(path)
    except ValueError:  # no layer for adapters
        return {}
    outputs, inputs = target.sizes
    if kind != "weight" or outputs is None or inputs is None:
        return {}
    positions = torch.arange(SAMPLES) * max(1, outputs * inputs // SAMPLES)
    here, present, values = live_columns(target, positions % inputs)
    place = {int(row): n for n, row in enumerate(here)}
    rows = (positions // inputs).tolist()
    return {n: float(values[place[row], n]) for n, row in enumerate(rows) if row in place and present[n]}


# ---- the same layout ------------------------------------------------------------------------------------


def has_layout(targets: WrappedLayers, path: str, weight: Tensor) -> bool:
    """Whether a layer has the rows and columns of a checkpoint's weight where vLLM adds those of an adapter.

    Args:
        targets: The layers.
        path: Path of the module in the model of transformers.
        weight: The checkpoint's weight, [outputs, inputs].
    """
    target = targets.find(path)
    if None in target.sizes:
        return True
    columns = torch.linspace(0, weight.shape[1] - 1, PROBES).long()
    rows, present, values = live_columns(target, columns)
    return not bool(present.any()) or _close(weight[rows][:, columns].float()[:, present], values[:, present])


# ---- an adapter as a LoRA in memory --------------------------------------------------------------------


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
        loras = _weights(adapter, manager)
        if not hasattr(manager, "s2ft_base"):  # one for each engine
            manager.s2ft_base = ServedBase(part_of(manager, "s2ft_vllm_config"), part_of(manager, "_adapter_manager"))
        manager.s2ft_base.check(adapter)
    except (OSError, ValueError) as error:
        words = str(error).replace(str(folder), request.lora_path)  # the folder may be a copy
        raise ValueError(f"S²FT adapter {request.lora_name!r} ({request.lora_path}): {words}") from error
    rank = max(weights.rank for weights in loras.values())
    lora = part_of(manager, "_lora_model_cls")(request.lora_int_id, rank, loras)
    lora.is_3d_lora_weight = False
    logger.info("s2ft: loaded adapter %s in %.3f s", request.lora_name, time.perf_counter() - began)
    return lora


def _weights(adapter: Adapter, manager: Any) -> dict[str, Any]:
    """vLLM's LoRALayerWeights of each module, by the name under which vLLM looks for them."""
    refuse(
        (adapter.structure is None, NO_PLACES),
        (
            adapter.extra_weights,
            f"it has {next(iter(adapter.extra_weights), None)} trained in full, and vLLM's adapters have no whole "
            f"weights: {MERGED}",
        ),
    )
    config, adapter_manager = part_of(manager, "lora_config"), part_of(manager, "_adapter_manager")
    locations, targets = adapter.structure.locations, WrappedLayers(adapter_manager)
    for name in adapter.deltas:
        location = locations[name]
        is_expert = location.expert is not None or "experts" in location.storage
        is_linear = location.storage in (LINEAR, TRANSPOSED)
        refuse(
            (is_expert, f"{name} is the weight of experts, which are not served as adapters: {MERGED}"),
            (not is_linear, f"{name} is no linear layer, and vLLM's adapters are of linear layers: {MERGED}"),
        )
    found = {}
    for path, names in by_key((locations[name].path, name) for name in adapter.deltas).items():
        target = targets.find(path)
        deltas = [adapter.deltas[name] for name in names]
        whole = _sizes_of(path, deltas, locations[names[0]])
        served = target.sizes
        if any(other is not None and other != own for own, other in zip(whole, served)):
            raise ValueError(
                f"it is of another base: {path} has {whole[0]} outputs and {whole[1]} inputs there, {served[0]} "
                f"and {served[1]} in the served model"
            )
        rank = sum(delta.index.numel() for delta in deltas)
        if not layers.enabled and rank > config.max_lora_rank:
            units = sum(adapter.selection[name].numel() for name in names)
            raise ValueError(
                f"{path} trains {rank} rows or columns ({units} units), and --max-lora-rank is {config.max_lora_rank}: "
                f"set it to {rank} or more, or start the server with S2FT_VLLM_SLICES=1, where adapters have no rank"
            )
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


def _factors(deltas: list[Delta], whole: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What stands for A [rank, inputs] and B [outputs, rank], with B @ A = the delta.

    One of them selects rows or columns. Layers that hold slices take the index and a row of values for each position.
    """
    dim = deltas[0].dim
    values = torch.cat([delta.values.to(dtype) for delta in deltas], dim).contiguous()
    index = torch.cat([delta.index for delta in deltas])
    if layers.enabled:
        return encode(index, dim), values if dim == 0 else values.t().contiguous()
    one_hot = torch.zeros(index.numel(), whole[dim], dtype=dtype).scatter_(1, index[:, None], 1)
    return (values, one_hot.t().contiguous()) if dim == 0 else (one_hot, values)
