"""Fixtures that build s2ft in a copy of the source tree, so that the tree under test does not change."""

import os
import subprocess
import sys

import pytest
from support.sources import copy_sources


@pytest.fixture
def source(tmp_path):
    return copy_sources(tmp_path / "source")


@pytest.fixture
def run(tmp_path):
    """run(arguments, cwd, **variables) starts Python in a process of its own, with those environment variables."""

    def run(arguments, cwd=tmp_path, check=True, python=sys.executable, **variables):
        environment = dict(os.environ)
        for name in ("S2FT_BUILD", "TORCH_CUDA_ARCH_LIST", "PYTHONPATH", "PYTHONWARNINGS"):
            environment.pop(name, None)
        environment.update({name: str(value) for name, value in variables.items()})
        result = subprocess.run(
            [str(python), *map(str, arguments)], cwd=cwd, env=environment, text=True, capture_output=True
        )
        if check and result.returncode:
            pytest.fail(f"{arguments} failed:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
        return result

    return run


@pytest.fixture
def environment(run, tmp_path):
    """The Python of a new virtual environment that has the packages of this one, without s2ft."""
    folder = tmp_path / "environment"
    run(["-m", "venv", "--without-pip", folder])
    (site,) = folder.glob("lib/python*/site-packages")
    # A path file adds the packages. Path files in their folder, such as that of an editable s2ft, are not read.
    (site / "packages.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    return folder / "bin" / "python"
