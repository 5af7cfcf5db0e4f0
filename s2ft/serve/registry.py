"""The adapters that are served: those in a directory, and those that clients load.

A request keeps the version of the adapter with which it began. A version that was unloaded, deleted or replaced gets no
new requests, and is removed from the bank after its last one.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from s2ft.adapter.folders import ADAPTER, RUN, STATE, adapter_named, adapters_in
from s2ft.files.adapter_folder import CONFIG, TENSORS, stamp_of
from s2ft.files.reading import check_adapter_name
from s2ft.serve.errors import ApiError, unknown_model

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Version:
    """One saved state of an adapter.

    Attributes:
        name: The name that clients use.
        bank_name: The name in the bank, which is different for each version.
        folder: The adapter's folder.
        stamp: Changes with each save to the folder.
        users: Number of requests that use this version.
        retired: Whether new requests no longer get this version.
    """

    name: str
    bank_name: str
    folder: Path
    stamp: tuple
    users: int = 0
    retired: bool = False


class Adapters:
    """The adapters of a server by name. The methods can be called from any thread.

    Args:
        bank: The :class:`s2ft.AdapterBank` that loads the adapters.
        directory: A directory whose folders are adapters or outputs of runs, named by the folders. Checkpoints are not
            served. None serves the base alone.
        reserved: Names of the base.

    Raises:
        NotADirectoryError: The directory does not exist.
        ValueError: A folder has the name of the base.
    """

    def __init__(self, bank, directory=None, reserved: Sequence[str] = ()) -> None:
        self.bank, self.reserved = bank, tuple(reserved)
        self.directory = None if directory is None else Path(directory)
        if self.directory is not None and not self.directory.is_dir():
            raise NotADirectoryError(f"the directory of adapters {directory} does not exist")
        self._known: dict[str, Version] = {}
        self._unloaded: set[str] = set()  # unloaded by clients; their folders still exist
        self._added = 0
        self._lock = threading.Lock()
        taken = sorted(self._folders().keys() & set(self.reserved))
        if taken:
            raise ValueError(
                f"adapter {taken[0]!r} has the name of the base: rename its folder, or give the base "
                "another name with --served-model-name"
            )

    @property
    def names(self) -> list[str]:
        """The names that clients can use, sorted."""
        with self._lock:
            names = self._known.keys() | self._folders().keys()
            return sorted(name for name in names if self._current(name))

    def acquire(self, name: str) -> Version:
        """Get the present version of an adapter for a request, which must release it.

        Args:
            name: The adapter's name.

        Raises:
            ApiError: 404 if there is no such adapter.
        """
        with self._lock:
            version = self._current(name)
            if version is None:
                raise unknown_model(name)
            version.users += 1
            return version

    def release(self, version: Version) -> None:
        """End the use of a version by a request."""
        with self._lock:
            version.users -= 1
            self._forget_unused(version)

    def load(self, name: str, path: str) -> Version:
        """Serve an adapter under a name, and acquire it.

        Args:
            name: The name that clients use.
            path: The adapter's folder, relative to the directory.

        Raises:
            ApiError: 400 or 404 if the name or the path cannot be used.
        """
        if self.directory is None:
            raise ApiError(400, "no_directory", "the server was started without --adapters, so it can't load adapters")
        try:
            check_adapter_name(name)
        except ValueError as error:
            raise ApiError(400, "invalid_name", str(error)) from None
        folder = _inside(self.directory, path)
        with self._lock:
            if name in self.reserved or self._current(name):
                raise ApiError(400, "name_taken", f"there is already a model {name!r}: unload it first")
            if stamp_of(folder) is None:  # it may be the output of a run
                folder = _inside(self.directory, f"{path}/{ADAPTER}")
            stamp = stamp_of(folder)
            if stamp is None:
                raise ApiError(404, "adapter_not_found", f"there is no adapter at {path[:200]!r}: it has no {CONFIG}")
            try:
                version = self._add(name, folder, stamp)
            except (ValueError, OSError):
                raise ApiError(400, "invalid_adapter", f"{path[:200]!r} contains no complete adapter") from None
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
        with self._lock:
            version = self._current(name)
            if version is None:
                raise unknown_model(name)
            self._retire(version)
            self._unloaded.add(name)

    # ---- called with the lock held ---------------------------------------------------------------

    def _current(self, name: str) -> Version | None:
        """Return the version for new requests. It is replaced or removed if its folder has changed."""
        version = self._known.get(name)
        if version is not None and stamp_of(version.folder) != version.stamp:
            self._retire(version)
            version = None
        if version is None and self.directory is not None and name not in self._unloaded and name not in self.reserved:
            version = self._add_found(self.directory, name)
        return version

    def _add_found(self, directory: Path, name: str) -> Version | None:
        """Add an adapter of the directory, if it has one of this name."""
        try:
            check_adapter_name(name)
            folder = adapter_named(directory, name)
            stamp = None if folder is None else stamp_of(folder)
            return None if folder is None or stamp is None else self._add(name, folder, stamp)
        except (ValueError, OSError):  # an incomplete adapter, or a name that no file can have
            return None

    def _add(self, name: str, folder: Path, stamp: tuple) -> Version:
        bank_name = f"{name}#{self._added}"  # unique, since an earlier version may still be in use
        self.bank.add(bank_name, folder)
        self._added += 1
        self._known[name] = Version(name, bank_name, folder, stamp)
        return self._known[name]

    def _retire(self, version: Version) -> None:
        version.retired = True
        del self._known[version.name]
        self._forget_unused(version)

    def _forget_unused(self, version: Version) -> None:
        if version.retired and not version.users:
            self.bank.remove(version.bank_name)

    # ---- folders ---------------------------------------------------------------------------------

    def _folders(self) -> dict[str, Path]:
        if self.directory is None:
            return {}
        try:
            return adapters_in(self.directory)
        except OSError as error:  # the directory was deleted; loaded adapters can still be served
            logger.warning("can't look for adapters: %s", error)
            return {}

    def log_adapters(self) -> None:
        """Log the adapters, each folder that is skipped with the reason, and the expected layout if there are none."""
        if self.directory is None:
            return
        names = self.names
        for folder in _skipped(self.directory, names):
            logger.warning("warning: %s is not served: %s", folder, why_skipped(folder))
        if names:
            logger.info("adapters: %s", ", ".join(names))
        else:
            logger.warning(
                "warning: %s has no adapters, so the base is served alone; adapters are expected as "
                "%s/NAME/%s or, in the output of a run, as %s/NAME/%s/%s; checkpoints are not served",
                self.directory,
                self.directory,
                CONFIG,
                self.directory,
                ADAPTER,
                CONFIG,
            )


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


def _skipped(directory: Path, served: Sequence[str]) -> list[Path]:
    """List the folders of a directory that are not served. Parts of the output of one run are not listed."""
    if (directory / RUN).is_file():
        return []
    return [
        folder
        for folder in sorted(directory.iterdir())
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in served
    ]


def why_skipped(folder: Path) -> str:
    """Explain why a folder in the directory of adapters is not served."""
    if (folder / STATE).is_file():
        return "it is a checkpoint of a training run"
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter of PEFT: convert a LoRA with s2ft export --from-lora"
    if (folder / RUN).is_file() and not (folder / ADAPTER).is_dir():
        return "it is the output of a run that has saved no adapter yet"
    place = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
    missing = [name for name in (CONFIG, TENSORS) if not (place / name).is_file()]
    return f"{place} has no {' and no '.join(missing)}" if missing else "its name can't be the name of an adapter"


def cannot_load(version: Version, error: Exception) -> ApiError:
    """Return the error for an adapter that cannot be loaded. It does not contain the folder's path."""
    if isinstance(error, FileNotFoundError):
        return ApiError(404, "model_not_found", f"adapter {version.name!r} was removed before it could be loaded")
    message = f"adapter {version.name!r} can't be loaded: {public_reason(version, error)}"
    if isinstance(error, ValueError):  # a damaged adapter, or one that does not fit the base: trying again is no use
        return ApiError(400, "invalid_adapter", message)
    return ApiError(503, "adapter_failed", message)


def public_reason(version: Version, error: Exception) -> str:
    """Return an error's message with the adapter's name in place of its path."""
    return str(error).replace(str(version.folder), version.name).replace(version.bank_name, version.name)
