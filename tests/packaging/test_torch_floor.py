"""Errors that appear only in a build with PyTorch 2.11, the oldest supported version."""

from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted(path for path in CSRC.glob("**/*") if path.suffix in (".h", ".cpp"))
NEWER = ("STABLE_TORCH_ERROR_CODE_CHECK",)  # TORCH_TARGET_VERSION hides newer functions, but not this macro


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_no_newer_macro(source):
    assert not [name for name in NEWER if name in source.read_text()]
