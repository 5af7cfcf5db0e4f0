"""The folders that hold adapters: an adapter's own folder, and the output folder of a run."""

from pathlib import Path

from s2ft.files.adapter_folder import is_folder

ADAPTER, RUN = "adapter", "run.json"  # names in the output folder of s2ft finetune
STATE = "trainer_state.json"  # in every checkpoint of a Trainer, next to the adapter's files


def adapter_folder(folder: Path) -> Path:
    """Return the folder of an adapter's files: `folder`, or `folder/adapter` for the output folder of a run.

    Raises:
        FileNotFoundError: The run has not saved its adapter yet; the message says how to go on.
    """
    if is_folder(folder):
        return folder
    if is_folder(folder / ADAPTER):
        return folder / ADAPTER
    if (folder / RUN).is_file():
        raise FileNotFoundError(
            f"{folder} is the output of a run that has saved no adapter yet: finish the run with "
            "--resume, or name one of its checkpoints"
        )
    return folder  # the reader raises the error that names the missing file


def adapters_in(directory: Path) -> dict[str, Path]:
    """Return the adapters in a directory of adapters or of runs, by the names of the folders in it.

    The output folder of one run has one adapter, with the name of that folder. Checkpoints are left out.
    """
    if _is_run(directory):
        return {directory.resolve().name: directory / ADAPTER}
    found = {entry.name: _inside(entry) for entry in sorted(directory.iterdir())}
    return {name: folder for name, folder in found.items() if folder is not None}


def adapter_named(directory: Path, name: str) -> Path | None:
    """Return one adapter of :func:`adapters_in` without looking at the others; None if the name is unknown."""
    if _is_run(directory):
        return directory / ADAPTER if name == directory.resolve().name else None
    return _inside(directory / name)


def _is_run(folder: Path) -> bool:
    return (folder / RUN).is_file() and is_folder(folder / ADAPTER)


def _inside(folder: Path) -> Path | None:
    """The folder of the adapter that an entry of a directory has; None for a checkpoint or any other entry."""
    if is_folder(folder):
        return None if (folder / STATE).is_file() else folder
    return folder / ADAPTER if is_folder(folder / ADAPTER) else None
