"""Adapters that are replaced while requests run: every request gets one content of the adapter, and gets it whole.

vLLM knows an adapter by a number and a path. An adapter that is loaded again under its name with `load_inplace` keeps
its number: running requests continue with the new weights, and the new weights are read from the disk again at every
step. An adapter that is unloaded, changed on the disk and loaded again has the same name and the same path, by which
the prefix cache finds keys and values of the old weights. An adapter that gave its place to another one is read from
its path again, whatever is there by then.

Here the path names the content too: `FOLDER#s2ft-` and a digest of the adapter's config, which has the digest of its
tensors. The prefix cache therefore distinguishes contents. An adapter that is loaded in place has a new number, and
running requests keep the old one. Workers keep the file of an adapter open, so that they can read the old content
again after the folder was replaced or deleted.

Two numbers of one name can then share a batch, as they can in vLLM after an unload and a load. vLLM takes two requests
for the same adapter if the names are equal, puts one of them alone into the batch, and ends with a KeyError at the
tokens of the other. Here the number counts, too.
"""

import asyncio
import copy
import functools
import hashlib
import itertools
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from s2ft.files.adapter_folder import ATTEMPTS, CONFIG, TENSORS, is_folder, read_folder, stamp_of
from s2ft.vllm.compatibility import private, when_imported

FEATURE = "adapters that are replaced while requests run"
MARK = re.compile(r"(?P<path>.+)#s2ft-(?P<version>[0-9a-f]{16})")
FIRST = 1 << 30  # numbers of adapters that are loaded in place; vLLM counts the others from 1
KEPT = 128  # files that a worker keeps open


def install() -> None:
    """Let paths of adapters name their contents, in the process that answers requests and in the workers.

    Raises:
        MissingInVLLM: This release of vLLM has no such modules.
    """
    when_imported("vllm.lora.request", FEATURE, _compare_numbers)
    when_imported("vllm.v1.engine.async_llm", FEATURE, _name_contents)
    when_imported("vllm.lora.worker_manager", FEATURE, _read_contents)


def _compare_numbers() -> None:
    request = private("vllm.lora.request", "LoRARequest")

    def key(one: Any) -> tuple[str, int]:
        return one.lora_name, one.lora_int_id

    request.__eq__ = lambda self, other: isinstance(other, request) and key(self) == key(other)
    request.__hash__ = lambda self: hash(key(self))


def _name_contents() -> None:
    """The server adds every adapter by this method, whether a command line, a request or a resolver names it."""
    engine = private("vllm.v1.engine.async_llm", "AsyncLLM")
    original = private("vllm.v1.engine.async_llm", "AsyncLLM.add_lora")
    numbers = itertools.count(FIRST)

    @functools.wraps(original)
    async def add_lora(self: Any, lora_request: Any) -> bool:
        versioned = await asyncio.to_thread(with_version, lora_request.lora_path)
        if versioned is not None:  # the server keeps this object for the requests that name the adapter
            lora_request.lora_path = versioned
            if lora_request.load_inplace:
                lora_request.load_inplace, lora_request.lora_int_id = False, next(numbers)
        return await original(self, lora_request)

    engine.add_lora = add_lora


def _read_contents() -> None:
    manager = private("vllm.lora.worker_manager", "WorkerLoRAManager")
    original = private("vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter")
    kept = Contents()

    @functools.wraps(original)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        def load(path: str) -> Any:
            plain = copy.copy(lora_request)
            plain.lora_path = path
            return original(self, plain)

        path, version = split_version(lora_request.lora_path)
        return load(path) if version is None else kept.load(path, version, load)

    manager._load_adapter = _load_adapter


# ---- names of contents -----------------------------------------------------------------------------------


def with_version(path: str) -> str | None:
    """Return the path of an adapter with its content's digest.

    Args:
        path: An adapter's folder, the output folder of a run, or a name on the hub, with or without a digest.

    Returns:
        The path with the digest of what is there now; None if there is no S²FT adapter.
    """
    plain, _ = split_version(path)
    try:
        folder = _folder_of(plain)
        return f"{plain}#s2ft-{_config_of(folder)[1]}" if is_folder(folder) else None
    except (OSError, ValueError):  # the workers refuse it, with the reason
        return None


def split_version(path: str) -> tuple[str, str | None]:
    """Return a path without the digest, and the digest or None."""
    found = MARK.fullmatch(path)
    return (path, None) if found is None else (found["path"], found["version"])


def _folder_of(path: str) -> Path:
    from s2ft.adapter.hub import resolve  # imported here, because every process of vLLM imports this module

    return resolve(path)


def _config_of(folder: Path) -> tuple[bytes, str]:
    config = read_folder(folder, Path.read_bytes)
    return config, hashlib.sha256(config).hexdigest()[:16]


class Contents:
    """Contents of adapters, each with an open file, so that it can be read after its folder was replaced.

    Attributes:
        limit: So many files are open at most. Of more, those that were used longest ago are closed.
    """

    def __init__(self, limit: int = KEPT) -> None:
        self.limit = limit
        self._kept: OrderedDict[str, _Content] = OrderedDict()

    def load(self, path: str, version: str, load: Callable[[str], Any]) -> Any:
        """Load a content of an adapter.

        Args:
            path: The adapter's folder or its name on the hub.
            version: Digest of the content.
            load: Loads the adapter of the folder that it gets.

        Returns:
            What `load` returns.

        Raises:
            ValueError: The folder has another content, and the one with this digest was not read before.
            Exception: Whatever `load` raises.
        """
        content = self._kept.get(version)
        if content is None:
            folder = _folder_of(path)
            if not is_folder(folder):
                return load(path)  # it raises the error that belongs to this
            content = _Content(folder)
            if content.version != version:
                raise ValueError(
                    f"adapter {path} was replaced while it was loaded, or after {self.limit} others were: load it again"
                )
            self._kept[version] = content
        self._kept.move_to_end(version)
        while len(self._kept) > self.limit:
            self._kept.popitem(last=False)[1].file.close()
        return content.load(path, load)


class _Content:
    """One content of an adapter's folder: its config, and its tensors as an open file."""

    def __init__(self, folder: Path) -> None:
        for _ in range(ATTEMPTS):
            self.folder, self.stamp = folder, stamp_of(folder)
            self.config, self.version = _config_of(folder)
            self.file = open(folder / TENSORS, "rb")
            if self.is_there:
                return
            self.file.close()
        raise ValueError(f"adapter {folder} was replaced again and again while it was read")

    @property
    def is_there(self) -> bool:
        """Whether the folder still has this content."""
        return stamp_of(self.folder) == self.stamp

    def load(self, path: str, load: Callable[[str], Any]) -> Any:
        if self.is_there:
            try:
                found = load(path)
            except Exception:
                if self.is_there:
                    raise
            else:
                if self.is_there:
                    return found
        return self._load_kept(load)  # the folder has another content, or got one while it was read

    def _load_kept(self, load: Callable[[str], Any]) -> Any:
        with self._kept_folder() as folder:
            return load(folder)

    @contextmanager
    def _kept_folder(self) -> Iterator[str]:
        with tempfile.TemporaryDirectory(prefix="s2ft-adapter-") as folder:
            (Path(folder) / CONFIG).write_bytes(self.config)
            self.file.seek(0)
            with open(Path(folder) / TENSORS, "wb") as copied:  # readers refuse links that lead out of a folder
                shutil.copyfileobj(self.file, copied, 1 << 20)
            yield folder
