"""constraints.txt, the ranges in pyproject.toml, and what is said of releases that are newer than any tested one."""

import json
import re
import tomllib
from pathlib import Path

import constraints
import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from support.inside import newer_than_tested
from support.models import model_of

import s2ft

ROOT = Path(__file__).parents[2]
TESTED = json.loads((ROOT / "s2ft/tested.json").read_text())
LINES = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
NAMES = {line.name for line in LINES}


def wanted():
    return [Requirement(one) for one in constraints.requirements(constraints.EXTRAS)]


def test_every_package_that_the_makefile_installs_is_constrained_but_torch():
    missing = {one.name for one in wanted()} - NAMES
    assert missing == {"torch"}


def test_the_build_of_pytorch_is_left_to_the_machine():
    assert [name for name in NAMES if re.match(r"torch$|torchvision|triton|nvidia-|cuda-", name)] == []


def test_a_constraint_lies_in_the_range_of_the_package():
    for one in wanted():
        for line in LINES:
            if line.name == one.name:
                (release,) = line.specifier
                assert one.specifier.contains(release.version), f"{line} is not in {one}"


def test_constraints_and_tested_releases_agree():
    exact = {line.name: next(iter(line.specifier)).version for line in LINES}
    assert {name: exact[name] for name in TESTED if name != "torch"} == {
        name: release for name, release in TESTED.items() if name != "torch"
    }


def test_every_requirement_stops_before_the_next_major_release():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in ("", "train", "quantized", "serve", "peft", "trl", "vllm"):
        for one in constraints.requirements(extras):
            if Requirement(one).name != "tqdm":
                assert "<" in one, one
    assert project["requires-python"] == ">=3.11"


# What the suite "newest" noted, and a word of the reason why the releases do not count as tested.
RELEASES = {"transformers": "5.25.0", "torch": "2.15.0"}
NOTES = {
    "never ran": (None, "never"),
    "failed": ({"status": 1, "date": "2026-12-06", "last line": "3 failed"}, "3 failed"),
    "other releases": ({"status": 0, "versions": {**RELEASES, "transformers": "5.24.0"}}, "transformers 5.24.0"),
    "not installed": ({"status": 0, "versions": {"torch": "2.15.0"}}, "transformers None"),
}


@pytest.mark.parametrize(("note", "word"), NOTES.values(), ids=NOTES)
def test_what_has_not_passed_is_not_written(note, word):
    assert word in constraints.why_untested(RELEASES, note)


def test_what_has_passed_is_written_whatever_the_build_of_pytorch():
    assert constraints.why_untested(RELEASES, {"status": 0, "versions": {**RELEASES, "torch": "2.15.0+cpu"}}) == ""


def test_a_release_that_is_newer_than_any_tested_one_is_named(monkeypatch):
    installed = dict(TESTED)
    monkeypatch.setattr("s2ft.foreign.version", lambda package: installed[package])
    assert newer_than_tested() == "" and s2ft.build_info()["untested"] == ""

    major, minor, *_ = Version(TESTED["transformers"]).release
    installed["transformers"] = f"{major}.{minor + 1}.0"
    installed["torch"] += "+cu132"
    sentence = f"transformers {major}.{minor + 1}.0 (tested up to {TESTED['transformers']})"
    assert newer_than_tested().endswith(sentence) and "torch" not in newer_than_tested()
    assert s2ft.build_info()["untested"] == newer_than_tested()
    report = s2ft.attach(model_of("llama-grouped"), s2ft.S2FTConfig(d_ratio=0.1))
    assert str(report).count(sentence) == 1
