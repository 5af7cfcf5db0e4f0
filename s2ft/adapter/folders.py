"""Which folders hold adapters: an adapter's own, and the output folder of a run."""

from pathlib import Path

from s2ft.files.adapter_folder import is_folder

ADAPTER, RUN = "adapter", "run.json"  # in the output folder of s2ft finetune
STATE = "trainer_state.json"  # in every checkpoint of a Trainer, beside the adapter's files


def adapter_folder(folder: Path) -> Path:
    """The folder of an adapter's files: `folder`, or its `adapter` where `folder` is the output of a run.

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
    return folder  # the reader says what it lacks


def adapters_in(directory: Path) -> dict[str, Path]:
    """The adapters in a directory of adapters or outputs of runs, by the names of the folders in it.

    The output of one run as `directory` holds one adapter, which has the run's name. Checkpoints are left out.
    """
    if _is_run(directory):
        return {directory.resolve().name: directory / ADAPTER}
    found = {entry.name: _inside(entry) for entry in sorted(directory.iterdir())}
    return {name: folder for name, folder in found.items() if folder is not None}


def adapter_named(directory: Path, name: str) -> Path | None:
    """One of :func:`adapters_in`, without looking at the others; None if there is none of this name."""
    if _is_run(directory):
        return directory / ADAPTER if name == directory.resolve().name else None
    return _inside(directory / name)


def _is_run(folder: Path) -> bool:
    return (folder / RUN).is_file() and is_folder(folder / ADAPTER)


def _inside(folder: Path) -> Path | None:
    """The adapter that a folder of a directory stands for; None for a checkpoint or any other folder."""
    if is_folder(folder):
        return None if (folder / STATE).is_file() else folder
    return folder / ADAPTER if is_folder(folder / ADAPTER) else None
