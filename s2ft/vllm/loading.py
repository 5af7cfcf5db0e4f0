"""Adapters of S²FT where vLLM expects a LoRA folder.

Every way to name an adapter ends in one method of vLLM's workers: ``--lora-modules``, ``/v1/load_lora_adapter``,
resolvers, and ``LoRARequest`` offline. There a folder of S²FT becomes vLLM's own LoRA in memory, see
:mod:`s2ft.vllm.lora`. Nothing is exported, and each module has the rank that it needs. Folders of other formats go to
vLLM. This module imports little: vLLM imports it in every process.

An adapter that is refused must leave the server as it was. So every rank says whether it could load, and the engine
raises the reason after all have answered: vLLM itself stops listening at the first error, and takes the answers that
remain for those to its next question.
"""

import functools
import inspect
import logging
from pathlib import Path
from typing import Any

from s2ft.files.adapter_folder import CONFIG, TENSORS, own_folder
from s2ft.vllm.compatibility import private, when_imported

logger = logging.getLogger("vllm.s2ft")

FEATURE = "S²FT adapters"
WORKER, EXECUTOR, OFFLINE = "vllm.lora.worker_manager", "vllm.v1.executor.abstract", "vllm.v1.engine.llm_engine"
# What is used when an adapter is loaded. A missing name is noticed at the start.
NEEDED = (
    (WORKER, "WorkerLoRAManager._load_adapter"),
    (EXECUTOR, "Executor.add_lora"),
    ("vllm.config.lora", "MaxLoRARanks"),
    ("vllm.lora.lora_weights", "LoRALayerWeights"),
    ("vllm.lora.utils", "parse_fine_tuned_lora_name"),
    ("vllm.model_executor.models.utils", "PPMissingLayer"),
)


def install() -> None:
    """Let vLLM load S²FT adapters.

    Raises:
        MissingInVLLM: This release of vLLM lacks a module that is changed.
    """
    when_imported(WORKER, FEATURE, _change_workers)
    when_imported(EXECUTOR, FEATURE, _change_executors)
    when_imported(OFFLINE, FEATURE, _change_offline_engine)


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


# ---- in each worker ---------------------------------------------------------------------------------------


def _change_workers() -> None:
    for module, attribute in NEEDED:
        private(module, attribute)
    manager = private(WORKER, "WorkerLoRAManager")
    make, load = manager.__init__, private(WORKER, "WorkerLoRAManager._load_adapter")

    @functools.wraps(make)
    def __init__(self: Any, vllm_config: Any, *args: Any, **options: Any) -> None:
        make(self, vllm_config, *args, **options)
        self.s2ft_vllm_config = vllm_config

    @functools.wraps(load)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        folder = folder_of(lora_request.lora_path)
        if folder is None:
            return load(self, lora_request)
        from s2ft.vllm.lora import lora_of  # the first adapter pays for these imports, not every start of vLLM

        return lora_of(self, lora_request, folder)

    manager.__init__, manager._load_adapter = __init__, _load_adapter


def add_on_rank(worker: Any, lora_request: Any) -> tuple[bool, str]:
    """Load an adapter on one rank, without raising.

    Args:
        worker: vLLM's worker.
        lora_request: vLLM's LoRARequest.

    Returns:
        What vLLM's `add_lora` returns, and why it failed, empty if it did not.
    """
    try:
        return worker.add_lora(lora_request), ""
    except Exception as error:
        is_ours = isinstance(error, ValueError) and "S²FT" in str(error)
        logger.warning("s2ft: adapter %s is refused: %s", lora_request.lora_name, error, exc_info=not is_ours)
        return False, str(error) or type(error).__name__


# ---- in the engine ------------------------------------------------------------------------------------------


def _change_executors() -> None:
    executor = private(EXECUTOR, "Executor")
    add = private(EXECUTOR, "Executor.add_lora")

    @functools.wraps(add)
    def add_lora(self: Any, lora_request: Any) -> bool:
        answers = self.collective_rpc(add_on_rank, args=(lora_request,))
        reasons = [reason for _, reason in answers if reason]
        if not reasons:
            return all(loaded for loaded, _ in answers)
        if len(reasons) < len(answers):  # a rank could not read what others could: none has the adapter then
            self.collective_rpc("remove_lora", args=(lora_request.lora_int_id,))
        raise ValueError(reasons[0])

    executor.add_lora = add_lora


def _change_offline_engine() -> None:
    """Load an adapter before the first request that needs it. In a step, one that is refused would end the engine."""
    engine = private(OFFLINE, "LLMEngine")
    add_request, remove = private(OFFLINE, "LLMEngine.add_request"), private(OFFLINE, "LLMEngine.remove_lora")
    signature = inspect.signature(add_request)

    @functools.wraps(add_request)
    def add(self: Any, *args: Any, **options: Any) -> Any:
        request = signature.bind(self, *args, **options).arguments.get("lora_request")
        if request is not None and self.vllm_config.lora_config is not None:
            known = vars(self).setdefault("s2ft_known", {})
            if request.load_inplace or known.get(request.lora_int_id) != request.lora_path:
                if folder_of(request.lora_path) is not None:
                    self.add_lora(request)
                known[request.lora_int_id] = request.lora_path
        return add_request(self, *args, **options)

    @functools.wraps(remove)
    def remove_lora(self: Any, lora_id: int) -> bool:
        vars(self).get("s2ft_known", {}).pop(lora_id, None)
        return remove(self, lora_id)

    engine.add_request, engine.remove_lora = add, remove_lora
