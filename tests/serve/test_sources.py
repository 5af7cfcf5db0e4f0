"""Where adapters come from, which of them are served, and what the log says of the others."""

import shutil
from dataclasses import replace

import httpx
import pytest
from serve.fleet import BASE, running, save_adapters
from serve.test_api import damaged
from support.inside import native, source_of
from train.tiny import UNTIED, save_random_adapter, save_tiny, tiny_model

import s2ft
from s2ft.cli.main import main


@pytest.fixture(scope="module")
def spare(tmp_path_factory):
    """Adapters a0 and a1 of the base, and a0 of another base in foreign/."""
    folder = save_adapters(tmp_path_factory.mktemp("spare"), 2, **UNTIED)
    save_adapters(folder / "foreign", 1, seed=5, **UNTIED)
    return folder


def make_run(spare, folder, name="a0"):
    """The output folder of a run: an adapter, a checkpoint, the options."""
    shutil.copytree(spare / name, folder / "adapter")
    shutil.copytree(spare / name, folder / "checkpoint-4")
    (folder / "checkpoint-4" / "trainer_state.json").touch()
    (folder / "config.yaml").touch()
    return folder


def served(url):
    return [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]


def complete(url, name):
    return httpx.post(f"{url}/v1/completions", json=dict(model=name, prompt="a", max_tokens=2))


def test_runs_adapters_and_directories_are_served_under_their_names(spare, tmp_path):
    runs = tmp_path / "runs"
    make_run(spare, runs / "math"), make_run(spare, runs / "chat", "a1")
    shutil.copytree(spare / "a1", tmp_path / "plain")
    sources = [
        runs,
        make_run(spare, tmp_path / "single"),
        tmp_path / "plain",
        f"seventh={make_run(spare, tmp_path / 'old-7')}",
        make_run(spare, tmp_path / "inner") / "adapter",
    ]
    with running(sources, tiny_model(**UNTIED)) as (url, _):
        assert served(url) == [BASE, "chat", "inner", "math", "plain", "seventh", "single"]
        assert [complete(url, name).status_code for name in ("math", "seventh", "inner")] == [200] * 3
        assert complete(url, "checkpoint-4").status_code == 404
        answer = httpx.post(f"{url}/v1/load_lora_adapter", json=dict(lora_name="old", lora_path="math/checkpoint-4"))
        assert answer.status_code == 400 and "checkpoint" in answer.json()["error"]["message"]


def test_an_adapter_that_can_not_be_served_is_left_out_and_named(spare, tmp_path, caplog):
    for name in ("good", "torn"):
        shutil.copytree(spare / "a0", tmp_path / name)
    for name in ("foreign", "foreign-2"):
        shutil.copytree(spare / "foreign" / "a0", tmp_path / name)
    tensors = tmp_path / "torn" / "s2ft_adapter.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with caplog.at_level("INFO"), running(tmp_path, tiny_model(**UNTIED)) as (url, _):
        lines = [record.getMessage() for record in caplog.records]
        assert "serving 1 adapter: good" in lines
        base = "it was trained on another base: 2 of 2 layers differ, the first is layer 0"
        assert f"warning: not served: foreign, foreign-2: {base}" in lines
        assert any(line.startswith("warning: not served: torn: ") and "truncated" in line for line in lines)
        assert served(url) == [BASE, "good"]
        refused = complete(url, "foreign")
        assert refused.status_code == 400 and "another base" in refused.json()["error"]["message"]
        assert "s2ft_adapters_refused 3.0" in httpx.get(f"{url}/metrics").text


def test_a_prompt_that_can_not_be_read_refuses_the_adapter(spare, tmp_path, caplog):
    adapter = s2ft.read_adapter(spare / "a0")
    native.write(replace(adapter, info={"prompt": {"form": "verse"}}), tmp_path / "odd")
    native.write(adapter, tmp_path / "good")
    with running(tmp_path, tiny_model(**UNTIED)) as (url, _):
        assert served(url) == [BASE, "good"]
    assert "not served: odd: the prompt that adapter 'odd' records can't be read: form must be one of" in caplog.text


def test_sources_that_make_no_sense_are_refused(spare, tmp_path):
    run = make_run(spare, tmp_path / "run")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").touch()
    for text, words in (
        ("nowhere", "adapters: nowhere is not a folder"),
        (f"a={tmp_path}/nowhere", "nowhere is not a folder"),
        (f"{run}/checkpoint-4", "is a checkpoint of a training run"),
        (f"a={run}/checkpoint-4", "is a checkpoint of a training run"),
        (f"a={tmp_path}", "it has run in it: give the directory without a="),
        (tmp_path / "lora", "lora can't be served: it is an adapter of PEFT: convert it with s2ft export --from-peft"),
        (f"a={tmp_path}/lora", "it is an adapter of PEFT"),
        (f"a/b={run}", "name must be a word without slashes"),
    ):
        with pytest.raises((ValueError, NotADirectoryError), match=words):
            source_of(str(text))
    shutil.copytree(spare / "foreign" / "a0", tmp_path / "wrong" / "bad")
    for sources, words in (
        ([f"run={run}", f"run={spare / 'a0'}"], "two adapters are called 'run'"),
        ([f"{BASE}={run}"], "has the name of the base"),
        ([tmp_path / "wrong"], "1 of 1 adapters can't be served; adapter 'bad'"),
        ([run, f"x={tmp_path / 'wrong' / 'bad'}"], "adapter 'x': it was trained on"),
    ):
        with pytest.raises(ValueError, match=words), running(sources, tiny_model(**UNTIED)):
            pass


def test_the_check_reads_every_adapter_and_does_not_serve(spare, tmp_path, capsys, caplog):
    save_tiny(tmp_path / "model", **UNTIED)
    for name in ("good", "flipped"):
        shutil.copytree(spare / "a0", tmp_path / "adapters" / name)
    command = ["serve", "--model", str(tmp_path / "model"), "--adapters", str(tmp_path / "adapters"), "--check"]
    caplog.set_level("INFO")
    assert main(command) == 0
    assert "serving" not in caplog.text and "checked 2 adapters: flipped, good" in caplog.text
    # without --model the base is the one that an adapter records; these record none
    assert main(["serve", *command[3:]]) == 2 and "does not record which base" in capsys.readouterr().err
    save_random_adapter(
        tmp_path / "own", tiny_model(**UNTIED), info={"base_model": str(tmp_path / "model")}, d_ratio=0.25
    )
    caplog.clear()
    assert main(["serve", "--adapters", str(tmp_path / "own"), "--check"]) == 0 and "checked 1 adapter" in caplog.text
    shutil.rmtree(tmp_path / "adapters" / "flipped")
    damaged(spare, "flipped")
    shutil.move(spare / "flipped", tmp_path / "adapters")
    assert main([*command, "--engine", "vllm"]) == 2  # also where vLLM is not installed
    assert "1 of 2 adapters can't be served" in capsys.readouterr().err and "flipped" in caplog.text
    (tmp_path / "empty").mkdir()
    assert main([*command[:-2], str(tmp_path / "empty"), "--check"]) == 2
    assert f"there is no adapter in {tmp_path / 'empty'}" in capsys.readouterr().err
