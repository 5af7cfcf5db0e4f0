"""Adapters of S²FT where vLLM expects a LoRA folder.

Every way to name an adapter ends in one method of vLLM's workers: ``--lora-modules``, ``/v1/load_lora_adapter``,
resolvers, and ``LoRARequest`` offline. There a folder of S²FT becomes vLLM's own LoRA in memory, see
:mod:`s2ft.vllm.lora`. Nothing is exported, and each module has the rank that it needs. Folders of other formats go to
vLLM. This module imports little: vLLM imports it in every process.
"""

import functools
from pathlib import Path
from typing import Any

from s2ft.files.adapter_folder import CONFIG, TENSORS, own_folder
from s2ft.vllm.compatibility import private, when_imported

FEATURE = "S²FT adapters"
MODULE = "vllm.lora.worker_manager"
# What is used when an adapter is loaded. A missing name is noticed at the start.
NEEDED = (
    (MODULE, "WorkerLoRAManager._load_adapter"),
    ("vllm.config.lora", "MaxLoRARanks"),
    ("vllm.lora.lora_weights", "LoRALayerWeights"),
    ("vllm.lora.utils", "parse_fine_tuned_lora_name"),
    ("vllm.model_executor.models.utils", "PPMissingLayer"),
)


def install() -> None:
    """Let vLLM's workers load S²FT adapters.

    Raises:
        MissingInVLLM: This release of vLLM lacks the module of the workers.
    """
    when_imported(MODULE, FEATURE, _change)


def _change() -> None:
    for module, attribute in NEEDED:
        private(module, attribute)
    manager_class = private(MODULE, "WorkerLoRAManager")
    make, load = manager_class.__init__, manager_class._load_adapter

    @functools.wraps(make)
    def __init__(self: Any, vllm_config: Any, *args: Any, **options: Any) -> None:
        make(self, vllm_config, *args, **options)
        self.s2ft_model_config = vllm_config.model_config

    @functools.wraps(load)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        folder = folder_of(lora_request.lora_path)
        if folder is None:
            return load(self, lora_request)
        from s2ft.vllm.lora import lora_of  # the first adapter pays for these imports, not every start of vLLM

        return lora_of(self, lora_request, folder)

    manager_class.__init__, manager_class._load_adapter = __init__, _load_adapter


def folder_of(path: str) -> Path | None:
    """Find the folder of an S²FT adapter.

    Args:
        path: A folder, the output folder of a run, or a name on the hub, as "org/name" or "org/name@revision".

    Returns:
        The folder; None if it has no file of an S²FT adapter, or does not exist.
    """
    given = Path(path).expanduser()
    if not given.exists():
        given = _downloaded(path)
    folder = own_folder(given)
    return folder if any((folder / name).exists() for name in (CONFIG, TENSORS)) else None


def _downloaded(name: str) -> Path:
    """The folder with the adapter's files of a repository on the hub; the name itself if there is none."""
    from s2ft.adapter.hub import REPOSITORY, resolve

    if not REPOSITORY.fullmatch(name):
        return Path(name)
    if private("vllm", "envs").VLLM_USE_MODELSCOPE:
        return Path(private("vllm.lora.utils", "get_adapter_absolute_path")(name))
    try:
        return resolve(name)
    except FileNotFoundError:  # vLLM's own loader says so
        return Path(name)
