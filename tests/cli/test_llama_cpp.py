"""GGUF by llama.cpp's tools, which are found or named by an option; without them s2ft writes what it can.

The tools are stand-ins: scripts that copy a file which our own writer has made.
"""

import re
import sys
from pathlib import Path

import pytest
from cli.test_export import base_of, make_adapter

from s2ft.cli.main import main
from s2ft.export import gguf
from s2ft.export.gguf_writer import write
from s2ft.export.llama_cpp import VARIABLE, find_tools
from s2ft.text.models import load_model

CONVERTER = """
import shutil, sys
source, file, kind = sys.argv[1], sys.argv[3], sys.argv[5]
assert kind == "f32", kind
open(source + "/config.json"), open(source + "/tokenizer.json")
if {fails}:
    print("a line")
    sys.exit("NotImplementedError: BPE pre-tokenizer was not recognized")
shutil.copy("{copied}", file)
"""
QUANTIZER = """#!{python}
import shutil, sys
source, file, kind = sys.argv[1:]
assert kind == "Q4_K_M" and open(source, "rb").read(4) == b"GGUF", kind
shutil.copy("{copied}", file)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    base_of(work / "model", "qwen2", "qwen2")
    make_adapter(work / "model", work / "adapter")
    for kind in ("F32", "Q4_1"):
        gguf.export(str(work / "model"), work / "adapter", work / kind, quantization=kind, writer="s2ft")
    (work / "base").mkdir()
    write(*load_model(str(work / "model")), work / "base/model.gguf")
    return work


@pytest.fixture(autouse=True)
def no_other_tools(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def tools_in(folder: Path, work: Path, fails: bool = False, converted: str = "F32") -> Path:
    """Make the stand-ins. `converted` is the folder of the file that the converter copies."""
    (folder / "build/bin").mkdir(parents=True)
    script = CONVERTER.format(fails=fails, copied=work / converted / "model.gguf")
    (folder / "convert_hf_to_gguf.py").write_text(script)
    program = folder / "build/bin/llama-quantize"
    program.write_text(QUANTIZER.format(python=sys.executable, copied=work / "Q4_1/model.gguf"))
    program.chmod(0o755)
    return folder


def export(work, tmp_path, *options):
    words = ["export", work / "adapter", "--model", work / "model", "--format", "gguf", "--output", tmp_path / "out"]
    return main([str(word) for word in (*words, *options)])


def test_tools_are_found_by_the_option_the_variable_and_the_path(work, tmp_path, monkeypatch):
    assert find_tools() == find_tools(None) and find_tools().converter is None
    folder = tools_in(tmp_path / "llama.cpp", work)
    named = find_tools(folder)
    assert named.converter.parent == folder and named.quantizer == folder / "build/bin/llama-quantize"
    monkeypatch.setenv("PATH", str(folder / "build/bin"))
    assert find_tools().quantizer == named.quantizer and find_tools().converter is None
    monkeypatch.setenv(VARIABLE, str(folder))
    assert find_tools() == named
    with pytest.raises(FileNotFoundError, match="has neither convert_hf_to_gguf.py nor llama-quantize"):
        find_tools(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match=f"{VARIABLE}=.*gone is no folder"):
        find_tools()


def test_the_converter_and_the_quantizer_are_used_and_compared(work, tmp_path, capsys):
    folder = tools_in(tmp_path / "llama.cpp", work)
    assert export(work, tmp_path, "--llama-cpp", folder, "--quantization", "q4_k_m") == 0
    printed = capsys.readouterr().out
    assert "Q4_K_M, written by llama.cpp's convert_hf_to_gguf.py and llama.cpp's llama-quantize" in printed
    assert "weights differ by" in printed
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.gguf"]


def test_a_converter_that_refuses_is_replaced_by_our_writer_unless_it_was_asked_for(work, tmp_path, capsys, caplog):
    folder = tools_in(tmp_path / "llama.cpp", work, fails=True)
    assert export(work, tmp_path, "--llama-cpp", folder, "--writer", "llama.cpp") == 2
    assert "failed with status 1: NotImplementedError: BPE pre-tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert export(work, tmp_path, "--llama-cpp", folder) == 0
    assert "F32, written by s2ft" in capsys.readouterr().out and "s2ft writes the file instead" in caplog.text


def test_a_converter_that_writes_another_model_is_found_out(work, tmp_path):
    folder = tools_in(tmp_path / "llama.cpp", work, converted="base")
    with pytest.raises(RuntimeError, match="is not the merged model: model.layers.0.mlp.down_proj.weight"):
        gguf.export(str(work / "model"), work / "adapter", tmp_path / "out", llama_cpp=str(folder))


@pytest.mark.parametrize("kind", ("q8_0", "q4_0", "f16"))
def test_our_writer_quantizes_without_llama_cpp(kind, work, tmp_path, capsys):
    assert export(work, tmp_path, "--quantization", kind) == 0
    assert f"{kind.upper()}, written by s2ft" in capsys.readouterr().out
    again, _ = load_model(str(tmp_path / "out"), "float32")
    assert again.config.model_type == "qwen2"


@pytest.mark.parametrize(
    "options,message",
    (
        (["--quantization", "q4_k_m"], "needs llama.cpp's llama-quantize.*--writer s2ft has f32, f16, bf16, q8_0"),
        (["--quantization", "q4_k_n"], "got 'q4_k_n'; did you mean q4_k_"),
        (["--writer", "llama.cpp"], "convert_hf_to_gguf.py is not on the PATH"),
        (["--llama-cpp", "nowhere"], "llama_cpp nowhere is no folder"),
        (["--num-ctx", "8"], "--num-ctx is for ollama, not for gguf"),
    ),
)
def test_mistakes_write_nothing(options, message, work, tmp_path, capsys):
    assert export(work, tmp_path, *options) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
    assert not (tmp_path / "out").exists()


def test_a_base_in_a_gguf_file_is_for_our_writer(work, tmp_path, capsys):
    assert export(work, tmp_path) == 0
    first = tmp_path / "out/model.gguf"
    make_adapter(first, tmp_path / "adapter")
    folder = tools_in(tmp_path / "llama.cpp", work)
    words = ["export", tmp_path / "adapter", "--model", first, "--format", "gguf", "--output", tmp_path / "second"]
    words += ["--llama-cpp", folder]
    assert main([str(word) for word in (*words, "--writer", "llama.cpp")]) == 2
    assert "whose metadata only the writer s2ft keeps" in capsys.readouterr().err
    assert main([str(word) for word in words]) == 0
    assert "written by s2ft" in capsys.readouterr().out
