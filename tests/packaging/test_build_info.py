"""s2ft.ops._build reports the state of the compiled kernels, and falls back to PyTorch without raising."""

import json
import shutil
import sysconfig
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from support.inside import _build

import s2ft


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The module _build in the state of its first import, with an empty package folder. Returns (folder, load)."""
    state = {"RECORD": tmp_path / "_build.json", "_module": None, "_reason": None, "_cuda_reason": "", "_silent": False}
    for name, value in state.items():
        monkeypatch.setattr(_build, name, value)

    def load():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module = _build.load()
            _build.load()  # a second call must not warn again
        return module, [str(w.message) for w in caught]

    return tmp_path, load


def record(folder, found):
    found = found if isinstance(found, str) else json.dumps({"mode": "auto", "compiled": False, "reason": "", **found})
    (folder / "_build.json").write_text(found)


def test_the_keys_the_version_and_what_is_compiled_agree_with_the_dispatcher():
    info = s2ft.build_info()
    keys = "compiled reason version torch compiler cuda archs cuda_version cuda_reason cuda_ops ops untested"
    assert set(info) == set(keys.split())
    assert info["version"] == s2ft.__version__ and info["torch"] == torch.__version__
    assert info["compiled"] is ("CPU" in info["ops"]["write_slices_"])
    if not torch.cuda.is_initialized():
        assert "CUDA" not in info["ops"]["write_slices_"] and info["cuda_reason"]
    if info["compiled"]:
        assert info["compiler"] and info["reason"]


# The record of the build, what its import raises, and words of the one warning: none is silent.
FALLBACKS = {
    "not built": (None, None, ""),
    "not readable": ("not json", None, ""),
    "none was wanted": (dict(mode="none", reason="S2FT_BUILD=none"), None, ""),
    "failed": (dict(reason="no compiler"), None, "no compiler"),
    "missing": (dict(compiled=True), None, "missing"),
    "other ABI": (dict(compiled=True), ImportError("undefined symbol: torch_x"), "undefined symbol: torch_x"),
    "no such file": (dict(compiled=True), OSError("no such file"), "no such file"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_without_a_module_the_import_warns_once_or_is_silent(case, fresh, monkeypatch):
    found, error, words = FALLBACKS[case]
    folder, load = fresh
    if found is not None:
        record(folder, found)
    if error:
        (folder / "_C.so").write_text("")
        monkeypatch.setattr(_build.importlib, "import_module", Mock(side_effect=error))
    module, messages = load()
    assert module is None and len(messages) == bool(words) and all(words in message for message in messages)
    info = _build.build_info()
    assert info["compiled"] is False and words in info["reason"] and (words or "not built" in info["reason"] or found)
    assert case != "failed" or info["cuda_reason"] == words
    if words:
        with warnings.catch_warnings():  # attach does not repeat the warning of the import
            warnings.simplefilter("error")
            _build.warn_without_cuda_kernels()


def test_a_file_that_is_not_a_module_falls_back(run, tmp_path):
    """A process of its own imports a package whose module file has garbage in it."""
    package = tmp_path / "s2ft"
    shutil.copytree(
        Path(s2ft.__file__).parent, package, ignore=shutil.ignore_patterns("_C.*", "_build.json", "__pycache__")
    )
    (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"garbage")
    record(package, {"compiled": True})
    result = run(["-c", "import s2ft; print(s2ft.build_info()['compiled'])"], PYTHONPATH=tmp_path)
    assert result.stdout.strip() == "False" and "failed to load" in result.stderr


# ---- the compiled module: one build for every Python, and a lock that an interrupt cannot leave behind ----


@pytest.mark.skipif(_build.load() is None, reason="no compiled kernels")
def test_what_the_module_offers():
    module = _build.load()
    assert Path(module.__file__).name.split(".")[0] == "_C"
    info = module.build_info()
    assert info["torch_target"] == "2.11" and info["cxx_standard"] >= 202002
    assert hasattr(module, "register_cuda") is hasattr(module, "cuda_versions") is info["with_cuda"]
