"""What a build with a newer PyTorch does not notice, but one with 2.11, the oldest supported, does."""

from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted(path for path in CSRC.glob("**/*") if path.suffix in (".h", ".cpp"))
NEWER = ("STABLE_TORCH_ERROR_CODE_CHECK",)  # TORCH_TARGET_VERSION hides newer functions, but not this macro


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_no_newer_macro(source):
    assert not [name for name in NEWER if name in source.read_text()]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_pybind11_is_included_without_a_target_version(source):
    """The pybind11 among the headers of 2.11 is an error where TORCH_TARGET_VERSION is defined."""
    before, included, _ = source.read_text().partition("#include <pybind11/")
    assert not included or "#undef TORCH_TARGET_VERSION" in before
