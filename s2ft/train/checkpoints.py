"""Checkpoints that are complete or absent.

A checkpoint is written to a temporary folder, sealed with the checksums of its files, and renamed.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from s2ft.files.writing import replace_file

logger = logging.getLogger(__name__)
CHECKPOINT = "checkpoint-"
UNFINISHED = ".unfinished"  # the temporary folder in which a checkpoint is written
SEAL = "s2ft_checkpoint.json"  # the sizes and checksums of all files; it is written last
STATE = "trainer_state.json"  # transformers writes it last, so it marks a complete checkpoint without a seal


def seal(checkpoint: Path) -> None:
    """Write the size and the SHA-256 of each file of a checkpoint to its seal."""
    files = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": _sum(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
    replace_file(checkpoint / SEAL, json.dumps({"files": files}, indent=1).encode())


def damage(checkpoint: Path) -> str:
    """Describe what is wrong with a checkpoint.

    A checkpoint without a seal was written by a plain Trainer of transformers. Only its completeness is checked.

    Args:
        checkpoint: The checkpoint's folder.

    Returns:
        A description of the first problem, or an empty string.
    """
    try:
        if not (checkpoint / SEAL).exists():
            json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
            return ""
        files = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))["files"]
        return next(
            (
                f"{name} was changed after it was written"
                for name, file in files.items()
                if (checkpoint / name).stat().st_size != file["bytes"] or _sum(checkpoint / name) != file["sha256"]
            ),
            "",
        )
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # a damaged file can contain anything
        return f"{SEAL if (checkpoint / SEAL).exists() else STATE} can't be read ({type(error).__name__})"


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, damaged ones too, oldest first."""
    found = [path for path in folder.glob(CHECKPOINT + "*") if path.name[len(CHECKPOINT) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(CHECKPOINT) :]))


def newest_valid(folder: Path) -> Path | None:
    """Return the newest valid checkpoint in a folder, or None. Each newer one, which is damaged, is logged."""
    for path in reversed(checkpoints(folder)):
        wrong = damage(path)
        if not wrong:
            return path
        logger.warning("%s is damaged and is skipped: %s", path, wrong)
    return None


def ranks_of(checkpoint: Path) -> int:
    """Return the number of ranks that wrote a checkpoint, by their random states; 0 if it has none."""
    return len([*checkpoint.glob("rng_state.pth"), *checkpoint.glob("rng_state_*.pth")])


def move_into_place(checkpoint: Path, folder: Path, keep: int, best: Path | None = None) -> None:
    """Seal a new checkpoint, move it from its temporary folder to `folder`, and delete the oldest checkpoints there.

    Args:
        checkpoint: The new checkpoint, in its temporary folder.
        folder: The folder that holds the run's checkpoints.
        keep: Number of checkpoints that stay, 0 for all. The new one and `best` always stay.
        best: The checkpoint with the best metric, or None.
    """
    seal(checkpoint)
    place = folder / checkpoint.name
    shutil.rmtree(place, ignore_errors=True)  # a damaged checkpoint, or one of an earlier attempt
    os.rename(checkpoint, place)
    shutil.rmtree(checkpoint.parent, ignore_errors=True)
    found = checkpoints(folder)
    removable = [path for path in found if path not in (place, best)]
    for old in removable[: len(found) - keep] if keep and len(found) > keep else []:
        shutil.rmtree(old, ignore_errors=True)


def _sum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
