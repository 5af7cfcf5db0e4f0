"""Which adapters are served: those in a folder, as they come and go, and those that clients load and unload.

A request holds on to the version of the adapter that it began with. One that was unloaded, deleted or replaced is
no longer given out, and leaves the bank with its last request.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from s2ft.adapter.folders import ADAPTER, adapter_named, adapters_in
from s2ft.files.adapter_folder import CONFIG, stamp_of
from s2ft.files.reading import check_adapter_name
from s2ft.serve.errors import ApiError, unknown_model

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Version:
    """One adapter as it was saved at one time."""

    name: str
    in_bank: str
    folder: Path
    stamp: tuple
    users: int = 0
    gone: bool = False


class Adapters:
    """Adapters by name, over an ``AdapterBank``. May be called from any thread.

    Args:
        bank: has `add` and `remove`.
        directory: each folder in it that is an adapter or the output of a run is one, by its name; checkpoints are
            none; None serves the base alone.
        reserved: names that are the base's.
    """

    def __init__(self, bank, directory=None, reserved: Sequence[str] = ()) -> None:
        self.bank, self.reserved = bank, tuple(reserved)
        self.directory = None if directory is None else Path(directory)
        if self.directory is not None and not self.directory.is_dir():
            raise NotADirectoryError(f"{directory} is no folder of adapters")
        self._known: dict[str, Version] = {}
        self._unloaded: set[str] = set()  # by clients: their folders are still there
        self._added = 0
        self._lock = threading.Lock()
        taken = sorted(self._folders().keys() & set(self.reserved))
        if taken:
            raise ValueError(
                f"adapter {taken[0]!r} has the name of the base: rename its folder, or name the base "
                "another way with --served-model-name"
            )

    @property
    def names(self) -> list[str]:
        with self._lock:
            names = self._known.keys() | self._folders().keys()
            return sorted(name for name in names if self._current(name))

    def take(self, name: str) -> Version:
        """The adapter as it is now, until it is given back. Raises: ApiError 404."""
        with self._lock:
            version = self._current(name)
            if version is None:
                raise unknown_model(name)
            version.users += 1
            return version

    def give_back(self, version: Version) -> None:
        with self._lock:
            version.users -= 1
            self._forget_unused(version)

    def load(self, name: str, path: str) -> Version:
        """Serve the adapter at `path`, relative to the directory, as `name`, and take it. Raises: ApiError."""
        if self.directory is None:
            raise ApiError(400, "no_directory", "the server was started without --adapters, so it loads none")
        try:
            check_adapter_name(name)
        except ValueError as error:
            raise ApiError(400, "invalid_name", str(error)) from None
        folder = self._inside(path)
        with self._lock:
            if name in self.reserved or self._current(name):
                raise ApiError(400, "name_taken", f"there is a model {name!r} already: unload it first")
            if stamp_of(folder) is None:  # the output of a run, perhaps
                folder = self._inside(f"{path}/{ADAPTER}")
            stamp = stamp_of(folder)
            if stamp is None:
                raise ApiError(404, "adapter_not_found", f"there is no adapter at {path[:200]!r}: it has no {CONFIG}")
            try:
                version = self._add(name, folder, stamp)
            except (ValueError, OSError):
                raise ApiError(400, "invalid_adapter", f"{path[:200]!r} holds no complete adapter") from None
            self._unloaded.discard(name)
            version.users += 1
            return version

    def unload(self, name: str) -> None:
        """Raises: ApiError 404."""
        with self._lock:
            version = self._current(name)
            if version is None:
                raise unknown_model(name)
            self._retire(version)
            self._unloaded.add(name)

    # ---- under the lock --------------------------------------------------------------------------

    def _current(self, name: str) -> Version | None:
        """The version to give out; one whose folder has changed or gone is replaced or dropped."""
        version = self._known.get(name)
        if version is not None and stamp_of(version.folder) != version.stamp:
            self._retire(version)
            version = None
        if version is None and self.directory is not None and name not in self._unloaded and name not in self.reserved:
            version = self._found(name)
        return version

    def _found(self, name: str) -> Version | None:
        try:
            check_adapter_name(name)
            folder = adapter_named(self.directory, name)
            stamp = None if folder is None else stamp_of(folder)
            return None if stamp is None else self._add(name, folder, stamp)
        except (ValueError, OSError):  # half of an adapter, or a name no file has
            return None

    def _add(self, name: str, folder: Path, stamp: tuple) -> Version:
        in_bank = f"{name}#{self._added}"  # an earlier version may still be in use
        self.bank.add(in_bank, folder)
        self._added += 1
        self._known[name] = Version(name, in_bank, folder, stamp)
        return self._known[name]

    def _retire(self, version: Version) -> None:
        version.gone = True
        del self._known[version.name]
        self._forget_unused(version)

    def _forget_unused(self, version: Version) -> None:
        if version.gone and not version.users:
            self.bank.remove(version.in_bank)

    # ---- folders ---------------------------------------------------------------------------------

    def _folders(self) -> dict[str, Path]:
        if self.directory is None:
            return {}
        try:
            return adapters_in(self.directory)
        except OSError as error:  # the directory itself has gone; what is known may still be served
            logger.warning("can't look for adapters: %s", error)
            return {}

    def say(self) -> None:
        """Log which adapters are there, and how they must lie where there are none."""
        if self.directory is None:
            return
        names = self.names
        if names:
            logger.info("adapters: %s", ", ".join(names))
        else:
            logger.warning(
                "warning: %s has no adapters, so the base is served alone; an adapter is found as "
                "%s/NAME/%s or, in the output of a run, as %s/NAME/%s/%s; checkpoints are not served",
                self.directory,
                self.directory,
                CONFIG,
                self.directory,
                ADAPTER,
                CONFIG,
            )

    def _inside(self, path: str) -> Path:
        refused = ApiError(
            400, "invalid_path", "lora_path must be a folder inside the directory of adapters, relative to it"
        )
        try:
            if not path or "\0" in path or Path(path).is_absolute() or ".." in Path(path).parts:
                raise refused
            folder = (self.directory / path).resolve()
        except (OSError, RuntimeError, ValueError):  # links in a circle, a name too long
            raise refused from None
        if self.directory.resolve() not in folder.parents:
            raise refused
        return folder


def not_loaded(version: Version, error: Exception) -> ApiError:
    """What a client may know: the folder's place on this machine is not among it."""
    if isinstance(error, FileNotFoundError):
        return ApiError(404, "model_not_found", f"adapter {version.name!r} was removed before it could be loaded")
    return ApiError(500, "adapter_failed", f"adapter {version.name!r} can't be loaded: {why_not(version, error)}")


def why_not(version: Version, error: Exception) -> str:
    return str(error).replace(str(version.folder), version.name).replace(version.in_bank, version.name)
