"""Adapters of S²FT where vLLM expects a LoRA folder, and one content of an adapter for each request.

Every way to name an adapter ends in one method of vLLM's workers: ``--lora-modules``, ``/v1/load_lora_adapter``,
resolvers, and ``LoRARequest`` offline. There a folder of S²FT becomes vLLM's own LoRA in memory, see
:mod:`s2ft.vllm.served_base`. Nothing is exported, and each module has the rank that it needs. Folders of other formats
go to vLLM. This module imports little: vLLM imports it in every process.

An adapter that is refused must leave the server as it was. So every rank says whether it could load, and the engine
raises the reason after all have answered: vLLM itself stops listening at the first error, and takes the answers that
remain for those to its next question.

Adapters are replaced while requests run. vLLM knows an adapter by a number and a path. One that is loaded again under
its name with `load_inplace` keeps its number: running requests continue with the new weights. One that is unloaded,
changed on the disk and loaded again has the same name and path, by which the prefix cache finds keys and values of the
old weights. One that gave its place to another is read from its path again, whatever is there by then. So a path of the
server names the content too: `FOLDER#s2ft-` and a digest of the adapter's config, which has the digest of its tensors.
An adapter that is loaded in place has a new number, and running requests keep the old one. Workers keep the files of a
content, so that they can read it after the folder was replaced or deleted.

Two numbers of one name can then share a batch. vLLM takes two requests for the same adapter if the names are equal,
puts one of them alone into the batch, and ends with a KeyError at the tokens of the other. Here the number counts, too.
"""

import asyncio
import hashlib
import inspect
import itertools
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import IO, Any

from s2ft.files.reading import CONFIG, TENSORS, own_folder, read_consistent
from s2ft.vllm.compatibility import guarded, in_place_of, logger, private, when_imported

FEATURE, ON_PROCESSORS = "S²FT adapters", "answers of the base beside adapters, on processors,"
WORKER, EXECUTOR, OFFLINE = "vllm.lora.worker_manager", "vllm.v1.executor.abstract", "vllm.v1.engine.llm_engine"
SERVER, REQUEST = "vllm.v1.engine.async_llm", "vllm.lora.request"
PUNICA = "vllm.lora.punica_wrapper.punica_cpu"
# What is used when an adapter is loaded. A missing name is noticed at the start.
NEEDED = (
    (WORKER, "WorkerLoRAManager._load_adapter"),
    (EXECUTOR, "Executor.add_lora"),
    ("vllm.lora.lora_weights", "LoRALayerWeights"),
    ("vllm.lora.utils", "parse_fine_tuned_lora_name"),
    ("vllm.model_executor.models.utils", "PPMissingLayer"),
)
MARK = re.compile(r"(?P<path>.+)#s2ft-(?P<version>[0-9a-f]{16})")
FIRST = 1 << 30  # numbers of adapters that are loaded in place; vLLM counts the others from 1
KEPT = 512  # contents that a worker keeps


def install() -> None:
    """Let vLLM load S²FT adapters.

    Raises:
        MissingInVLLM: This release of vLLM lacks a module that is changed.
    """
    changes = {
        WORKER: _change_workers,
        EXECUTOR: _change_executors,
        OFFLINE: _change_offline_engine,
        SERVER: _change_server,
        REQUEST: _compare_numbers,
    }
    for module, change in changes.items():
        when_imported(module, FEATURE, change)
    guarded(ON_PROCESSORS, lambda: when_imported(PUNICA, ON_PROCESSORS, _leave_base_out))


def folder_of(path: str) -> Path | None:
    """Find the folder of an S²FT adapter.

    Args:
        path: A folder, the output folder of a run, or a name on the hub, as "org/name" or "org/name@revision".

    Returns:
        The folder; None if it has no file of an S²FT adapter, or does not exist.
    """
    from s2ft.files.reading import REPOSITORY, local_folder

    given = Path(path).expanduser()
    is_name = not given.exists() and REPOSITORY.fullmatch(path)
    if is_name and private("vllm", "envs").VLLM_USE_MODELSCOPE:
        given = Path(private("vllm.lora.utils", "get_adapter_absolute_path")(path))
    elif is_name:
        with suppress(FileNotFoundError):  # vLLM's own loader says so
            given = local_folder(path)
    folder = own_folder(given)
    return folder if any((folder / name).exists() for name in (CONFIG, TENSORS)) else None


# ---- contents --------------------------------------------------------------------------------------------


def with_version(path: str) -> str | None:
    """Return the path of an adapter with its content's digest.

    Args:
        path: An adapter's folder, the output folder of a run, or a name on the hub, with or without a digest.

    Returns:
        The path with the digest of what is there now; None if there is no S²FT adapter.
    """
    plain, _ = split_version(path)
    try:
        folder = folder_of(plain)
        return None if folder is None else f"{plain}#s2ft-{_digest(read_consistent(folder, Path.read_bytes))}"
    except (OSError, ValueError):  # the workers refuse it, with the reason
        return None


def split_version(path: str) -> tuple[str, str | None]:
    """Return a path without the digest, and the digest or None."""
    found = MARK.fullmatch(path)
    return (path, None) if found is None else (found["path"], found["version"])


def _digest(config: bytes) -> str:
    return hashlib.sha256(config).hexdigest()[:16]


class Contents:
    """Contents of adapters, each with its tensors as an open file, so that it outlives its folder.

    Attributes:
        limit: So many are kept at most. Of more, those that were used longest ago are closed.
    """

    def __init__(self, limit: int = KEPT) -> None:
        self.limit = limit
        self._kept: OrderedDict[tuple[str, str], tuple[bytes, IO[bytes]]] = OrderedDict()  # by path and digest

    @contextmanager
    def folder(self, path: str, version: str) -> Iterator[Path]:
        """Inside, there is a folder with a content of an adapter, which nobody replaces.

        Args:
            path: The adapter's folder or its name on the hub.
            version: Digest of the content.

        Raises:
            ValueError: The folder has another content, and the one with this digest was not read before.
        """
        key = path, version
        if key not in self._kept:
            folder, content = folder_of(path), None
            if folder is not None:
                content = read_consistent(folder, lambda file: (file.read_bytes(), open(file.parent / TENSORS, "rb")))
            if content is None or _digest(content[0]) != version:
                raise ValueError(
                    f"adapter {path} was replaced while it was loaded, or after {self.limit} others were: load it again"
                )
            self._kept[key] = content
        self._kept.move_to_end(key)
        while len(self._kept) > self.limit:
            self._kept.popitem(last=False)[1][1].close()
        config, tensors = self._kept[key]
        with tempfile.TemporaryDirectory(prefix="s2ft-adapter-") as made:
            (Path(made) / CONFIG).write_bytes(config)
            tensors.seek(0)
            with open(Path(made) / TENSORS, "wb") as copied:  # readers refuse links that lead out of a folder
                shutil.copyfileobj(tensors, copied, 1 << 20)
            try:
                yield Path(made)
            except Exception:  # it may be damaged: the next load reads the folder again
                self._kept.pop(key, None)
                raise


# ---- in each worker ---------------------------------------------------------------------------------------


def _change_workers() -> None:
    for module, attribute in NEEDED:
        private(module, attribute)
    contents = Contents()

    @in_place_of(WORKER, "WorkerLoRAManager.__init__")
    def __init__(make: Any, self: Any, vllm_config: Any, *args: Any, **options: Any) -> None:
        make(self, vllm_config, *args, **options)
        self.s2ft_vllm_config = vllm_config

    @in_place_of(WORKER, "WorkerLoRAManager._load_adapter")
    def _load_adapter(load: Any, self: Any, lora_request: Any) -> Any:
        from s2ft.vllm.served_base import lora_of  # the first adapter pays for these imports, not every start of vLLM

        path, version = split_version(lora_request.lora_path)
        if version is not None:
            with contents.folder(path, version) as folder:
                return lora_of(self, lora_request, folder)
        folder = folder_of(path)
        return load(self, lora_request) if folder is None else lora_of(self, lora_request, folder)


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
    @in_place_of(EXECUTOR, "Executor.add_lora")
    def add_lora(_: Any, self: Any, lora_request: Any) -> bool:
        answers = self.collective_rpc(add_on_rank, args=(lora_request,))
        reasons = [reason for _, reason in answers if reason]
        if not reasons:
            return all(loaded for loaded, _ in answers)
        if len(reasons) < len(answers):  # a rank could not read what others could: none has the adapter then
            self.collective_rpc("remove_lora", args=(lora_request.lora_int_id,))
        raise ValueError(reasons[0])


def _change_offline_engine() -> None:
    """Load an adapter before the first request that needs it. In a step, one that is refused would end the engine."""
    signature = inspect.signature(private(OFFLINE, "LLMEngine.add_request"))

    @in_place_of(OFFLINE, "LLMEngine.remove_lora")
    def remove_lora(remove: Any, self: Any, lora_id: int) -> bool:
        vars(self).get("s2ft_known", {}).pop(lora_id, None)
        return remove(self, lora_id)

    @in_place_of(OFFLINE, "LLMEngine.add_request")
    def add_request(add: Any, self: Any, *args: Any, **options: Any) -> Any:
        request = signature.bind(self, *args, **options).arguments.get("lora_request")
        if request is not None and self.vllm_config.lora_config is not None:
            known = vars(self).setdefault("s2ft_known", {})
            if request.load_inplace or known.get(request.lora_int_id) != request.lora_path:
                if folder_of(request.lora_path) is not None:
                    self.add_lora(request)
                known[request.lora_int_id] = request.lora_path
        return add(self, *args, **options)


# ---- in the server ------------------------------------------------------------------------------------------


def _change_server() -> None:
    """The server adds every adapter by this method, whether a command line, a request or a resolver names it."""
    numbers = itertools.count(FIRST)

    @in_place_of(SERVER, "AsyncLLM.add_lora")
    async def add_lora(add: Any, self: Any, lora_request: Any) -> bool:
        versioned = await asyncio.to_thread(with_version, lora_request.lora_path)
        if versioned is not None:  # the server keeps this object for the requests that name the adapter
            lora_request.lora_path = versioned
            if lora_request.load_inplace:
                lora_request.load_inplace, lora_request.lora_int_id = False, next(numbers)
        return await add(self, lora_request)


def _compare_numbers() -> None:
    request, key = private(REQUEST, "LoRARequest"), attrgetter("lora_name", "lora_int_id")
    request.__eq__ = lambda self, other: isinstance(other, request) and key(self) == key(other)
    request.__hash__ = lambda self: hash(key(self))


# ---- on processors ----------------------------------------------------------------------------------------------


def _leave_base_out() -> None:
    """Let the first product of a LoRA be zero for tokens of the base. The second one then adds nothing.

    vLLM marks a token of the base by the slot -1. Its kernels for processors take that as the last slot, so that an
    answer of the base contains the adapter that lies there, if one does. Kernels for GPUs leave these tokens out.
    """
    for name in ("_shrink_prefill", "_shrink_decode"):

        @in_place_of(PUNICA, f"PunicaWrapperCPU.{name}")
        def shrink_adapters(shrink: Any, self: Any, y: Any, *args: Any, **options: Any) -> None:
            shrink(self, y, *args, **options)
            of_base = self.token_lora_indices[: y.shape[0]] < 0
            y[: of_base.numel()][of_base] = 0
