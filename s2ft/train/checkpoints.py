"""Checkpoints that are whole or not there: written beside, sealed with the sums of their files, renamed."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from s2ft.files.writing import replace_file

logger = logging.getLogger(__name__)
CHECKPOINT = "checkpoint-"
UNFINISHED = ".unfinished"  # the folder in which one is being written
SEAL = "s2ft_checkpoint.json"  # written last
STATE = "trainer_state.json"  # transformers writes it last: what marks a checkpoint without a seal


def seal(checkpoint: Path) -> None:
    """Note size and sum of every file."""
    files = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": _sum(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
    replace_file(checkpoint / SEAL, json.dumps({"files": files}, indent=1).encode())


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, in words; empty where nothing is. Of one without a seal, from a Trainer of
    transformers' own, only whether it was written to its end."""
    try:
        if not (checkpoint / SEAL).exists():
            json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
            return ""
        files = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))["files"]
        return next(
            (
                f"{name} is not what was written"
                for name, file in files.items()
                if (checkpoint / name).stat().st_size != file["bytes"] or _sum(checkpoint / name) != file["sha256"]
            ),
            "",
        )
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # a seal or state of anything
        return f"{SEAL if (checkpoint / SEAL).exists() else STATE} can't be read ({type(error).__name__})"


def checkpoints(folder: Path) -> list[Path]:
    """Finished or not, whole or not, oldest first."""
    found = [path for path in folder.glob(CHECKPOINT + "*") if path.name[len(CHECKPOINT) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(CHECKPOINT) :]))


def last_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; each newer one that isn't is named in a warning."""
    for path in reversed(checkpoints(folder)):
        wrong = damage(path)
        if not wrong:
            return path
        logger.warning("%s is damaged and left out: %s", path, wrong)
    return None


def finish(checkpoint: Path, folder: Path, keep: int, best: Path | None = None) -> None:
    """Seal a checkpoint that was written beside, put it into `folder` by renaming, and delete the oldest ones there.

    Args: keep: how many stay, 0 for all; this one and `best` always do.
    """
    seal(checkpoint)
    place = folder / checkpoint.name
    shutil.rmtree(place, ignore_errors=True)  # of an earlier try, damaged, or resumed from before it
    os.rename(checkpoint, place)
    shutil.rmtree(checkpoint.parent, ignore_errors=True)
    found = checkpoints(folder)
    others = [path for path in found if path not in (place, best)]
    for old in others[: len(found) - keep] if keep and len(found) > keep else []:
        shutil.rmtree(old, ignore_errors=True)


def _sum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
