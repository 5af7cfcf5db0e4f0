"""The base that a vLLM engine serves, as adapters have to know it: its structure and its fingerprint.

An adapter belongs to a base whose weights have the numbers of its fingerprint. They are compared with the files that
vLLM has loaded, once for each engine. Where the files can't be read one weight at a time (a quantized checkpoint,
another format), a few numbers of the live layers are compared.
"""

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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

    def __init__(self, vllm_config: Any, adapter_manager: Any = None) -> None:
        """Remember where the model is. Nothing is read.

        Args:
            vllm_config: vLLM's VllmConfig.
            adapter_manager: vLLM's LoRAModelManager; None if the engine has none.
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
        from s2ft.text.models import hollow_model  # for adapters of earlier versions alone

        key = "" if adapter.couplings is None else repr(adapter.couplings)
        if key not in self._hollow:
            folder = self._folder()
            try:
                model = hollow_model(str(self._config.model_config.model if folder is None else folder))
                self._hollow[key] = model, couplings_of(model, adapter.couplings)
            except (OSError, ValueError, AttributeError) as error:
                raise ValueError(
                    f"it is from an earlier s2ft, which did not record where its slices lie, and the structure of the "
                    f"served model can't be built ({error}): load it into its model and save it with this version"
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
        if self._manager is not None:
            self._check_layout(adapter)

    def _difference(self, adapter: Adapter) -> str:
        """The difference between the served base and an adapter's, in words; empty if there is none."""
        names, theirs, found = self.structure(adapter).base_weights, adapter.fingerprint, None
        for tensors in (self._stored, partial(self._converted, adapter)):  # the second way builds the model
            ours = self._fingerprint(names, theirs["dtype"], tensors)
            found = found if ours is None else difference(ours, theirs)
            if found == "":
                return ""
        if found is None and self._manager is None:
            return "the weights of the served checkpoint can't be read from its files, so they can't be compared"
        return live_difference(self._manager, names, theirs) if found is None else found

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
        for tensors in (self._stored, partial(self._converted, adapter)):
            try:
                read = tensors(None)
                weight = None if read is None else read(f"{location.path}.weight")
            except (KeyError, OSError, ValueError):
                continue
            if weight is not None:
                return weight.t() if location.storage == TRANSPOSED else weight
        return None

    def _fingerprint(self, names: Names, dtype: str, tensors: "Tensors") -> dict[str, Any] | None:
        """The fingerprint of the checkpoint in a dtype; None if its weights can't be read in this way."""
        key = dtype, str(names), tensors if tensors == self._stored else None
        if key not in self._fingerprints:
            wanted = None if dtype.startswith(QUANTIZED) else getattr(torch, dtype, None)
            try:
                read = tensors(wanted)
                self._fingerprints[key] = None if read is None else _fingerprint(names, dtype, read)
            except (KeyError, OSError, ValueError) as error:  # CannotStream is a ValueError
                logger.info("s2ft: the base's files can't be compared in this way: %s", error)
                self._fingerprints[key] = None
        return self._fingerprints[key]

    def checkpoint(self) -> Checkpoint | None:
        """The files with the weights; None if they are quantized or of another format."""
        config = self._config.model_config
        if getattr(config.hf_config, "quantization_config", None) is not None or self._folder() is None:
            return None
        return open_checkpoint(self._folder())

    def _stored(self, dtype: torch.dtype | None) -> "Read | None":
        """Read tensors of the checkpoint, where it has the names of the parameters."""
        checkpoint = self.checkpoint()
        return checkpoint and (lambda name: checkpoint.tensors[name].read().to(dtype=dtype))

    def _converted(self, adapter: Adapter, dtype: torch.dtype | None) -> "Read | None":
        """Read parameters as transformers makes them from the checkpoint."""
        checkpoint = self.checkpoint()
        if checkpoint is None:
            return None
        model, _ = self.model_of(adapter)
        return StoredWeights(model.to(checkpoint.dtype if dtype is None else dtype), checkpoint).read


Read = Callable[[str], Tensor]
Tensors = Callable[[torch.dtype | None], Read | None]


def _fingerprint(names: Names, dtype: str, read: Read) -> dict[str, Any]:
    """Compute a fingerprint from parameters by name."""
    labels = [pair for pairs in names.values() for pair in pairs]
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        prints = pool.map(lambda pair: read_print(pair[0], read(pair[1])), labels)
        layers = {}
        for layer, pairs in names.items():
            layers[layer] = LayerPrint()
            for _ in pairs:
                layers[layer].add(next(prints))
    return {"dtype": dtype, "layers": {name: layer.to_dict() for name, layer in layers.items()}}
