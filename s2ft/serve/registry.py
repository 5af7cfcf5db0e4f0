"""The adapters that are served: those of the server's sources, and those that clients load.

A request keeps the version of the adapter with which it began. A version that was unloaded, deleted or replaced gets no
new requests, and is removed from the bank after its last one. An adapter that does not fit the base, or is damaged, is
refused when it is first seen, until its folder changes.
"""

import logging
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from s2ft.adapter.folders import ADAPTER, STATE
from s2ft.files.adapter_folder import CONFIG, stamp_of
from s2ft.files.reading import check_adapter_name
from s2ft.serve.errors import ApiError, unknown_model
from s2ft.serve.sources import grouped, some, source_of
from s2ft.text.adapter_prompts import recorded_format
from s2ft.text.prompts import PromptFormat

logger = logging.getLogger(__name__)
SHOWN = 20  # names in the line of the log that lists the adapters


@dataclass(eq=False)
class Version:
    """One saved state of an adapter.

    Attributes:
        name: The name that clients use.
        bank_name: The name in the bank, which is different for each version.
        folder: The adapter's folder.
        stamp: Changes with each save to the folder.
        prompt: The format of prompts that the adapter was trained with, or None if it is not recorded.
        users: Number of requests that use this version.
        retired: Whether new requests no longer get this version.
    """

    name: str
    bank_name: str
    folder: Path
    stamp: tuple
    prompt: PromptFormat | None
    users: int = 0
    retired: bool = False


@dataclass(frozen=True)
class Refused:
    """A saved state of an adapter that can't be served.

    Attributes:
        folder: The adapter's folder.
        stamp: Changes with each save to the folder.
        reason: The reason, without the name and the path.
    """

    folder: Path
    stamp: tuple
    reason: str


class Adapters:
    """The adapters of a server by name. The methods can be called from any thread.

    Args:
        bank: The :class:`s2ft.AdapterBank` that loads the adapters.
        sources: Where adapters are looked for, see :func:`s2ft.serve.sources.source_of`. None serves the base alone.
        reserved: Names of the base.

    Raises:
        NotADirectoryError: A folder does not exist.
        ValueError: A source can't be used, or two adapters, or an adapter and the base, have the same name.
    """

    def __init__(self, bank, sources: Sequence[str] = (), reserved: Sequence[str] = ()) -> None:
        self.bank, self.reserved = bank, tuple(reserved)
        self.sources = [source_of(str(text)) for text in sources]
        self._known: dict[str, Version] = {}
        self._refused: dict[str, Refused] = {}
        self._unloaded: set[str] = set()  # unloaded by clients; their folders still exist
        self._added = 0
        self._started = False  # whether the adapters at start were logged; later ones are logged when they are seen
        self._lock = threading.Lock()  # guards the fields above; the engine needs it, so no adapter is read meanwhile
        self._checking = threading.Lock()  # held while an adapter is checked; taken before the other lock
        self._check_names()

    def _check_names(self) -> None:
        """Raise ValueError if two adapters, or an adapter and the base, have the same name."""
        found: dict[str, Path] = {}
        for source in self.sources:
            for name, folder in source.folders().items():
                if name in self.reserved:
                    raise ValueError(
                        f"adapter {name!r} has the name of the base: rename its folder, or give the base another name "
                        "with --served-model-name"
                    )
                if name in found and found[name].resolve() != folder.resolve():
                    raise ValueError(
                        f"two adapters are called {name!r}, {found[name]} and {folder}: name one of them with "
                        "--adapters NAME=DIR, or leave out its directory"
                    )
                found.setdefault(name, folder)

    @property
    def names(self) -> list[str]:
        """The names that clients can use, sorted. New folders are checked first, which may take a while."""
        with self._lock:
            candidates = sorted(self._known.keys() | self._refused.keys() | self._folders().keys())
        for name in candidates:
            self._refresh(name)
        with self._lock:
            return sorted(self._known)

    @property
    def prompts(self) -> dict[str, PromptFormat | None]:
        """The recorded formats of prompts by name, as :attr:`names` last saw the adapters."""
        with self._lock:
            return {name: version.prompt for name, version in sorted(self._known.items())}

    @property
    def refused(self) -> dict[str, Refused]:
        """The adapters that can't be served, by name, as :attr:`names` last saw them."""
        with self._lock:
            return dict(self._refused)

    def acquire(self, name: str, count: int = 1) -> Version:
        """Get the present version of an adapter for sequences, each of which must release it.

        Args:
            name: The adapter's name.
            count: Number of sequences.

        Raises:
            ApiError: 404 if there is no such adapter, 400 if it can't be served.
        """
        self._refresh(name)
        with self._lock:
            version = self._known.get(name)
            if version is None and name in self._refused:
                raise invalid_adapter(name, self._refused[name].reason)
            if version is None:
                raise unknown_model(name)
            version.users += count
            return version

    def release(self, version: Version, count: int = 1) -> None:
        """End the use of a version by so many sequences."""
        with self._lock:
            version.users -= count
            self._forget_unused(version)

    def load(self, name: str, path: str) -> Version:
        """Serve an adapter under a name, and acquire it.

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
        self._refresh(name)
        with self._checking:
            if name in self.reserved or name in self._known:
                raise ApiError(400, "name_taken", f"there is already a model {name!r}: unload it first")
            folder, stamp = _named_by_client(directories, path)
            self._examine(name, folder, stamp)
            with self._lock:
                version = self._known.get(name)
                if version is None:
                    refused = self._refused.pop(name, None)
                    raise invalid_adapter(name, "it was removed" if refused is None else refused.reason)
                self._unloaded.discard(name)
                version.users += 1
                return version

    def unload(self, name: str) -> None:
        """Stop serving an adapter. Running requests keep it.

        Args:
            name: The adapter's name.

        Raises:
            ApiError: 404 if there is no such adapter.
        """
        self._refresh(name)
        with self._lock:
            version = self._known.get(name)
            if version is None:
                raise unknown_model(name)
            self._retire(version)
            self._unloaded.add(name)

    def refuse(self, version: Version, error: Exception) -> None:
        """Stop serving a version that could not be loaded, until its folder changes."""
        with self._lock:
            if not version.retired:
                self._retire(version)
                self._note_refused(version.name, version.folder, version.stamp, error)

    # ---- folders and their checks ----------------------------------------------------------------

    def _refresh(self, name: str) -> None:
        """Bring what is known of a name up to date with its folder. A new or changed adapter is checked."""
        with self._lock:
            if self._is_current(name):
                return  # without waiting for the checks of other adapters
        with self._checking:
            with self._lock:
                version = self._known.get(name)
                if version is not None and not self._is_current(name):
                    self._retire(version)
                if name in self._known or name in self._unloaded or name in self.reserved:
                    return
                found = self._find(name)
                known = self._refused.get(name)
                if found is None:
                    self._refused.pop(name, None)
                if found is None or (known is not None and (known.folder, known.stamp) == found):
                    return
            self._examine(name, *found)

    def _examine(self, name: str, folder: Path, stamp: tuple) -> None:
        """Check an adapter, and add it or note why it can't be served. Other requests go on meanwhile."""
        try:
            prompt = recorded_format(self.bank.check(folder).info)
            with self._lock:
                bank_name = f"{name}#{self._added}"  # unique, since an earlier version may still be in use
                self.bank.add(bank_name, folder)
                self._added += 1
                self._refused.pop(name, None)
                self._known[name] = Version(name, bank_name, folder, stamp, prompt)
        except FileNotFoundError:  # it was removed meanwhile
            return
        except (ValueError, OSError) as error:
            with self._lock:
                self._note_refused(name, folder, stamp, error)
            return
        if self._started:
            logger.info("new adapter: %s", name)

    # ---- called with the lock held ---------------------------------------------------------------

    def _is_current(self, name: str) -> bool:
        """Whether there is a version for new requests whose folder has not changed."""
        version = self._known.get(name)
        return version is not None and stamp_of(version.folder) == version.stamp

    def _find(self, name: str) -> tuple[Path, tuple] | None:
        """Return the folder of an adapter of the sources, and its stamp; None if there is none of this name."""
        try:
            check_adapter_name(name)
            folder = next((folder for source in self.sources if (folder := source.find(name)) is not None), None)
        except (ValueError, OSError):  # a name that no file can have
            return None
        stamp = None if folder is None else stamp_of(folder)
        return None if folder is None or stamp is None else (folder, stamp)

    def _note_refused(self, name: str, folder: Path, stamp: tuple, error: Exception) -> None:
        self._refused[name] = Refused(folder, stamp, _reason(error, folder))
        if self._started:
            logger.warning("warning: not served: %s: %s", name, self._refused[name].reason)

    def _retire(self, version: Version) -> None:
        version.retired = True
        del self._known[version.name]
        logger.info("no longer served: %s", version.name)
        self._forget_unused(version)

    def _forget_unused(self, version: Version) -> None:
        if version.retired and not version.users:
            self.bank.remove(version.bank_name)

    def _folders(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for source in self.sources:
            try:
                found = {**source.folders(), **found}
            except OSError as error:  # the directory was deleted; loaded adapters can still be served
                logger.warning("can't look for adapters: %s", error)
        return found

    # ---- the log ---------------------------------------------------------------------------------

    def log_adapters(self) -> None:
        """Log the adapters that are served, and those that are not, with the reasons.

        Raises:
            ValueError: An adapter that was named by itself, or all adapters that were found, can't be served.
        """
        names, refused = self.log_skipped()
        self._started = True
        self._check_refused(names, refused)
        if names:
            logger.info("serving %s: %s", _counted(names), some(names, SHOWN))
        elif self.sources:
            where = some([str(source.folder) for source in self.sources])
            logger.warning(
                "warning: no adapters in %s, so the base is served alone; adapters are expected as DIR/NAME/%s or, in "
                "the output of a run, as DIR/NAME/%s/%s; checkpoints are not served",
                where,
                CONFIG,
                ADAPTER,
                CONFIG,
            )

    def log_skipped(self) -> tuple[list[str], dict[str, Refused]]:
        """Log the folders that are not served, with the reasons. Returns the adapters that are, and those refused."""
        names, refused = self.names, self.refused
        for source in self.sources:
            for line in grouped(source.skipped([*names, *refused])):
                logger.warning("warning: not served: %s", line)
        for line in grouped({name: one.reason for name, one in refused.items()}):
            logger.warning("warning: not served: %s", line)
        return names, refused

    def log_fitting(self) -> None:
        """Log the adapters that fit the base, and the folders that are not served, with the reasons.

        Raises:
            ValueError: An adapter can't be served, or a source has none.
        """
        names, refused = self.log_skipped()
        if names:
            logger.info("%s fit%s the base: %s", _counted(names), "s" * (len(names) == 1), some(names, SHOWN))
        if refused:
            count = len(refused)
            raise ValueError(f"{count} of {count + len(names)} adapters can't be served; the reasons are above")
        empty = [str(source.folder) for source in self.sources if not source.folders()]
        if empty:
            raise ValueError(f"there is no adapter in {some(empty)}: adapters are expected as DIR/NAME/{CONFIG}")

    def _check_refused(self, names: Sequence[str], refused: dict[str, Refused]) -> None:
        single = [source.name for source in self.sources if source.name in refused]
        if single or (refused and not names):
            name = single[0] if single else next(iter(refused))
            all_of = "" if single else f"none of the {len(refused)} adapters found can be served; "
            raise ValueError(f"{all_of}adapter {name!r} can't be served: {refused[name].reason}")


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} adapter{'s' * (len(names) != 1)}"


def _named_by_client(directories: Sequence[Path], path: str) -> tuple[Path, tuple]:
    """Return the adapter's folder at a path of a client, and its stamp. Raises ApiError 400 or 404."""
    for place in [_inside(directory, path) for directory in directories]:
        for folder in (place, place / ADAPTER):  # it may be the output of a run
            stamp = stamp_of(folder)
            if stamp is not None and (folder / STATE).is_file():
                raise ApiError(400, "invalid_adapter", f"{path[:200]!r} is a checkpoint of a training run")
            if stamp is not None:
                return folder, stamp
    raise ApiError(404, "adapter_not_found", f"there is no adapter at {path[:200]!r}: it has no {CONFIG}")


def _inside(directory: Path, path: str) -> Path:
    """Return the folder at a path of a client, which must be inside the directory."""
    refused = ApiError(
        400, "invalid_path", "lora_path must be a folder inside the directory of adapters, relative to it"
    )
    try:
        if not path or "\0" in path or Path(path).is_absolute() or ".." in Path(path).parts:
            raise refused
        folder = (directory / path).resolve()
    except (OSError, RuntimeError, ValueError):  # circular links, or a name that is too long
        raise refused from None
    if directory.resolve() not in folder.parents:
        raise refused
    return folder


def invalid_adapter(name: str, reason: str) -> ApiError:
    """Return the error for an adapter that can't be served."""
    return ApiError(400, "invalid_adapter", f"adapter {name!r} can't be served: {reason}")


def cannot_load(version: Version, error: Exception) -> ApiError:
    """Return the error for an adapter that cannot be loaded. It does not contain the folder's path."""
    if isinstance(error, FileNotFoundError):
        return ApiError(404, "model_not_found", f"adapter {version.name!r} was removed before it could be loaded")
    if isinstance(error, ValueError):  # a damaged adapter, or one that does not fit the base: trying again is no use
        return invalid_adapter(version.name, _reason(error, version.folder))
    return ApiError(
        503, "adapter_failed", f"adapter {version.name!r} can't be loaded: {_reason(error, version.folder)}"
    )


def _reason(error: Exception, folder: Path) -> str:
    """Return an error's message without the adapter's path, and without its name in front."""
    text = str(error).replace(f"{folder}/", "").replace(str(folder), "the folder")
    named = re.match(r"adapter '[^']*'(:?) ", text)
    return text if named is None else ("" if named[1] else "it ") + text[named.end() :]
