"""The command line and the adapters for vLLM, tested without vLLM."""

import dataclasses
import json
import os
import shutil
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from serve.fleet import save_adapters
from support.inside import Budget, PromptFormat, ServeArguments, command as vllm
from train.tiny import UNTIED, save_tiny

from s2ft.cli.main import main


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    save_tiny(work / "model", **UNTIED)
    save_adapters(work / "adapters", 2, **UNTIED)
    return work


@pytest.fixture
def launched(monkeypatch):
    """The command line and the variables that replace this process."""
    found = {}
    monkeypatch.setattr("s2ft.packages.is_installed", lambda package: True)
    monkeypatch.setattr(vllm, "check_plugin", lambda: None)
    monkeypatch.setattr(os, "execv", lambda _, line: found.update(line=line, environment=dict(os.environ)))
    monkeypatch.setattr(os, "environ", {**os.environ, "S2FT_API_KEY": "key"})
    return found


def serve(work, *words, adapters="adapters"):
    return main(
        ["serve", "--model", str(work / "model"), "--adapters", str(work / adapters), "--engine", "vllm", *words]
    )


def served(name, folder="f", prompt=None, **ranks):
    """An adapter that trains so many rows or columns of modules of layer 0."""
    found = {f"model.layers.0.{path}": n for path, n in ranks.items()}
    dims = {path: int(path.endswith(("o_proj", "down_proj"))) for path in found}
    return vllm.Served(name, folder, found, dims, prompt)


def value(line, option):
    return line[line.index(option) + 1]


def test_options_that_follow_from_the_adapters():
    adapters = [served("a", o_proj=1), served("b", down_proj=33, o_proj=2), served("c", q_proj=8)]
    assert vllm.sized(adapters, slices=False) == {
        "--enable-lora": [],
        "--max-loras": ["3"],
        "--max-cpu-loras": ["6"],
        "--max-lora-rank": ["64"],
        "--lora-target-modules": ["down_proj", "o_proj", "q_proj"],
    }
    many = vllm.sized([served(f"a{i}", o_proj=1) for i in range(100)], slices=False)
    assert (many["--max-loras"], many["--max-cpu-loras"], many["--max-lora-rank"]) == (["8"], ["72"], ["1"])
    wide = [served("a", down_proj=1000)]
    assert vllm.sized(wide, slices=True)["--max-lora-rank"] == ["1"]
    with pytest.raises(ValueError, match="use --slices"):
        vllm.sized(wide, slices=False)


def test_every_adapter_fits_into_the_units_of_slices():
    text = vllm.units_for([served("a", down_proj=10, q_proj=4), served("b", down_proj=30), served("c", o_proj=2)])
    assert text == "down_proj:inputs=30,o_proj:inputs=2,q_proj:outputs=4"
    assert Budget.parse(text).units("down_proj", {"down_proj": (100, 100)}, 1, True, 1) == 30
    assert Budget.parse(text).units("qkv_proj", dict.fromkeys(("q_proj", "k_proj"), (64, 64)), 0, True, 1) == 4


def launch(adapters, sources=(), key=None, options=(), template=None, **job):
    job = ServeArguments(model="m", adapters=[str(one) for one in sources], **job)
    return vllm.launch(job, adapters, "m", "base", key, options, template)


def test_the_command_line_and_the_variables(tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", raising=False)
    monkeypatch.setattr(vllm, "find_distribution", lambda package: "0.32.0")
    adapters = [served("a", "x", o_proj=1), served("b", "lr=2,y", o_proj=2)]
    job = dict(slices=True, slice_units="9", load_in_4bit=True, revision="v2")
    line, environment = launch(adapters, [tmp_path], "key", template=tmp_path / "t", **job)
    assert line[:5] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "m"] and "key" not in line
    assert line[-3:] == ["--lora-modules", '{"name": "a", "path": "x"}', '{"name": "b", "path": "lr=2,y"}']
    assert value(line, "--quantization") == "bitsandbytes" and value(line, "--revision") == "v2"
    assert value(line, "--chat-template") == str(tmp_path / "t") and "--trust-remote-code" not in line
    assert environment == {
        "VLLM_API_KEY": "key",
        "S2FT_VLLM_ADAPTERS": str(tmp_path),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "S2FT_VLLM_SLICES": "1",
        "S2FT_VLLM_UNITS": "9",
    }
    several = launch(adapters, [tmp_path], options=("--data-parallel-size", "2"))[1]
    assert several["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0"
    line, environment = launch(adapters, options=("--max_loras=2", "--tensor-parallel-size", "2"))
    assert (
        not {"--max-loras", "--max-cpu-loras"} & set(line)
        and value(line, "--tensor-parallel-size") == "2"
        and "--max_loras=2" in line
    )
    assert environment == {}  # single adapters open no directory
    monkeypatch.setenv("VLLM_PLUGINS", "other")  # of which vLLM would load no more
    assert launch(adapters)[1] == {"VLLM_PLUGINS": "other,s2ft"}


def test_vllm_replaces_the_process(work, launched):
    assert serve(work, "--port", "1234", "--dtype", "fp32", "--", "--max-model-len", "64") == 0
    line, environment = launched["line"], launched["environment"]
    assert line[2:4] == ["vllm.entrypoints.openai.api_server", "--model"]  # without a package vllm
    assert line[4] == str(work / "model") and value(line, "--port") == "1234" and value(line, "--dtype") == "float32"
    assert value(line, "--served-model-name") == "model" and value(line, "--max-model-len") == "64"
    assert [json.loads(one)["path"] for one in line[-2:]] == [str(work / "adapters" / name) for name in ("a0", "a1")]
    assert environment["VLLM_API_KEY"] == "key" and environment["S2FT_VLLM_ADAPTERS"] == str(work / "adapters")
    assert int(value(line, "--max-lora-rank")) >= 8
    assert serve(work, "--port", "0") == 0 and 0 < int(value(launched["line"], "--port")) < 1 << 16


@pytest.mark.parametrize(
    "words,text",
    (
        (["--timeout", "5"], "--timeout is for --engine transformers; for vLLM: vLLM has no such limit"),
        (["--max-batch-size=16"], "--max-batch-size is for --engine transformers; for vLLM: -- --max-num-seqs N"),
        (["--load-in-8bit"], "--load-in-8bit is for --engine transformers"),
        (["--slice-units", "3"], "give both"),
        (["--slices", "--slice-units", "x"], "S2FT_VLLM_UNITS has 'x': give a number of units for every layer"),
        (["--", "--host", "h"], "--host can't be passed on to vLLM: use --host of s2ft serve"),
        (["--", "--lora_modules", "a=b"], "use --adapters NAME=DIR"),
        (["--engine", "transformers", "--slices"], "for --engine vllm"),
        (["--engine", "transformers", "--", "--seed", "1"], "give --engine vllm"),
    ),
)
def test_options_without_meaning_are_refused(work, launched, words, text, capsys):
    assert serve(work, *words) == 2 and text in capsys.readouterr().err and not launched


def test_adapters_that_cannot_be_served_are_left_out(work, tmp_path, caplog):
    shutil.copytree(work / "adapters", tmp_path / "adapters")
    (tmp_path / "adapters" / "a0" / "s2ft_adapter.safetensors").write_bytes(b"{}")
    save_adapters(tmp_path / "others", 1, first=7, intermediate_size=80, **UNTIED)
    shutil.move(tmp_path / "others" / "a7", tmp_path / "adapters" / "a7")
    assert [one.name for one in vllm.adapters_of(str(work / "model"), [str(tmp_path / "adapters")])] == ["a1"]
    assert "not served: a0" in caplog.text and "not served: a7" in caplog.text
    shutil.rmtree(tmp_path / "adapters" / "a1")
    save_tiny(tmp_path / "other", seed=5, **UNTIED)
    (tmp_path / "empty").mkdir()
    for model, folder, word in (
        (work / "model", tmp_path / "adapters", "none of the 2"),
        (tmp_path / "other", work / "adapters/a1", "another base"),
        (work / "model", tmp_path / "empty", "no adapters"),
        (work / "model", f"x={tmp_path / 'adapters' / 'a0'}", "adapter 'x' can't be served"),
    ):
        with pytest.raises(ValueError, match=word):
            vllm.adapters_of(str(model), [str(folder)])


def test_a_base_that_cannot_be_built_and_an_adapter_that_does_not_record_its_modules(work, monkeypatch):
    expected = {one.name: one.ranks for one in vllm.adapters_of(str(work / "model"), [str(work / "adapters")])}
    monkeypatch.setattr(vllm, "hollow_model", Mock(side_effect=ValueError("the model has code of its own")))
    found = vllm.adapters_of(str(work / "model"), [str(work / "adapters"), str(work / "adapters" / "a0")])
    assert {one.name: one.ranks for one in found} == expected  # the same folder twice is one adapter
    with pytest.raises(ValueError, match="'a0' has the name of the base"):
        vllm.adapters_of(str(work / "model"), [str(work / "adapters")], reserved=["a0"])
    read = vllm.native.read_without_values
    monkeypatch.setattr(
        vllm.native, "read_without_values", lambda folder: dataclasses.replace(read(folder), structure=None)
    )
    with pytest.raises(ValueError, match="'a0' can't be served: it does not record where its slices lie"):
        vllm.adapters_of(str(work / "model"), [str(work / "adapters" / "a0")])


def test_why_vllm_cannot_run_the_plugin(monkeypatch):
    monkeypatch.setattr(vllm, "entry_points", lambda group: [])
    with pytest.raises(ValueError, match="pip install it"):
        vllm.check_plugin()
    monkeypatch.setattr(vllm, "entry_points", lambda group: [SimpleNamespace(value="s2ft.vllm:register")])
    monkeypatch.setattr(vllm, "find_distribution", lambda package: "0.1")
    monkeypatch.setattr(vllm, "NEEDED", (("json", "no_such_name"),))
    with pytest.raises(ValueError, match="has no json.no_such_name, which s2ft needs"):
        vllm.check_plugin()
    monkeypatch.setattr(vllm, "find_distribution", lambda package: f"{vllm.TESTED[0]}+cpu")
    vllm.check_plugin()


def test_a_gguf_file_is_unpacked(work, tmp_path, monkeypatch):
    from support.inside import load_model

    model = load_model(str(work / "model"))
    monkeypatch.setattr(vllm, "load_model", lambda name, dtype: model)
    assert vllm.unpacked("some/model.gguf", "auto", tmp_path / "base") == str(tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["model_type"] == "llama"
    assert vllm.unpacked(str(work / "model"), "auto", tmp_path / "b") == str(work / "model")


def test_vllm_gets_the_chat_template_that_all_adapters_were_trained_with(tmp_path, caplog):
    prompt, other = PromptFormat("chat", "{{ messages }}", "Be brief."), PromptFormat("chat", "{{ messages }}")
    same = [served(name, prompt=prompt, o_proj=1) for name in "ab"]
    file = vllm.write_template(same, tmp_path)
    assert file.read_text().endswith("{{ messages }}") and "Be brief." in file.read_text() and not caplog.text
    assert vllm.write_template([*same, served("c", prompt=other, o_proj=1)], tmp_path) is None
    assert "trained with different prompts" in caplog.text
    assert vllm.write_template([served("c", o_proj=1)], tmp_path) is None
