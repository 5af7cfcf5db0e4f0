"""Fixtures that build s2ft in a copy of the source tree, so that the tree under test does not change."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.sources import copy_sources


@pytest.fixture
def source(tmp_path):
    return copy_sources(tmp_path / "source")


def environment_with(variables):
    """The environment of a build: this one without the variables that change it, and with `variables`."""
    environment = dict(os.environ)
    for name in ("S2FT_BUILD", "TORCH_CUDA_ARCH_LIST", "PYTHONPATH", "PYTHONWARNINGS"):
        environment.pop(name, None)
    return environment | {name: str(value) for name, value in variables.items()}


@pytest.fixture
def run(tmp_path):
    """run(arguments, cwd, **variables) starts Python in a process of its own, with those environment variables."""

    def run(arguments, cwd=tmp_path, check=True, python=sys.executable, **variables):
        result = subprocess.run(
            [str(python), *map(str, arguments)],
            cwd=cwd,
            env=environment_with(variables),
            text=True,
            capture_output=True,
        )
        if check and result.returncode:
            pytest.fail(f"{arguments} failed:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
        return result

    return run


@pytest.fixture(scope="session")
def warm():
    """A process for `run_script`; see warm.py."""
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "warm.py")],
        env=environment_with({}),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run_script(warm, tmp_path):
    """run_script(script, folder, **variables) runs Python code like `run(["-c", script])`, in a fork of `warm`."""

    def run_script(script, folder, check=True, **variables):
        files = {name: str(tmp_path / name) for name in ("stdout", "stderr")}
        for file in files.values():
            Path(file).unlink(missing_ok=True)
        job = {"script": script, "folder": str(folder), "environment": environment_with(variables), **files}
        print(json.dumps(job), file=warm.stdin, flush=True)
        status = int(warm.stdout.readline())
        stdout, stderr = (Path(file).read_text() for file in files.values())
        if check and status:
            pytest.fail(f"the script failed:\n{stdout[-3000:]}\n{stderr[-3000:]}")
        return subprocess.CompletedProcess([], status, stdout, stderr)

    return run_script


@pytest.fixture
def environment(run, tmp_path):
    """The Python of a new virtual environment that has the packages of this one, without s2ft."""
    folder = tmp_path / "environment"
    run(["-m", "venv", "--without-pip", folder])
    (site,) = folder.glob("lib/python*/site-packages")
    # A path file adds the packages. Path files in their folder, such as that of an editable s2ft, are not read.
    (site / "packages.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    return folder / "bin" / "python"
