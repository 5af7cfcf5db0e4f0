"""The Dockerfile, the compose file and the unit of systemd name files and options that exist."""

import re
import shlex

import pytest
from support.inside import ServeArguments, parse
from support.sources import ROOT

from s2ft.cli.main import COMMANDS

tomllib = pytest.importorskip("tomllib")  # Python 3.11 and later


def instructions(name):
    """The lines of a Dockerfile by instruction."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text()))
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(f"{name} ")]


def test_the_image_gets_the_files_that_the_build_needs():
    copied = [word for line in instructions("COPY") for word in line.split()[:-1]]
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied) == sorted(let_in) and all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"], "pyproject.toml", "setup.py", "csrc", "s2ft"} <= set(copied)
    (extras,) = (line.partition("=")[2] for line in instructions("ARG") if line.startswith("EXTRAS="))
    assert extras in project["optional-dependencies"]


LINES = [
    *re.findall(r"command: >-\n\s+(.*)", (ROOT / "examples/serve/compose.yaml").read_text()),
    *re.findall(r"(?m)^Exec\w+=\S+/s2ft (.*)", (ROOT / "examples/serve/s2ft.service").read_text()),
]


@pytest.mark.parametrize("line", LINES)
def test_the_options_of_the_examples_exist(line):
    command, *arguments = shlex.split(line)
    (job,), _ = parse(command, "", [ServeArguments], arguments)
    assert command in COMMANDS and job.adapters and job.access_log in ("text", "json")
