"""The folders that hold adapters: an adapter's own, the output of a run, directories of them, and what is in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from s2ft.files.adapter_folder import ADAPTER, CONFIG, TENSORS, is_folder, own_folder
from s2ft.files.formats import ADAPTER_FORMATS
from s2ft.files.reading import check_adapter_name
from s2ft.files.tables import by_key

OPTIONS, RUN = "config.yaml", "run.json"  # the file with the options of a run, and its name in older runs
STATE = "trainer_state.json"  # in every checkpoint of a Trainer, next to the adapter's files


def adapter_folder(folder: Path) -> Path:
    """Return the folder of an adapter's files: `folder`, or `folder/adapter` for the output folder of a run.

    Args:
        folder: An adapter's folder, a checkpoint, or the output folder of a run.

    Raises:
        FileNotFoundError: The folder does not exist, the run has not saved its adapter yet, or it is a directory of
            several adapters. The message says what to give instead.
    """
    if is_folder(own_folder(folder)):
        return own_folder(folder)
    if not folder.exists():
        raise FileNotFoundError(f"adapter {folder} doesn't exist")
    if is_run(folder):
        checkpoints = [path.parent for path in folder.glob(f"checkpoint-*/{STATE}") if is_folder(path.parent)]
        newest = max(checkpoints, key=lambda path: path.stat().st_mtime, default=None)
        raise FileNotFoundError(
            f"{folder} is the output of a run that has saved no adapter yet: finish the run with --resume"
            + ("" if newest is None else f", or name one of its checkpoints, such as {newest}")
        )
    inside = sorted(adapters_in(folder)) if folder.is_dir() else []
    if inside and not any(known.module.matches(folder) for known in ADAPTER_FORMATS.values()):
        raise FileNotFoundError(
            f"{folder} is no adapter but has adapters in it, {', '.join(inside[:3])}{' …' if inside[3:] else ''}: give "
            f"one of them, such as {folder / inside[0]}"
        )
    return folder  # the reader raises the error that names the missing file


def adapters_in(directory: Path) -> dict[str, Path]:
    """Return the adapters in a directory of adapters or of runs, by the names of the folders in it.

    The output folder of one run has one adapter, with the name of that folder. Checkpoints are left out.
    """
    if is_run(directory) and is_folder(directory / ADAPTER):
        return {directory.resolve().name: directory / ADAPTER}
    return {
        entry.name: own_folder(entry)
        for entry in sorted(directory.iterdir())
        if is_folder(own_folder(entry)) and not (own_folder(entry) / STATE).is_file()
    }


def is_run(folder: Path) -> bool:
    """Whether the folder is the output of a run, which may have saved no adapter yet."""
    return any((folder / name).is_file() for name in (OPTIONS, RUN))


# ---- sources: what is served -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A directory with many adapters, or one adapter.

    Attributes:
        folder: A directory of adapters or of runs; with a name, an adapter's folder or the output folder of a run.
        name: The name of the only adapter. None if the folder has many, which are named by their folders.
    """

    folder: Path
    name: str | None = None

    def folders(self) -> dict[str, Path]:
        """Return the folders of all adapters by name. Raises OSError if the directory was deleted."""
        if self.name is None:
            return adapters_in(self.folder)
        return {self.name: own_folder(self.folder)} if is_folder(own_folder(self.folder)) else {}

    def skipped(self, found: Sequence[str]) -> dict[str, str]:
        """Return the other folders of the source by path, with the reason why they are no adapters.

        Args:
            found: Names of the adapters.
        """
        if self.name is not None:
            return {} if self.folders() else {str(self.folder): why_skipped(self.folder)}
        return {
            str(entry): why_skipped(entry)
            for entry in sorted(self.folder.iterdir())
            if entry.is_dir() and not entry.name.startswith(".") and entry.name not in found
        }


def source_of(text: str) -> Source:
    """Return the source that an argument names.

    Args:
        text: A directory of adapters or of runs, an adapter's folder, the output folder of a run, or NAME=DIR.

    Raises:
        NotADirectoryError: The folder does not exist.
        ValueError: The folder is a checkpoint or an adapter of PEFT, the name is not valid, or NAME=DIR names a
            directory of adapters.
    """
    name, separator, path = text.partition("=")
    if not separator or Path(text).is_dir():
        name, path = "", text
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise NotADirectoryError(f"adapters: {path or text} is not a folder")
    if (folder / STATE).is_file():
        raise ValueError(
            f"adapters: {folder} is a checkpoint of a training run, and checkpoints are not served: give the run's "
            f"folder, or copy the files {CONFIG} and {TENSORS} to a folder of their own"
        )
    is_one = is_folder(folder) or is_run(folder)
    if not is_one and (folder / "adapter_config.json").is_file():
        raise ValueError(f"adapters: {folder} can't be served: {why_skipped(folder)}")
    if name and not is_one:
        inside = ", ".join(sorted(adapters_in(folder))[:3])
        raise ValueError(
            f"adapters: {text} gives a name to one adapter, but {folder} is neither an adapter nor the output of a run"
            + (f"; it has {inside} in it: give the directory without {name}=" if inside else "")
        )
    if name:
        check_adapter_name(name, f"adapters: {text}")
    place = folder.resolve()
    of_run = place.name == ADAPTER and is_run(place.parent)  # an adapter has the name of its folder, or of its run
    return Source(folder, name or (place.parent if of_run else place).name) if is_one else Source(folder)


def why_skipped(folder: Path) -> str:
    """Explain why a folder is not served."""
    if (folder / STATE).is_file():
        return "it is a checkpoint of a training run"
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter of PEFT: convert it with s2ft export --from-peft, or a LoRA with --from-lora"
    if is_run(folder) and not (folder / ADAPTER).is_dir():
        return "it is the output of a run that has saved no adapter yet"
    place = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
    missing = [name for name in (CONFIG, TENSORS) if not (place / name).is_file()]
    return f"it has no {' and no '.join(missing)}" if missing else "its name can't be the name of an adapter"


def grouped(reasons: dict[str, str], shown: int = 5) -> list[str]:
    """Format names with their reasons, one line for each reason.

    Args:
        reasons: Reasons by name.
        shown: Number of names in a line. The others are counted.

    Example:
        >>> s2ft.adapter.folders.grouped({"a": "it is empty", "b": "it is empty"})
        ['a, b: it is empty']
    """
    by_reason = by_key((reason, name) for name, reason in reasons.items())
    return [f"{some(names, shown)}: {reason}" for reason, names in by_reason.items()]


def some(names: Sequence[str], shown: int = 5) -> str:
    """Format the first names, and the number of the others."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
