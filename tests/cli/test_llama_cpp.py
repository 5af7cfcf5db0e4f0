"""GGUF by llama.cpp's tools, which are found or named by an option, and the Modelfile of Ollama.

The tools are stand-ins: a converter of the tiny model, and a quantizer that copies a file.
"""

import contextlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from cli.test_export import make_adapter
from support import convert_hf_to_gguf
from support.commands import s2ft_command
from support.inside import VARIABLE, PromptFormat, find_tools, gguf, load_model, modelfile
from train.tiny import base_of
from transformers import AutoModelForCausalLM

import s2ft

QUANTIZER = """#!{python}
import shutil, sys
source, file, kind = sys.argv[1:]
assert kind == "Q4_K_M" and open(source, "rb").read(4) == b"GGUF", kind
shutil.copy("{copied}", file)
"""


@pytest.fixture(scope="module")
def work(work):
    """A base and an adapter, the folder llama.cpp with the stand-ins, and two further files: the base and a q8_0."""
    base_of(work / "model")
    make_adapter(work / "model", work / "adapter", prompt={"form": "chat", "template": "{{ 1 }}", "system": "Be."})
    folder = work / "llama.cpp"
    (folder / "build/bin").mkdir(parents=True)
    shutil.copy(convert_hf_to_gguf.__file__, folder)
    model, tokenizer = load_model(str(work / "model"))
    s2ft.load_adapter(model, work / "adapter")
    s2ft.merge(model).save_pretrained(work / "merged"), tokenizer.save_pretrained(work / "merged")
    convert_hf_to_gguf.convert(work / "merged", work / "q8.gguf", "q8_0")
    convert_hf_to_gguf.convert(work / "model", work / "base.gguf")
    program = folder / "build/bin/llama-quantize"
    program.write_text(QUANTIZER.format(python=sys.executable, copied=work / "q8.gguf"))
    program.chmod(0o755)
    return work


@pytest.fixture(autouse=True)
def no_other_tools(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def export(work, tmp_path, *options, base="model", form="gguf"):
    return s2ft_command(
        "export", work / "adapter", "--model", work / base, "--format", form, "--output", tmp_path / "out", *options
    )


def test_tools_are_found_by_the_option_the_variable_and_the_path(work, tmp_path, monkeypatch):
    folder = work / "llama.cpp"
    named = find_tools(folder)
    assert [Path(tool).parent for tool in named] == [folder, folder / "build/bin"]
    monkeypatch.setenv("PATH", str(folder / "build/bin"))
    assert find_tools() == (None, named[1])
    for place, words in ((folder, None), (tmp_path, "neither"), (tmp_path / "gone", f"{VARIABLE}=.*gone")):
        monkeypatch.setenv(VARIABLE, str(place))
        with pytest.raises(FileNotFoundError, match=words) if words else contextlib.nullcontext():
            assert find_tools() == named


@pytest.mark.parametrize("base", ("model", pytest.param("base.gguf", marks=pytest.mark.slow)))
def test_the_converter_writes_the_merged_model(base, work, tmp_path, capsys):
    assert export(work, tmp_path, "--llama-cpp", work / "llama.cpp", base=base) == 0
    assert "F32, written by llama.cpp's convert_hf_to_gguf.py, 20 tensors read again" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.gguf"]
    again, tokenizer = load_model(str(tmp_path / "out"))
    merged = AutoModelForCausalLM.from_pretrained(work / "merged").state_dict()
    assert all(torch.equal(weight, merged[key]) for key, weight in again.state_dict().items())
    assert tokenizer.chat_template.endswith("{{ 1 }}")  # of the training


@pytest.mark.slow
def test_the_quantizer_is_used(work, tmp_path, capsys):
    assert export(work, tmp_path, "--llama-cpp", work / "llama.cpp", "--quantization", "q4_k_m") == 0
    assert "Q4_K_M, written by llama.cpp's convert_hf_to_gguf.py and llama-quantize" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    "script,error,word",
    (
        (
            "import sys; data = open('{base}', 'rb').read(); open(sys.argv[3], 'wb').write(data[:-4] + b'\\xff' * 4)",
            RuntimeError,
            "has NaN",
        ),
        ("import sys; print('a line'); sys.exit('Unknown: BPE pre-tokenizer')", ValueError, "status 1: Unknown: BPE"),
    ),
)
def test_a_converter_that_errs_is_found_out_and_nothing_is_left(script, error, word, work, tmp_path):
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(script.format(base=work / "base.gguf"))
    with pytest.raises(error, match=word):
        gguf.export(str(work / "model"), work / "adapter", tmp_path / "out", llama_cpp=str(folder))
    assert [file.name for file in tmp_path.iterdir()] == ["llama.cpp"]


@pytest.mark.parametrize(
    "options,word",
    (
        ([], "needs llama.cpp's convert_hf_to_gguf.py, .*--llama-cpp DIR.*--format ollama"),
        (["--quantization", "q4_k_m", "--llama-cpp", "CONVERTER"], "llama-quantize.*without it there are f32"),
    ),
)
def test_mistakes_write_nothing(options, word, work, tmp_path, capsys):
    folder = tmp_path / "converter"
    folder.mkdir(), shutil.copy(work / "llama.cpp/convert_hf_to_gguf.py", folder)
    assert export(work, tmp_path, *(folder if option == "CONVERTER" else option for option in options)) == 2
    printed = capsys.readouterr().err
    assert re.search(word, printed), printed
    assert not (tmp_path / "out").exists()


# ---- Ollama --------------------------------------------------------------------------------------------


def test_ollama_gets_the_merged_checkpoint_with_the_template_where_it_reads_it(work, tmp_path, capsys):
    assert export(work, tmp_path, "--num-ctx", 128, form="ollama") == 0
    out = tmp_path / "out"
    assert f"ollama create out -f {out}/Modelfile" in capsys.readouterr().out
    assert (out / "Modelfile").read_text().splitlines() == [
        "FROM .",
        'SYSTEM """Be."""',
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER num_ctx 128",
    ]
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"].endswith("{{ 1 }}")
    assert not (out / "chat_template.jinja").exists()
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile(256, [], PromptFormat("text"))  # plain text has no turns
    with pytest.raises(ValueError, match="system prompt"):
        modelfile(256, [], PromptFormat(system='"""'))
    found, merged = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (out, work / "merged"))
    assert all(torch.equal(weight, merged[key]) for key, weight in found.items())


def test_a_file_that_is_merged_has_a_modelfile_beside_it(work, tmp_path, capsys, caplog):
    base, adapter = work / "q8.gguf", tmp_path / "adapter"
    make_adapter(base, adapter, prompt={"form": "chat", "template": "{{ 1 }}", "system": "Be."})
    assert s2ft_command("merge", "--model", base, "--adapter", adapter, "--output", tmp_path / "tuned.gguf") == 0
    assert f"ollama create tuned -f {tmp_path / 'tuned.Modelfile'}" in capsys.readouterr().out
    assert (tmp_path / "tuned.Modelfile").read_text() == 'FROM ./tuned.gguf\nSYSTEM """Be."""\n'
    chat = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    for number in (1, 2):  # the second one replaces the template of the first
        shutil.rmtree(adapter)
        make_adapter(base, adapter, prompt={"form": "chat", "template": f"{chat}{{# {number} #}}", "system": "Be."})
        tuned = ("--output", tmp_path / f"turn{number}.gguf")
        assert s2ft_command("merge", "--model", base, "--adapter", adapter, *tuned) == 0
        turn = "[system] {{ .System }}<|im_end|>[user] {{ .Prompt }}<|im_end|>{{ .Response }}<|im_end|>"
        assert f'TEMPLATE """{turn}"""\nSYSTEM """Be."""' in (tmp_path / f"turn{number}.Modelfile").read_text()
        caplog.clear()
        assert s2ft_command("patch", shutil.copy(base, tmp_path / f"patched{number}.gguf"), adapter) == 0
        assert "is not the one that the adapter was trained with" in caplog.text
        base = tmp_path / f"turn{number}.gguf"
        assert load_model(str(base))[1].chat_template.endswith(f"{chat}{{# {number} #}}")
    again = ("merge", "--model", base, "--adapter", adapter, "--output")
    (tmp_path / "other.Modelfile").write_text("mine")
    assert s2ft_command(*again, tmp_path / "other.gguf") == 2 and not (tmp_path / "other.gguf").exists()
    shutil.rmtree(adapter)
    make_adapter(base, adapter, prompt={"form": "chat", "template": "{{ 1 }}", "system": '"""'})
    assert s2ft_command(*again, tmp_path / "third.gguf") == 2 and not (tmp_path / "third.gguf").exists()
