"""The base that a vLLM engine serves, as adapters have to know it: its structure and its fingerprint.

An adapter belongs to a base whose weights have the numbers of its fingerprint. They are compared with the files that
vLLM has loaded, once for each engine. Where the files can't be read one weight at a time (a quantized checkpoint,
another format), a few numbers of the live layers are compared.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.adapter.adapter import Adapter
from s2ft.model.checkpoint import Checkpoint, StoredWeights, open_checkpoint
from s2ft.model.coupling import Coupling
from s2ft.model.fingerprint import QUANTIZED, LayerPrint, difference, read_print
from s2ft.model.location import TRANSPOSED, Location, Structure, structure_of
from s2ft.model.registry import couplings_of
from s2ft.vllm.compatibility import part_of
from s2ft.vllm.live import has_layout, live_difference
from s2ft.vllm.names import MERGED, Targets

logger = logging.getLogger("vllm.s2ft")

THREADS = 4  # that read weights
Names = dict[str, list[tuple[str, str]]]  # by layer: labels in the fingerprint, and names of parameters


def served_base(manager: Any) -> "Base":
    """Return the base of an engine; it is made at the first adapter.

    Args:
        manager: vLLM's WorkerLoRAManager.
    """
    if not hasattr(manager, "s2ft_base"):
        manager.s2ft_base = Base(part_of(manager, "s2ft_vllm_config"), part_of(manager, "_adapter_manager"))
    return manager.s2ft_base


class Base:
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

    # ---- structure ---------------------------------------------------------------------------------

    def structure(self, adapter: Adapter) -> Structure:
        """Return where an adapter's slices lie: what its file says, or what its model's structure says.

        Raises:
            ValueError: The file does not say it, and the model can't be built, or lacks a projection of the adapter.
        """
        if adapter.structure is None:
            model, couplings = self.model_of(adapter)
            try:
                adapter.structure = structure_of(model, couplings, adapter.deltas)
            except KeyError as error:
                raise ValueError(f"it is of another base: the served model has no projection {error.args[0]}") from None
        return adapter.structure

    def model_of(self, adapter: Adapter) -> tuple[nn.Module, list[Coupling]]:
        """The served model on the meta device, and the couplings of an adapter in it."""
        from s2ft.text.models import hollow_model

        key = "" if adapter.couplings is None else repr(adapter.couplings)
        if key not in self._hollow:
            folder = self._folder()
            try:
                model = hollow_model(str(self._config.model_config.model if folder is None else folder))
                self._hollow[key] = model, couplings_of(model, adapter.couplings)
            except (OSError, ValueError, AttributeError) as error:
                raise ValueError(
                    f"it does not record where its slices lie, and the structure of the served model can't be built "
                    f"({error}): load it into its model and save it again"
                ) from error
        return self._hollow[key]

    def _folder(self) -> Path | None:
        """The folder of the checkpoint that vLLM has loaded; None if it is no folder and not in the hub's cache."""
        config = self._config.model_config
        if Path(config.model).is_dir():
            return Path(config.model)
        from huggingface_hub import snapshot_download

        try:
            cache = self._config.load_config.download_dir
            return Path(
                snapshot_download(config.model, revision=config.revision, cache_dir=cache, local_files_only=True)
            )
        except (OSError, ValueError):  # not in the cache: a GGUF file, for instance
            return None

    # ---- fingerprint -------------------------------------------------------------------------------

    def check(self, adapter: Adapter) -> None:
        """Compare the served base with the one that an adapter was trained on.

        Raises:
            ValueError: They differ, or vLLM has put rows or columns that the adapter changes in another order.
        """
        began = time.perf_counter()
        if adapter.fingerprint not in self._compared:
            found = self._difference(adapter)
            if found:
                raise ValueError(f"it was trained on another base than the served one: {found}")
            self._compared.append(adapter.fingerprint)
            logger.info("s2ft: compared the base with the adapter's in %.2f s", time.perf_counter() - began)
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
        names = self.structure(adapter).base_weights
        return live_difference(self._manager, names, theirs, self._is_quantized or is_quantized)

    @property
    def _is_quantized(self) -> bool:
        config = self._config.model_config
        files = getattr(config.hf_config, "quantization_config", None)
        return files is not None or getattr(config, "quantization", None) is not None

    def _check_layout(self, adapter: Adapter) -> None:
        """Compare a few columns of the live layers with the files: once for each kind of module, because vLLM loads
        the modules of one name in one way."""
        targets, locations = Targets(self._manager), self.structure(adapter).locations
        for location in locations.values():
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
                layers = {layer: LayerPrint() for layer in names}
                for layer, pairs in names.items():
                    for _ in pairs:
                        layers[layer].add(next(prints))
            self._fingerprints[key] = {"dtype": dtype, "layers": {name: one.to_dict() for name, one in layers.items()}}
        return self._fingerprints[key]

    # ---- files -------------------------------------------------------------------------------------

    def _read(self, adapter: Adapter, dtype: torch.dtype | None, read: Callable[["Files"], Any]) -> Iterator[Any]:
        """Yield what a function makes of the files in each way in which they can be read."""
        for way in (self._by_name, self._by_model):
            try:
                checkpoint = self.checkpoint()
                files = None if checkpoint is None else way(checkpoint, adapter, dtype)
                found = None if files is None else read(files)
            except (KeyError, OSError, ValueError) as error:  # CannotStream is a ValueError
                logger.info("s2ft: the base's files are not compared in this way: %s", error)
                continue
            if found is not None:
                yield found

    def checkpoint(self) -> Checkpoint | None:
        """The files with the weights; None if they are quantized or of another format."""
        config, folder = self._config.model_config, self._folder()
        if getattr(config.hf_config, "quantization_config", None) is not None or folder is None:
            return None
        return open_checkpoint(folder)

    def _by_name(self, checkpoint: Checkpoint, adapter: Adapter, dtype: torch.dtype | None) -> "Files | None":
        """The tensors of the files as they are, where they have the names that the adapter has recorded."""
        names = self.structure(adapter).base_weights
        listed = {name for pairs in names.values() for _, name in pairs}
        patterns = {_without_numbers(name) for name in listed} if adapter.couplings is None else set()
        if any(_without_numbers(name) in patterns and name not in listed for name in checkpoint.tensors):
            return None  # there are more layers: the adapter's base may be a part of this one
        return names, lambda name: checkpoint.tensors[name].read().to(dtype=dtype)

    def _by_model(self, checkpoint: Checkpoint, adapter: Adapter, dtype: torch.dtype | None) -> "Files":
        """The weights that transformers makes from the files. This builds the structure of the model."""
        model, couplings = self.model_of(adapter)
        weights = StoredWeights(model.to(checkpoint.dtype if dtype is None else dtype), checkpoint)
        return structure_of(model, couplings, ()).base_weights, weights.read


# The weights that a fingerprint covers, and what reads one by its name.
Files = tuple[Names, Callable[[str], Tensor]]


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)
