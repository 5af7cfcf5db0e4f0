"""The source tree, and copies of it in which a test can build."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def copy_sources(copy: Path) -> Path:
    """Copy the files that a build needs, without anything that was built. Returns the new folder."""
    for folder in ("csrc", "s2ft", "tests"):
        shutil.copytree(
            ROOT / folder,
            copy / folder,
            ignore=shutil.ignore_patterns("_C.*", "_build.json", "__pycache__", "*.egg-info", "build", "dist"),
        )
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy
