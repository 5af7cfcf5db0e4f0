"""Copies of the source tree to build in, away from the one under test."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILT = ("_C.*", "_build.json", "__pycache__", "*.egg-info", "build", "dist")


@pytest.fixture
def source(tmp_path):
    """A fresh copy of what a build needs, with nothing built in it."""
    copy = tmp_path / "source"
    for folder in ("csrc", "s2ft", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns(*BUILT))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def run(tmp_path):
    """run(arguments, cwd, **variables): Python in a process of its own, with those variables set."""
    def run(arguments, cwd=tmp_path, check=True, python=sys.executable, **variables):
        environment = dict(os.environ)
        for name in ("S2FT_BUILD", "TORCH_CUDA_ARCH_LIST", "PYTHONPATH", "PYTHONWARNINGS"):
            environment.pop(name, None)
        environment.update({name: str(value) for name, value in variables.items()})
        result = subprocess.run([str(python), *map(str, arguments)], cwd=cwd, env=environment, text=True,
                                capture_output=True)
        if check and result.returncode:
            pytest.fail(f"{arguments} failed:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
        return result
    return run


@pytest.fixture
def environment(run, tmp_path):
    """The Python of a new virtual environment that sees this one's packages, s2ft aside."""
    folder = tmp_path / "environment"
    run(["-m", "venv", "--without-pip", folder])
    (site,) = folder.glob("lib/python*/site-packages")
    # A path file adds the packages; the path files among them, such as an editable s2ft's, are not read.
    (site / "packages.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    return folder / "bin" / "python"
