"""s2ft.ops._build reports the state of the compiled kernels, and falls back to PyTorch without raising."""

import json
import warnings

import pytest
import torch

import s2ft
from s2ft.ops import _build


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The module _build in the state of its first import, with an empty package folder. Returns (folder, load)."""
    monkeypatch.setattr(_build, "RECORD", tmp_path / "_build.json")
    monkeypatch.setattr(_build, "_module", None)
    monkeypatch.setattr(_build, "_reason", None)
    monkeypatch.setattr(_build, "_cuda_reason", "")
    monkeypatch.setattr(_build, "_silent", False)

    def load():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module = _build.load()
            _build.load()  # a second call must not warn again
        return module, [str(w.message) for w in caught]

    return tmp_path, load


def record(folder, **entries):
    (folder / "_build.json").write_text(json.dumps({"mode": "auto", "compiled": False, "reason": "", **entries}))


def test_the_keys_and_the_version():
    info = s2ft.build_info()
    assert set(info) == {
        "compiled",
        "reason",
        "version",
        "torch",
        "compiler",
        "cuda",
        "archs",
        "cuda_version",
        "cuda_reason",
        "cuda_ops",
        "ops",
    }
    assert info["version"] == s2ft.__version__ and info["torch"] == torch.__version__
    assert {"sliced_linear", "indexed_linear", "swap_", "permute_"} <= set(info["ops"])


def test_compiled_agrees_with_the_dispatcher():
    info = s2ft.build_info()
    assert info["compiled"] is ("CPU" in info["ops"]["sliced_linear"])
    if not torch.cuda.is_initialized():
        assert "CUDA" not in info["ops"]["sliced_linear"] and info["cuda_reason"]
    if info["compiled"]:
        assert info["compiler"] and info["reason"]


def test_a_tree_that_was_not_built_is_silent(fresh):
    folder, load = fresh
    assert load() == (None, [])
    assert "not built" in _build.build_info()["reason"]


def test_a_build_with_none_is_silent(fresh):
    folder, load = fresh
    record(folder, mode="none", reason="S2FT_BUILD=none: installed without compiled kernels")
    assert load() == (None, [])


def test_a_failed_build_warns_once_with_its_reason(fresh):
    folder, load = fresh
    record(folder, reason="no compiler")
    module, messages = load()
    assert module is None and len(messages) == 1 and "no compiler" in messages[0]
    assert _build.build_info()["reason"] == "no compiler"
    assert _build.build_info()["compiled"] is False and _build.build_info()["cuda_reason"] == "no compiler"
    with warnings.catch_warnings():  # the warning at import is not repeated by attach
        warnings.simplefilter("error")
        _build.warn_without_cuda_kernels()


def test_a_module_that_went_missing_warns(fresh):
    folder, load = fresh
    record(folder, compiled=True)
    module, messages = load()
    assert module is None and len(messages) == 1 and "missing" in messages[0]


def test_a_record_that_cannot_be_read_counts_as_missing(fresh):
    folder, load = fresh
    (folder / "_build.json").write_text("not json")
    assert load() == (None, [])


@pytest.mark.parametrize(
    "error", (ImportError("undefined symbol: torch_x"), OSError("no such file"), RuntimeError("x"))
)
def test_a_module_of_another_abi_falls_back_with_the_reason(fresh, monkeypatch, error):
    folder, load = fresh
    record(folder, compiled=True)
    (folder / "_C.so").write_text("")

    def fail():
        raise error

    monkeypatch.setattr(_build, "_import_module", fail)
    module, messages = load()
    assert module is None and len(messages) == 1 and str(error) in messages[0]


def test_an_older_pytorch_falls_back(fresh, monkeypatch):
    folder, load = fresh
    record(folder, compiled=True)
    (folder / "_C.so").write_text("")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    module, messages = load()
    assert module is None and "need PyTorch 2.11 or later" in messages[0]


def test_a_file_that_is_not_a_module_falls_back(run, tmp_path):
    """A process of its own imports a package whose module file has garbage in it."""
    import shutil
    from pathlib import Path

    package = tmp_path / "s2ft"
    shutil.copytree(
        Path(s2ft.__file__).parent, package, ignore=shutil.ignore_patterns("_C.*", "_build.json", "__pycache__")
    )
    import sysconfig

    (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"garbage")
    record(package, compiled=True)
    result = run(["-c", "import s2ft; print(s2ft.build_info()['compiled'])"], PYTHONPATH=tmp_path)
    assert result.stdout.strip() == "False" and "failed to load" in result.stderr
