"""The command line and the adapters for vLLM, tested without vLLM."""

import json
import os
import sys

import pytest
from serve.fleet import save_adapters
from train.tiny import save_tiny

from s2ft.cli.main import main
from s2ft.serve import vllm
from s2ft.text.prompts import PromptFormat

UNTIED = dict(tie_word_embeddings=False)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    save_tiny(work / "model", **UNTIED)
    save_adapters(work / "adapters", 2, **UNTIED)
    return work


def test_the_command_line(tmp_path):
    adapters = [vllm.Exported("a", tmp_path / "a", 8), vllm.Exported("b", tmp_path / "b", 33)]
    assert vllm.command("m", adapters, "127.0.0.1", 8000, "base", "key") == [
        "vllm",
        "serve",
        "m",
        "--served-model-name",
        "base",
        "--enable-lora",
        "--max-lora-rank",
        "64",
        "--host",
        "127.0.0.1",
        "--port",
        "8000",
        "--api-key",
        "key",
        "--lora-modules",
        f"a={tmp_path / 'a'}",
        f"b={tmp_path / 'b'}",
    ]
    assert "--api-key" not in vllm.command("m", adapters, "127.0.0.1", 8000, "base")


def test_adapters_are_exported_as_lora(work, tmp_path):
    exported = vllm.export(str(work / "model"), [str(work / "adapters")], tmp_path)
    assert [one.name for one in exported] == ["a0", "a1"]
    for one in exported:
        config = json.loads((one.folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and config["r"] == one.rank
        assert (one.folder / "adapter_model.safetensors").is_file()


def test_vllm_gets_the_chat_template_that_all_adapters_were_trained_with(work, tmp_path, caplog):
    prompt, other = PromptFormat("chat", "{{ messages }}", "Be brief."), PromptFormat("chat", "{{ messages }}")
    same = [vllm.Exported(name, tmp_path / name, 8, prompt) for name in "ab"]
    file = vllm.write_template(same, tmp_path)
    assert file.read_text().endswith("{{ messages }}") and "Be brief." in file.read_text() and not caplog.text
    assert f"--chat-template {file} --lora-modules" in " ".join(vllm.command("m", same, "h", 1, "base", None, file))
    assert vllm.write_template([*same, vllm.Exported("c", tmp_path, 8, other)], tmp_path) is None
    assert "trained with different prompts" in caplog.text
    assert vllm.write_template(vllm.export(str(work / "model"), [str(work / "adapters")], tmp_path), tmp_path) is None


def test_a_missing_vllm_is_named(work, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    paths = ["--model", str(work / "model"), "--adapters", str(work / "adapters")]
    assert main(["serve", *paths, "--engine", "vllm"]) == 2
    assert "pip install vllm, or --engine transformers" in capsys.readouterr().err


def test_vllm_replaces_the_process(work, monkeypatch):
    lines = []
    monkeypatch.setattr("s2ft.packages.is_installed", lambda package: True)
    monkeypatch.setattr(os, "execvp", lambda program, line: lines.append(line))
    monkeypatch.setenv("S2FT_API_KEY", "key")
    assert (
        main(
            [
                "serve",
                "--model",
                str(work / "model"),
                "--adapters",
                str(work / "adapters"),
                "--engine",
                "vllm",
                "--port",
                "1234",
            ]
        )
        == 0
    )
    (line,) = lines
    assert line[:3] == ["vllm", "serve", str(work / "model")] and line[line.index("--port") + 1] == "1234"
    assert line[line.index("--api-key") + 1] == "key" and line[line.index("--served-model-name") + 1] == "model"


def test_a_folder_without_adapters(work, tmp_path):
    with pytest.raises(ValueError, match="no adapters"):
        vllm.export(str(work / "model"), [str(tmp_path)], tmp_path / "out")
