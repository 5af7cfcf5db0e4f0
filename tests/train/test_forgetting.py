"""The meter of a run: its values equal a direct computation, it changes nothing, and a limit ends the run where it says."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from serve.fleet import greedy
from support.inside import (
    DataOptions,
    Drift,
    ForgettingMeter,
    ForgettingOptions,
    S2FTTrainer,
    answer_rows,
    mean_loss,
    prompt_rows,
    prompts_of,
    read_log,
    read_texts,
    row_of_prompt,
    some,
    text_rows,
)
from support.states import randomize, tensors_of, with_adapter, with_loaded
from text.test_divergence import direct, direct_kl, direct_loss
from train.test_sft import CONFIG, check_same, run as plain_run, token_rows
from train.tiny import tiny_model, tiny_tokenizer, write_jsonl
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import s2ft


def other_rows(count=4):
    """The questions with answers of other tokens, so that their loss rises when the model learns the right answers."""
    rows = []
    for row in token_rows(count):
        asked = row["labels"].count(-100)
        answer = [261 - token for token in row["labels"][asked:-1]]
        rows.append({"input_ids": row["input_ids"][:asked] + answer, "labels": [-100] * asked + answer})
    return rows


PROMPTS = prompt_rows(some(token_rows(), 5))


def run(path, meter=None, **changes):
    """Train as in test_sft, with the arguments of a meter. Returns the meter too."""
    if meter is not None:
        meter = ForgettingMeter(**{"other": other_rows(), "prompts": PROMPTS, "every": 1, **meter})
    return *plain_run(path, meter=meter, **{"save_steps": 1, **changes}), meter


def measured(folder):
    lines = [line for line in read_log(folder.log) if "forgetting" in line]
    return {line["step"]: Drift(line["forgetting"], line["other_loss"], line["base_kl"]) for line in lines}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "whole", meter={})


def adapter_of(folder, step):
    return with_loaded(tiny_model(), folder.path / f"checkpoint-{step}")


def limit_behind(meter, step, value="base_kl"):
    """A limit that the meter's values of the steps up to this one are within, and the next one is not."""
    values = {number: getattr(drift, value) for number, drift in meter.measured.items()}
    before, after = max(values[number] for number in range(1, step + 1)), values[step + 1]
    assert after > before, "the run does not forget steadily: choose another step"
    return (before + after) / 2


def check_values(folder, expected):
    """The saved values are these deltas'."""
    for name, delta in s2ft.read_adapter(folder.adapter).deltas.items():
        assert torch.equal(delta.values, expected[name].values)


def test_each_measurement_equals_a_direct_computation(whole):
    _, folder, result, meter = whole
    base = tiny_model()
    base_loss, base_distributions = direct_loss(base, other_rows()), direct(base, PROMPTS)[0]
    assert sorted(measured(folder)) == sorted(meter.measured) == list(range(1, 9))
    for step, drift in measured(folder).items():
        model = adapter_of(folder, step)
        assert drift.forgetting == pytest.approx(direct_loss(model, other_rows()) - base_loss, abs=2e-5)
        assert drift.other_loss == pytest.approx(direct_loss(model, other_rows()), rel=1e-5)
        assert drift.base_kl == pytest.approx(
            direct_kl(base_distributions, direct(model, PROMPTS)[0]), rel=1e-3, abs=1e-5
        )
    assert result.drift == meter.measured[8] and result.stopped_at is None and result.kept_step is None
    assert result.to_dict()["base_kl"] == result.drift.base_kl > 0


def test_measuring_changes_nothing_in_the_training(whole, tmp_path):
    check_same(run(tmp_path)[1], whole[1])


@pytest.mark.parametrize("name, value, step", (("stop_at_forgetting", "forgetting", 1), ("stop_at_kl", "base_kl", 4)))
def test_a_limit_ends_the_run_where_it_says(whole, tmp_path, caplog, name, value, step):
    caplog.set_level(logging.WARNING)
    limit = limit_behind(whole[3], step, value)
    model, folder, result, meter = run(tmp_path, meter={name: limit})
    assert (result.steps, result.stopped_at, result.kept_step, result.finished) == (step + 1, step + 1, step, True)
    beyond = getattr(whole[3].measured[step + 1], value)
    assert f"step {step + 1}: {value} {beyond:.4g} is above {name} {limit:g}, so the training stops" in caplog.text
    assert f"the values of step {step} are kept" in caplog.text
    assert sorted(measured(folder)) == list(range(1, step + 2))
    assert not (folder.path / f"checkpoint-{step + 1}").exists()
    check_values(folder, s2ft.get_adapter(adapter_of(whole[1], step), "default").deltas)
    assert result.drift == meter.measured[step] and getattr(result.drift, value) <= limit
    assert mean_loss(model, other_rows()) == pytest.approx(result.drift.other_loss, rel=1e-6)


def test_a_run_with_a_limit_is_resumed_exactly(whole, tmp_path):
    """Checkpoints are written at every third step, and the meter measures at every second one."""
    meter = {"every": 2, "stop_at_kl": limit_behind(whole[3], 5)}
    expected = run(tmp_path / "whole", meter=meter, save_steps=3)
    assert (expected[2].stopped_at, expected[2].kept_step) == (6, 4)
    for step in (3, 5):
        path = tmp_path / str(step)
        assert not run(path, meter=meter, save_steps=3, options={"stop_after": step})[2].finished
        resumed = run(path, meter=meter, save_steps=3, resume=True)
        assert resumed[2].stopped_at == 6 and resumed[2].kept_step == max(4, step)
        if step < 5:
            check_same(resumed[1], expected[1])


def test_a_run_that_is_beyond_its_limit_at_once_keeps_its_values_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    model, folder, result, _ = run(tmp_path, meter={"stop_at_kl": 1e-9})
    assert (result.steps, result.kept_step) == (1, 1)
    assert "no measurement was within the limits before, so the values of this step are kept" in caplog.text
    assert any(value.abs().max() > 0 for value in tensors_of(folder.adapter).values())


def test_values_that_are_no_numbers_are_beyond_every_limit(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("s2ft.text.divergence.DriftMeter.measure", lambda *_: Drift(float("nan"), 1.0, 0.0))
    assert run(tmp_path, meter={"stop_at_forgetting": 5})[2].steps == 1
    assert "forgetting nan is above stop_at_forgetting 5" in caplog.text


def test_the_best_checkpoint_is_kept_if_the_run_asks_for_it(whole, tmp_path):
    changes = dict(eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True)
    meter = {"other": None, "stop_at_kl": limit_behind(whole[3], 4)}
    _, folder, result, _ = run(tmp_path, meter=meter, evaluated=3, **changes)
    assert result.stopped_at == 5 and result.best_step == result.kept_step == 4
    check_values(folder, s2ft.read_adapter(folder.path / "checkpoint-4").deltas)


@pytest.mark.parametrize("when", ({"save_strategy": "epoch"}, {"save_strategy": "best", "eval_steps": 4}), ids=str)
def test_no_checkpoint_beyond_a_limit_becomes_the_adapter(whole, tmp_path, when):
    """An epoch has four steps. The meter measures at every third one, and before each checkpoint."""
    changes = dict(eval_strategy="steps" if "eval_steps" in when else "epoch", load_best_model_at_end=True, **when)
    meter = {"other": None, "every": 3, "stop_at_kl": limit_behind(whole[3], 3)}
    result = run(tmp_path, meter=meter, evaluated=3, num_train_epochs=3, max_steps=-1, **changes)[2]
    assert (result.stopped_at, result.kept_step) == (4, 3)


# ---- other trainers ------------------------------------------------------------------------------------

PLAIN = dict(max_steps=4, use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=1e-2, logging_steps=2)


def rows_for_trainer():
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 200, (8, 10)).tolist()]


def trained_by(kind, path):
    """A model, and a Trainer that trains it."""
    if kind == "trl":
        model = with_adapter(tiny_model(), CONFIG)
        arguments = SFTConfig(str(path), max_length=64, **PLAIN)
        return model, SFTTrainer(model, arguments, train_dataset=token_rows(), processing_class=tiny_tokenizer())
    model = tiny_model()
    if kind == "s2ft":
        s2ft.attach(model, CONFIG)
    if kind == "peft":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    arguments = TrainingArguments(str(path), **PLAIN)
    return model, (S2FTTrainer if kind == "s2ft" else Trainer)(model, arguments, train_dataset=rows_for_trainer())


@pytest.mark.parametrize("kind", ("s2ft", "trl", "peft", "full"))
def test_every_trainer_has_the_values_and_stops(kind, tmp_path):
    base = direct(tiny_model(), PROMPTS)[0]
    model, trainer = trained_by(kind, tmp_path / "first")
    meter = ForgettingMeter(other=other_rows(), prompts=PROMPTS, every=1)
    meter.add_to(trainer)
    trainer.train()
    assert sorted(meter.measured) == [1, 2, 3, 4]
    assert meter.measured[4].base_kl == pytest.approx(direct_kl(base, direct(model, PROMPTS)[0]), rel=1e-3, abs=1e-5)
    assert [line["step"] for line in trainer.state.log_history if "base_kl" in line] == [1, 2, 3, 4]
    limit = limit_behind(meter, 2)
    model, trainer = trained_by(kind, tmp_path / "second")
    stopping = ForgettingMeter(prompts=PROMPTS, every=1, stop_at_kl=limit)
    trainer.add_callback(stopping)  # the simple way
    assert trainer.train().global_step == 3 == stopping.stopped_at and stopping.kept_step == 2
    kl = direct_kl(base, direct(model, PROMPTS)[0])
    assert kl == pytest.approx(meter.measured[2].base_kl, rel=1e-3, abs=1e-5) and kl < limit


def test_full_fine_tuning_is_resumed_with_the_base_of_its_beginning(tmp_path):
    rows = rows_for_trainer()

    def train(resume=None, add=True, **changes):
        model = tiny_model()
        arguments = TrainingArguments(str(tmp_path), **{**PLAIN, "save_steps": 2, **changes})
        meter = ForgettingMeter(other=other_rows(), prompts=PROMPTS, every=1)
        trainer = Trainer(model, arguments, train_dataset=rows)
        (meter.add_to if add else lambda trainer: trainer.add_callback(meter))(trainer)
        trainer.train(resume)
        return meter.measured

    first = train()
    assert train(str(tmp_path / "checkpoint-2")) == {step: first[step] for step in (3, 4)}
    with pytest.raises(ValueError, match="call meter.add_to"):
        train(str(tmp_path / "checkpoint-2"), add=False)


# ---- rows ----------------------------------------------------------------------------------------------


def test_rows_of_prompts_end_with_the_first_token_of_the_answer():
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9]}
    assert prompt_rows([row]) == [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}]
    assert prompts_of([row]) == [[5, 6, 7]]
    text = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    assert prompt_rows([text]) == [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    assert prompt_rows([row_of_prompt([5, 6])]) == [{"input_ids": [5, 6, 6], "labels": [-100, 6, 6]}]
    with pytest.raises(ValueError, match="no row has a prompt"):
        prompts_of([text])
    many = [{"input_ids": [n, n], "labels": [n, n]} for n in range(50)]
    assert some(many, 7, seed=1) == some(many, 7, seed=1) != some(many, 7, seed=2)


def test_answers_are_those_of_the_base_one_by_one():
    model, tokenizer = tiny_model(seed=4), tiny_tokenizer()
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    expected = [[*prompt, *greedy(model, prompt, 6)] for prompt in prompts]
    randomize(with_adapter(model, CONFIG), std=1.0)
    rows = answer_rows(model, tokenizer, prompts, 6, 2)
    assert answer_rows(model, tokenizer, [[5] * 251, *prompts], 6, 2) == rows  # the first leaves no room for an answer
    assert [row["input_ids"] for row in rows] == expected and rows[1]["labels"] == [-100, -100, *expected[1][2:]]


@pytest.mark.parametrize(
    "kind, options, message",
    (
        (ForgettingMeter, dict(), "nothing is measured"),
        (ForgettingMeter, dict(other=[], every=0), "every must be at least 1 step, got 0"),
        (ForgettingMeter, dict(other=[], stop_at_kl=0.1), "stop_at_kl=0.1 needs prompts"),
        (ForgettingMeter, dict(prompts=[], stop_at_forgetting=0.1), "stop_at_forgetting=0.1 needs other"),
        (ForgettingMeter, dict(other=[], stop_at_forgetting=0), "stop_at_forgetting must be above 0, got 0"),
        (ForgettingOptions, dict(stop_at_forgetting=0.1), "stop_at_forgetting needs forgetting_data"),
        (ForgettingOptions, dict(stop_at_kl=-1), "stop_at_kl must be above 0, got -1"),
        (ForgettingOptions, dict(kl_on="answers"), "kl_on=answers has no effect"),
        (ForgettingOptions, dict(kl_on="tokens", measure_kl=True), "kl_on must be one of prompts, answers"),
        (ForgettingOptions, dict(meter_steps=5), "meter_steps has no effect"),
        (ForgettingOptions, dict(meter_rows=0, measure_kl=True), "meter_rows must be at least 1"),
    ),
)
def test_mistakes_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_a_long_text_is_cut_into_rows_of_which_some_are_drawn(tmp_path):
    lines = [{"text": "A heron waits in the water. " * 20}, {"text": "Iron rusts."}]
    texts = read_texts(DataOptions(data=[str(write_jsonl(tmp_path / "texts.jsonl", lines))]))
    rows = text_rows(texts, tiny_tokenizer(), longest=16, most=5, seed=1)
    assert len(rows) == 5 and all(len(row["input_ids"]) <= 16 for row in rows)
    assert rows == text_rows(texts, tiny_tokenizer(), longest=16, most=5, seed=1)
    assert len(text_rows(texts, tiny_tokenizer(), longest=16, most=500)) == 36
