"""The folders that hold adapters: an adapter's own folder, and the output folder of a run."""

from pathlib import Path

from s2ft.files.adapter_folder import ADAPTER, is_folder, own_folder
from s2ft.files.formats import ADAPTER_FORMATS

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
    if _has_adapter(directory):
        return {directory.resolve().name: directory / ADAPTER}
    found = {entry.name: _inside(entry) for entry in sorted(directory.iterdir())}
    return {name: folder for name, folder in found.items() if folder is not None}


def adapter_named(directory: Path, name: str) -> Path | None:
    """Return one adapter of :func:`adapters_in` without looking at the others; None if the name is unknown."""
    if _has_adapter(directory):
        return directory / ADAPTER if name == directory.resolve().name else None
    return _inside(directory / name)


def is_run(folder: Path) -> bool:
    """Whether the folder is the output of a run, which may have saved no adapter yet."""
    return any((folder / name).is_file() for name in (OPTIONS, RUN))


def _has_adapter(folder: Path) -> bool:
    return is_run(folder) and is_folder(folder / ADAPTER)


def _inside(folder: Path) -> Path | None:
    """The folder of the adapter that an entry of a directory has; None for a checkpoint or any other entry."""
    if is_folder(folder):
        return None if (folder / STATE).is_file() else folder
    return folder / ADAPTER if is_folder(folder / ADAPTER) else None
