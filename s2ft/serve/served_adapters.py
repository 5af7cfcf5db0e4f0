"""The adapters that are served: those of the server's sources at the start, and those that clients load and unload.

It gives names of clients to adapters of a bank. Each adapter has a name of its own in the bank, so that a request keeps
the adapter with which it began, also after another one was loaded under the same name. The bank alone holds values.
"""

import logging
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from s2ft.adapter.folders import STATE, folders_of, grouped, some, source_of
from s2ft.attached.loading import read_adapter
from s2ft.config import check_adapter_name
from s2ft.files.reading import ADAPTER, CONFIG, stamp_of
from s2ft.serve.schemas import ApiError, unknown_model
from s2ft.text.adapter_prompts import recorded_format
from s2ft.text.prompts import PromptFormat

logger = logging.getLogger(__name__)
SHOWN = 20  # names in the line of the log that lists the adapters


@dataclass(eq=False)
class ServedAdapter:
    """An adapter that is served, or was when a request began.

    Attributes:
        name: The name that clients use.
        bank_name: The name in the bank.
        folder: The adapter's folder.
        stamp: Changes with each save to the folder.
        prompt: The format of prompts that the adapter was trained with, or None if it is not recorded.
        users: Number of requests that use it.
    """

    name: str
    bank_name: str
    folder: Path
    stamp: tuple | None
    prompt: PromptFormat | None
    users: int = 0


class Adapters:
    """The adapters of a server by name. The methods can be called from any thread.

    Attributes:
        refused: Why adapters of the sources can't be served, by name.

    Args:
        bank: The :class:`s2ft.AdapterBank` that loads the adapters.
        sources: Where adapters are looked for, see :func:`s2ft.adapter.folders.source_of`. None serves the base alone.
        reserved: Names of the base.

    Raises:
        NotADirectoryError: A folder does not exist.
        ValueError: A source can't be used, or two adapters, or an adapter and the base, have the same name.
    """

    def __init__(self, bank, sources: Sequence[str] = (), reserved: Sequence[str] = ()) -> None:
        self.bank, self.reserved = bank, tuple(reserved)
        self.sources = [source_of(str(text)) for text in sources]
        self.refused: dict[str, str] = {}
        self._served: dict[str, ServedAdapter] = {}
        self._added = 0
        self._lock = threading.Lock()  # guards the three fields above; no adapter is read while it is held
        for name, folder in folders_of(self.sources, reserved).items():
            try:
                self._add(name, folder.absolute())
            except (ValueError, OSError) as error:
                self.refused[name] = reason_of(error, folder.absolute())

    def _add(self, name: str, folder: Path) -> None:
        """Check an adapter and serve it. Other requests go on meanwhile."""
        check_adapter_name(name)
        stamp, prompt = stamp_of(folder), recorded_format(self.bank.check(folder).info, f"adapter {name!r}")
        with self._lock:
            if name in self.reserved or name in self._served:
                raise ApiError(400, "name_taken", f"there is already a model {name!r}: unload it first")
            bank_name = f"{name}#{self._added}"
            self.bank.add(bank_name, folder)
            self._added += 1
            self._served[name] = ServedAdapter(name, bank_name, folder, stamp, prompt)
            self.refused.pop(name, None)

    @property
    def names(self) -> list[str]:
        """The names that clients can use, sorted."""
        with self._lock:
            return sorted(self._served)

    def acquire(self, name: str) -> ServedAdapter:
        """Get an adapter for a request, which must release it.

        Args:
            name: The adapter's name.

        Raises:
            ApiError: 404 if there is no such adapter, 400 if it can't be served, 409 if its folder has changed.
        """
        with self._lock:
            served = self._served.get(name)
            if served is None:
                raise _invalid(name, self.refused[name]) if name in self.refused else unknown_model(name)
            if stamp_of(served.folder) != served.stamp:  # the bank may read it again, and would mix two contents
                raise ApiError(
                    409,
                    "adapter_changed",
                    f"the folder of adapter {name!r} was changed or deleted after it was loaded: unload it, and load "
                    "it again",
                )
            served.users += 1
            return served

    def release(self, served: ServedAdapter | None) -> None:
        """End the use of an adapter by a request. None is the base."""
        if served is None:
            return
        with self._lock:
            served.users -= 1
            if self._served.get(served.name) is not served and not served.users:  # it was unloaded
                self.bank.remove(served.bank_name)

    def load(self, name: str, path: str) -> None:
        """Read an adapter completely, and serve it under a name.

        Args:
            name: The name that clients use.
            path: The adapter's folder or a run's, relative to one of the directories.

        Raises:
            ApiError: 400 or 404 if the name or the path cannot be used, or the adapter cannot be served.
        """
        directories = [source.folder for source in self.sources if source.name is None]
        if not directories:
            raise ApiError(
                400, "no_directory", "the server was started without a directory of adapters, so it can't load others"
            )
        try:
            check_adapter_name(name)
        except ValueError as error:
            raise ApiError(400, "invalid_name", str(error)) from None
        folder = _named_by_client(directories, path)
        try:
            read_adapter(folder)  # damage of the values is found now, and not at the first request
            self._add(name, folder)
        except (ValueError, OSError) as error:
            raise cannot_load(name, folder, error) from None
        logger.info("loaded: %s", name)

    def unload(self, name: str) -> None:
        """Stop serving an adapter. Requests that have begun keep it.

        Args:
            name: The adapter's name.

        Raises:
            ApiError: 404 if there is no such adapter.
        """
        with self._lock:
            if name not in self._served:
                raise unknown_model(name)
            self._unload(self._served[name])

    def refuse(self, served: ServedAdapter, error: Exception) -> None:
        """Stop serving an adapter that could not be loaded."""
        with self._lock:
            if self._served.get(served.name) is served:
                self._unload(served)
                self.refused[served.name] = reason_of(error, served.folder)

    def _unload(self, served: ServedAdapter) -> None:
        del self._served[served.name]
        logger.info("no longer served: %s", served.name)
        if not served.users:
            self.bank.remove(served.bank_name)

    def log_adapters(self, strictly: bool = False) -> None:
        """Log the adapters that fit the base, and the folders that are not served, with the reasons.

        Args:
            strictly: Whether every adapter must fit, and every source must have one.

        Raises:
            ValueError: An adapter that was named by itself, or all adapters that were found, can't be served; or
                `strictly` asks for more.
        """
        names, count = self.names, len(self.names) + len(self.refused)
        for reasons in (*(source.skipped([*names, *self.refused]) for source in self.sources), self.refused):
            for line in grouped(reasons):
                logger.warning("warning: not served: %s", line)
        single = [source.name for source in self.sources if source.name in self.refused]
        if self.refused and (strictly or single or not names):
            name = (single or list(self.refused))[0]
            raise ValueError(
                f"{len(self.refused)} of {count} adapters can't be served; adapter {name!r}: {self.refused[name]}"
            )
        empty = [str(source.folder) for source in self.sources if not source.folders()]
        if empty and (strictly or not names):
            words = (
                f"there is no adapter in {some(empty)}: adapters are expected as DIR/NAME/{CONFIG} or, in the output "
                f"of a run, as DIR/NAME/{ADAPTER}/{CONFIG}; checkpoints are not served"
            )
            if strictly:
                raise ValueError(words)
            logger.warning("warning: the base is served alone: %s", words)
        if names:
            what, plural = "checked" if strictly else "serving", "s" * (len(names) != 1)
            logger.info("%s %d adapter%s: %s", what, len(names), plural, some(names, SHOWN))


def _named_by_client(directories: Sequence[Path], path: str) -> Path:
    """Return the adapter's folder at a path of a client. Raises ApiError 400 or 404."""
    for directory in directories:
        for folder in (_inside(directory, path), _inside(directory, f"{path}/{ADAPTER}")):  # or the output of a run
            if stamp_of(folder) is None:
                continue
            if (folder / STATE).is_file():
                raise ApiError(400, "invalid_adapter", f"{path[:200]!r} is a checkpoint of a training run")
            return folder
    raise ApiError(404, "adapter_not_found", f"there is no adapter at {path[:200]!r}: it has no {CONFIG}")


def _inside(directory: Path, path: str) -> Path:
    """Return the folder at a path of a client, which must be inside the directory."""
    refused = ApiError(
        400, "invalid_path", "lora_path must be a folder inside the directory of adapters, relative to it"
    )
    try:
        folder = (directory / path).resolve()
    except (OSError, RuntimeError, ValueError):  # circular links, a name that is too long, or a null character
        raise refused from None
    if directory.resolve() not in folder.parents:
        raise refused
    return folder


def _invalid(name: str, reason: str) -> ApiError:
    return ApiError(400, "invalid_adapter", f"adapter {name!r} can't be served: {reason}")


def cannot_load(name: str, folder: Path, error: Exception) -> ApiError:
    """Return the error for an adapter that cannot be loaded. It does not contain the folder's path."""
    if isinstance(error, FileNotFoundError):
        return ApiError(404, "model_not_found", f"adapter {name!r} was removed before it could be loaded")
    if isinstance(error, ValueError):  # a damaged adapter, or one that does not fit the base: trying again is no use
        return _invalid(name, reason_of(error, folder))
    return ApiError(503, "adapter_failed", f"adapter {name!r} can't be loaded: {reason_of(error, folder)}")


def reason_of(error: Exception, folder: Path) -> str:
    """Return an error's message without the adapter's path, and without its name in front."""
    text = str(error).replace(f"{folder}/", "").replace(str(folder), "the folder")
    named = re.match(r"adapter '[^']*'(:?) ", text)
    return text if named is None else ("" if named[1] else "it ") + text[named.end() :]
