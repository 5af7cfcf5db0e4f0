"""Progress is a line for each logged step, of the first rank."""

import re
from types import SimpleNamespace

from support.inside import JsonlLog, read_log


def state(step, zero=True):
    return SimpleNamespace(
        global_step=step, max_steps=3, epoch=step / 2, num_input_tokens_seen=100 * step, is_world_process_zero=zero
    )


def train(bar, zero=True):
    bar.on_train_begin(None, state(0, zero), None)
    for step in (1, 2, 3):
        bar.on_step_end(None, state(step, zero), None)
        bar.on_log(None, state(step, zero), None, {"loss": 1 / step, "learning_rate": 1e-4})
        bar.on_log(None, state(step, zero), None, {"eval_loss": 0.5, "eval_accuracy": 0.25})
        bar.on_evaluate(None, state(step, zero), None, metrics={"eval_runtime": 1e-6})
    bar.on_log(None, state(3, zero), None, {"train_runtime": 1.0})
    bar.on_train_end(None, state(3, zero), None)


def test_each_step_is_a_line(caplog, capfd, tmp_path):
    caplog.set_level("INFO")
    train(JsonlLog(tmp_path / "log.jsonl"))
    line = r"step 2/3, epoch 1\.00, loss 0\.5000, learning rate 1\.00e-04, [\d,]+ tokens/s, 0:00:00 left"
    assert len(caplog.messages) == 6 and re.fullmatch(line, caplog.messages[2])
    assert caplog.messages[3] == "step 2/3: evaluation loss 0.5000, accuracy 25.0%"
    assert not any("\r" in text for text in (caplog.text, *capfd.readouterr()))

    assert [line.get("eval_accuracy") for line in read_log(tmp_path / "log.jsonl")] == [None, 0.25] * 3


def test_only_the_first_rank_prints_and_writes(caplog, tmp_path):
    caplog.set_level("INFO")
    train(JsonlLog(tmp_path / "log.jsonl"), zero=False)
    assert caplog.messages == [] == list(tmp_path.iterdir())
