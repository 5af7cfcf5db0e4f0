"""The sender against an engine without vLLM: what it sends, what it restores, and what happens after a failure."""

import copy
import os
import threading

import pytest
import torch
from support.checkpoint_engine import CheckpointEngine, app_of, serving
from support.inside import EngineError, SliceSender, choose_port
from support.models import ALL_RATIOS, model_of, ratios_for, train
from support.states import randomize, same, tensors_of
from sync.test_slices import in_form, merged as merged_of

CASE = "llama-grouped"


@pytest.fixture
def base(tmp_path):
    model_of(CASE).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained_model(form="permuted", dtype=torch.float32):
    return in_form(model_of(CASE, dtype), form, **ratios_for(CASE, ALL_RATIOS))


def merged(model, folder, dtype=torch.float32):
    """The tensors of the merged checkpoint of a copy, in a dtype."""
    merged_of(copy.deepcopy(model)).save_pretrained(folder)
    return {name: tensor.to(dtype) for name, tensor in tensors_of(folder).items()}


@pytest.mark.parametrize("form", ("permuted", "indexed", "peft"))
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")])
def test_after_each_of_several_syncs_the_engine_has_the_merged_weights(form, dtypes, base, tmp_path):
    trained, served = (getattr(torch, name) for name in dtypes)
    model = trained_model(form, trained)
    engine = CheckpointEngine(base, served)
    before = copy.deepcopy(engine.weights)
    with SliceSender(model, engine, dtype=served) as sender:
        for step in range(3):
            sent = sender.sync()
            assert sent.step == step and sent.nbytes == engine.bytes[-1] == sender.slices.nbytes
            assert same(engine.weights, merged(model, tmp_path / f"{step}", served))
            randomize(model, step)
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert sent.nbytes <= 1.05 * count * served.itemsize
    assert same(engine.weights, before) and engine.receiver.sender is None


def test_a_server_gets_the_numbers_and_after_a_failure_it_has_its_base(base, tmp_path):
    model, engine = trained_model(), CheckpointEngine(base)
    with serving(app_of(engine)) as url:
        with SliceSender(model, url, timeout=30) as sender:
            for step in range(2):
                train(model, steps=1)
                assert sender.sync().step == step and same(engine.weights, merged(model, tmp_path / f"{step}"))
            update = ["start", "update", "finish", "reset", "resume"]
            assert engine.calls == [
                "pause keep", "init", *update, "pause keep", *update
            ]  # fmt: skip
            engine.fails = "no room for numbers"
            with pytest.raises(EngineError, match="sync 2 failed: .*no room for numbers.*has its base again"):
                sender.sync()
            assert same(engine.weights, tensors_of(base)) and not engine.paused and engine.receiver.sender is None
            engine.fails = ""
            assert sender.sync().step == 0 and engine.receiver.sender == sender.name
        assert engine.receiver.sender is None and not engine.paused
    assert same(engine.weights, tensors_of(base))


def test_an_engine_of_another_base_is_refused_and_generates_on(base):
    model, engine = trained_model(), CheckpointEngine(base)
    engine.weights["model.layers.1.mlp.down_proj.weight"] += 1
    before = copy.deepcopy(engine.weights)
    with (
        serving(app_of(engine)) as url,
        pytest.raises(EngineError, match="slices differ, the first is model.layers.1.mlp.down_proj.weight"),
    ):
        SliceSender(model, url).sync()
    assert same(engine.weights, before) and not engine.paused


def test_two_trainers_and_one_that_has_died(base, tmp_path):
    model, engine = trained_model(), CheckpointEngine(base)
    with serving(app_of(engine)) as url:
        first = SliceSender(model, url)
        randomize(model)
        first.sync()
        with pytest.raises(EngineError, match="is refused"):
            SliceSender(model, url).sync()
        assert same(engine.weights, merged(model, tmp_path / "merged"))
        SliceSender(model, url, name=first.name).sync()  # it continues after a restart
        engine.updating = True  # the first one died in the middle of an update
        other = randomize(trained_model("indexed"), 7)
        with SliceSender(other, url, take_over=True) as second:
            second.sync()
            assert same(engine.weights, merged(other, tmp_path / "other"))
        assert same(engine.weights, tensors_of(base))


def test_a_server_that_does_not_answer_as_it_must_says_what_to_do(base):
    engine, given_up = CheckpointEngine(base), threading.Event()
    engine.start_weight_update = lambda: given_up.wait(30)
    with serving(app_of(CheckpointEngine(base), has_dev_mode=False)) as closed, serving(app_of(engine)) as slow:
        for url, word in (
            (closed, "VLLM_SERVER_DEV_MODE=1.*weight-transfer-config"),
            ("http://127.0.0.1:9", "can't be reached"),
            (slow, "did not answer start_weight_update within 0.5 s"),
        ):
            with pytest.raises(EngineError, match=word):
                SliceSender(trained_model(), url, timeout=0.5 if url == slow else 30).sync()
        given_up.set()


@pytest.mark.parametrize(("engine", "error"), [("localhost:8000", ValueError), (3, TypeError)])
def test_what_is_no_engine_is_refused(engine, error):
    with pytest.raises(error, match="engine must be"):
        SliceSender(None, engine)


@pytest.mark.parametrize(
    ("environment", "chosen"),
    [({}, True), ({"MASTER_PORT": "0"}, True), ({"MASTER_PORT": "4321"}, False), ({"WORLD_SIZE": "2"}, False)],
)
def test_runs_that_start_together_have_ports_of_their_own(environment, chosen, monkeypatch):
    for name in ("MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", environment.get("MASTER_PORT", ""))  # and restored afterwards
    choose_port()
    port = os.environ["MASTER_PORT"]
    assert (port != environment.get("MASTER_PORT", "")) == chosen and (not chosen or int(port) > 1024)
