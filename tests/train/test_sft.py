"""Training runs train the slices, write the output folder and resume from it."""

import json
import shutil
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from datasets import Dataset
from support.composites import composite_of
from support.inside import (
    NEEDS,
    SCHEDULES,
    HeldOut,
    JsonlLog,
    RunFolder,
    RunOptions,
    SFTArguments,
    check_packages_of_run,
    loss_figure,
    read_log,
    sft,
    trainer_for,
)
from support.pairs import rest_slow
from support.states import same, tensors_of, with_adapter
from train.tiny import sums, tiny_model, tiny_tokenizer

import s2ft

CONFIG = s2ft.S2FTConfig(d_ratio=0.1, v_ratio=0.5)
ARGUMENTS = dict(
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    max_steps=8,
    save_steps=4,
    learning_rate=1e-2,
    save_total_limit=0,
)


def token_rows(count=14):
    """Rows of different lengths whose answers have labels."""
    tokenizer, rows = tiny_tokenizer(), []
    for number, row in enumerate(sums(count)):
        question = tokenizer(row["instruction"] * (1 + number % 3))["input_ids"]
        answer = [*tokenizer(row["output"])["input_ids"], tokenizer.eos_token_id]
        rows.append({"input_ids": question + answer, "labels": [-100] * len(question) + answer})
    return Dataset.from_list(rows)


def arguments_for(path, **changes):
    return SFTArguments(output_dir=str(path), **{**ARGUMENTS, **changes})


def run(path, resume=False, config=CONFIG, model=None, evaluated=0, options=None, data=None, meter=None, **changes):
    """Train the tiny model and evaluate on the first `evaluated` rows, or on other rows.

    Returns the model, the folder and the result.
    """
    rows = token_rows() if data is None else data
    model = with_adapter(tiny_model() if model is None else model, config)
    folder = RunFolder(path)
    folder.check(resume=resume)
    folder.begin({"learning_rate": changes.get("learning_rate", 0)}, resume)
    held_out = (
        HeldOut(rows.select(range(evaluated)) if isinstance(evaluated, int) else evaluated) if evaluated else None
    )
    how = dict(options=RunOptions(**(options or {})), resume=resume, held_out=held_out, meter=meter)
    return model, folder, sft(model, tiny_tokenizer(), rows, arguments_for(path, **changes), folder, **how)


def evaluations(folder):
    return [line["step"] for line in read_log(folder.log) if "eval_loss" in line]


def losses(folder):
    return [
        (line["step"], line["loss"], line["learning_rate"], line["grad_norm"])
        for line in read_log(folder.log)
        if "loss" in line
    ]


def check_same(ours, theirs):
    assert losses(ours) == losses(theirs) and same(tensors_of(ours.adapter), tensors_of(theirs.adapter))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "whole")


def test_loss_falls_and_only_the_slices_move(whole):
    model, folder, result = whole
    logged = [loss for _, loss, *_ in losses(folder)]
    assert result.steps == 8 == len(logged) and logged[-1] < logged[0]
    base, plain = tiny_model().state_dict(), s2ft.merge(model).state_dict()
    assert {key for key in base if not torch.equal(base[key], plain[key])} == {
        f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("mlp.down_proj", "self_attn.v_proj")
    }
    moved = (base["model.layers.0.mlp.down_proj.weight"] != plain["model.layers.0.mlp.down_proj.weight"]).any(0)
    assert moved.sum() == 6


def test_every_file_is_written_and_the_adapter_loads(whole):
    """TRL's model card is not among them: it describes a model, not an adapter of s2ft."""
    folder = whole[1]
    assert {path.name for path in folder.path.iterdir()} == {
        "adapter",
        "log.jsonl",
        "loss.png",
        "run.json",
        "report.json",
        "checkpoint-4",
        "checkpoint-8",
    }
    assert folder.plot.read_bytes().startswith(b"\x89PNG")
    assert loss_figure(read_log(folder.log)).axes[0].get_ylabel() == "loss"  # that of the run is empty, see conftest.py
    assert json.loads(folder.report.read_text())["steps"] == 8
    s2ft.load_adapter(tiny_model(), folder.adapter)


def interrupted_copy(whole, path, step=4):
    """Copy the folder and leave in it what an interrupt leaves: before the adapter is saved, or in the checkpoint after 4."""
    shutil.copytree(whole[1].path, path)
    shutil.rmtree(path / "adapter"), (path / "report.json").unlink()
    if step == 4:
        (path / "checkpoint-8" / "trainer_state.json").unlink()
        (path / "log.jsonl").write_text(whole[1].log.read_text() + '{"step": 9, "lo')
    return path


@pytest.mark.parametrize("step", (4, 8))
def test_resumed_run_equals_the_whole_run_exactly(step, whole, tmp_path):
    _, folder, result = run(interrupted_copy(whole, tmp_path / "again", step), resume=True)
    assert result.finished and result.steps == 8
    check_same(folder, whole[1])


# Resumed at step 4 or 6, in the second epoch: an order that depends on a random state would differ.
RESUMED = {
    "by length": {"gradient_accumulation_steps": 1, "max_steps": 12},
    "packed": {"packing": True, "max_length": 128, "max_steps": 12, "gradient_accumulation_steps": 1},
    "in one sequence": {"padding_free": True},
    "in random order": {"train_sampling_strategy": "random"},
    "shuffled before": {"train_sampling_strategy": "sequential", "shuffle_dataset": True},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "in the warm-up": {"warmup_steps": 6, "lr_scheduler_type": "cosine"},
    "TRL's loss": {"loss_type": "dft"},
}


@pytest.mark.parametrize("case", rest_slow(RESUMED, ("by length", "packed")))
def test_two_runs_of_n_steps_equal_one_of_two_n(case, tmp_path):
    """train(2N) = train(N) + resume(N), bit for bit, with dropout."""
    changes = {"save_steps": 100, **RESUMED[case]}
    half = changes.get("max_steps", 8) // 2
    models = (tiny_model(attention_dropout=0.1) for _ in range(3))
    _, whole, _ = run(tmp_path / "whole", model=next(models), **changes)
    _, folder, first = run(tmp_path / "halves", model=next(models), options={"stop_after": half}, **changes)
    assert not first.finished and first.steps == half and not folder.adapter.exists()
    _, folder, second = run(tmp_path / "halves", model=next(models), resume=True, **changes)
    assert second.finished
    check_same(folder, whole)


def test_accumulation_equals_one_large_batch(whole, tmp_path):
    _, folder, _ = run(tmp_path / "out", per_device_train_batch_size=4, gradient_accumulation_steps=1, save_steps=0)
    assert [row[1] for row in losses(folder)] == pytest.approx([row[1] for row in losses(whole[1])], rel=1e-4)


def test_accumulation_in_a_class_of_images_and_text_equals_one_large_batch(tmp_path):
    found = []
    for micro, passes in ((4, 1), (1, 4)):
        how = dict(per_device_train_batch_size=micro, gradient_accumulation_steps=passes, max_steps=2, save_steps=0)
        model = composite_of("qwen3_vl")
        assert not model.accepts_loss_kwargs
        _, folder, _ = run(tmp_path / str(micro), model=model, config=replace(CONFIG, v_ratio=0.0), **how)
        found.append([row[1] for row in losses(folder)])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# ---- what TRL changes in a model and does besides ------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"loss_type": "dft"}, {"neftune_noise_alpha": 5.0}])
def test_the_model_and_the_tokenizer_are_as_before_after_a_run(changes, tmp_path):
    tokenizer, model = tiny_tokenizer(), with_adapter(tiny_model(), CONFIG)
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    before = dict(vars(model.config)), dict(vars(model.generation_config)), set(model.__dict__)
    folder = RunFolder(tmp_path / "out")
    folder.begin({})
    sft(model, tokenizer, token_rows(), arguments_for(folder.path, max_steps=1, **changes), folder)
    assert (dict(vars(model.config)), dict(vars(model.generation_config))) == before[:2]
    assert set(model.__dict__) ^ before[2] <= {"_is_accelerate_prepared", "model_tags"} and not model.model_tags
    assert hooks == {name: len(module._forward_hooks) for name, module in model.named_modules()}
    assert tokenizer.pad_token is None and not hasattr(model.get_input_embeddings(), "neftune_noise_alpha")


def test_noise_of_neftune_does_not_stay_in_the_model_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(JsonlLog, "on_log", Mock(side_effect=ZeroDivisionError))
    model, folder = with_adapter(tiny_model(), CONFIG), RunFolder(tmp_path / "out")
    folder.begin({})
    with pytest.raises(ZeroDivisionError):
        sft(model, tiny_tokenizer(), token_rows(), arguments_for(folder.path, neftune_noise_alpha=5.0), folder)
    assert not model.get_input_embeddings()._forward_hooks


def test_deltas_of_a_quantized_model_stay_float32(tmp_path):
    """TRL rounds all trained parameters of a model that is loaded in 4 or 8 bit to bfloat16."""
    model = tiny_model()
    model.is_loaded_in_4bit = True  # TRL reads only this
    run(tmp_path / "out", model=model, max_steps=1)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_nothing_is_sent(tmp_path, monkeypatch):
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **options: pytest.fail("telemetry"))
    monkeypatch.delenv("CI", raising=False)
    run(tmp_path / "out", max_steps=1, save_steps=0)


def test_the_evaluation_loss_is_the_mean_over_all_labels(tmp_path):
    """Trainer would take the mean of the batches' means, which depends on which rows form a batch."""
    model, folder, _ = run(tmp_path / "out", evaluated=5, max_steps=2, save_steps=0, per_device_eval_batch_size=2)
    total = count = 0
    for row in list(token_rows())[:5]:
        labels = torch.tensor([row["labels"]])
        number = int((labels[:, 1:] != -100).sum())
        total += float(model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss.detach()) * number
        count += number
    (found,) = [line["eval_loss"] for line in read_log(folder.log) if "eval_loss" in line]
    assert found == pytest.approx(total / count, rel=1e-5)


def test_the_last_step_is_logged(tmp_path):
    _, folder, result = run(tmp_path / "out", max_steps=2, logging_steps=100, save_steps=0)
    assert result.loss == read_log(folder.log)[-1]["loss"] > 0


# ---- the best checkpoint -------------------------------------------------------------------------------

BEST = dict(
    eval_strategy="steps",
    eval_steps=2,
    save_steps=2,
    load_best_model_at_end=True,
    metric_for_best_model="loss",
    max_steps=20,
)


def other_rows():
    """Rows whose answers are tokens that the training makes less likely, so that the first evaluation is the best."""
    return Dataset.from_list(
        [{**row, "labels": [label if label < 0 else 3 + label % 7 for label in row["labels"]]} for row in token_rows(6)]
    )


def test_the_best_adapter_is_saved_and_an_early_stop_is_resumed(tmp_path, caplog):
    caplog.set_level("INFO")
    _, folder, result = run(tmp_path / "whole", evaluated=other_rows(), options={"early_stopping_patience": 3}, **BEST)
    found = {line["step"]: line["eval_loss"] for line in read_log(folder.log) if "eval_loss" in line}
    best = min(found, key=found.__getitem__)
    assert result.finished and result.best_step == best < result.steps < 20 and max(found) == best + 6
    assert f"the adapter is that of the best evaluation, step {best}" in caplog.text
    saved = tensors_of(folder.path / f"checkpoint-{best}")
    assert all(torch.equal(value, saved[key]) for key, value in tensors_of(folder.adapter).items())
    options = {"early_stopping_patience": 3}
    *lines, last = folder.log.read_text().splitlines(keepends=True)
    assert "eval_loss" in last
    folder.log.write_text("".join(lines))  # as if the run had ended before its last evaluation
    _, _, ended = run(tmp_path / "whole", resume=True, evaluated=other_rows(), options=options, **BEST)
    assert ended.steps == result.steps and "failed" not in caplog.text
    limited = {**BEST, "save_total_limit": 1}
    run(tmp_path / "cut", evaluated=other_rows(), options={**options, "stop_after": best + 3}, **limited)
    (tmp_path / "cut").rename(tmp_path / "moved")
    limited["eval_on_start"] = True  # which must not count for the early stop
    _, again, resumed = run(tmp_path / "moved", resume=True, evaluated=other_rows(), options=options, **limited)
    assert resumed.steps == result.steps and resumed.best_step == best
    check_same(again, folder)
    worse = {**BEST, "save_strategy": "best", "eval_steps": 1, "save_steps": 1}
    _, stopped, _ = run(tmp_path / "stopped", evaluated=other_rows(), options={"stop_after": best + 3}, **worse)
    assert (stopped.path / f"checkpoint-{best + 3}").exists()  # though its evaluation is not the best


def test_a_stop_inside_an_epoch_evaluates_nothing(tmp_path):
    epochs = {"save_strategy": "epoch", "eval_strategy": "epoch"}
    _, folder, _ = run(tmp_path, evaluated=3, options={"stop_after": 6}, **epochs)
    assert evaluations(folder) == [4]
    assert evaluations(run(tmp_path, resume=True, evaluated=3, **epochs)[1]) == [4, 8]


# ---- learning rates ------------------------------------------------------------------------------------


def rates(path, schedule, steps, **changes):
    """The learning rates of the trainer of a run, without the training."""
    model = with_adapter(tiny_model(), CONFIG)
    arguments = arguments_for(path, lr_scheduler_type=schedule, max_steps=steps, **changes)
    trainer = trainer_for(model, tiny_tokenizer(), token_rows(), arguments, RunFolder(path))
    trainer.create_optimizer_and_scheduler(steps)
    found = []
    for _ in range(steps):
        found.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_learning_rate_of_a_schedule_is_positive(tmp_path, schedule):
    for steps in (1, 11):
        found = rates(tmp_path, schedule, steps)
        assert all(0 < rate <= ARGUMENTS["learning_rate"] for rate in found)
        assert max(found) == ARGUMENTS["learning_rate"] or schedule == "inverse_sqrt"


def test_warm_up_rises_in_equal_parts_to_the_learning_rate(whole, tmp_path):
    found = rates(tmp_path / "out", "linear", 20)  # 2 steps of warm-up
    assert found[:4] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2 * 17 / 18])
    assert found[-1] == pytest.approx(1e-2 / 18)
    assert rates(tmp_path / "given", "linear", 8, warmup_steps=4)[:5] == pytest.approx(
        [2e-3, 4e-3, 6e-3, 8e-3, 1e-2]
    )  # a given warm-up is not shortened
    assert [rate for _, _, rate, _ in losses(whole[1])] == rates(tmp_path / "whole", "linear", 8)


def test_a_warm_up_that_is_longer_than_the_run_is_said(tmp_path, caplog):
    rates(tmp_path / "as-long", "linear", 4, warmup_steps=4)
    assert "warm-up" not in caplog.text
    rates(tmp_path / "longer", "linear", 3, warmup_steps=4)
    assert "the warm-up has 4 updates and the run 3" in caplog.text


def test_a_run_of_one_update_trains(tmp_path):
    """Earlier, the warm-up took the only step, with a learning rate of 0."""
    _, folder, result = run(
        tmp_path, max_steps=-1, num_train_epochs=1, per_device_train_batch_size=8, gradient_accumulation_steps=8
    )
    assert result.steps == 1
    assert all(bool((value != 0).any()) for key, value in tensors_of(folder.adapter).items() if key.endswith("delta"))


# ---- an error in an optional part loses no run ---------------------------------------------------------


FAILING = {  # what fails, and what is said
    "s2ft.train.fit.write_json": "report.json was not written",
    "trl.SFTTrainer.evaluation_loop": "the evaluation at step 8 failed: division by zero",
    "s2ft.train.fit.JsonlLog.on_train_end": "the trainer failed after the last one",
}


@pytest.mark.parametrize("what", FAILING)
def test_an_optional_part_that_fails_leaves_the_adapter_saved(what, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(what, lambda *args, **options: 1 / 0)
    _, folder, result = run(tmp_path / "out", evaluated=3, eval_strategy="steps", eval_steps=3, save_steps=0)
    assert result.finished and result.steps == 8 and tensors_of(folder.adapter) and FAILING[what] in caplog.text


def test_an_interrupt_in_the_last_evaluation_leaves_the_adapter_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("trl.SFTTrainer.evaluation_loop", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", evaluated=3, save_steps=0)
    assert tensors_of(RunFolder(tmp_path / "out").adapter)


def test_an_error_in_the_middle_is_raised(tmp_path, monkeypatch):
    monkeypatch.setattr("s2ft.train.fit.JsonlLog.on_log", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "out", save_steps=0)
    assert not (tmp_path / "out/adapter").exists()


@pytest.mark.parametrize(
    "eval_steps, steps",
    [(0, [8]), (3, [3, 6, 8]), *(pytest.param(*row, marks=pytest.mark.slow) for row in [(2, [2, 4, 6, 8]), (20, [8])])],
)
def test_the_last_step_is_evaluated_once(tmp_path, eval_steps, steps):
    changes = {"eval_strategy": "steps", "eval_steps": eval_steps} if eval_steps else {}
    _, folder, _ = run(tmp_path / "out", evaluated=3, **changes)
    assert evaluations(folder) == steps
    run(tmp_path / "out", resume=True, evaluated=3, **changes)
    assert evaluations(folder) == steps


# ---- packages ------------------------------------------------------------------------------------------


def test_every_logger_has_a_package():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert {f"report_to {name}" for name in INTEGRATION_TO_CALLBACK} <= set(NEEDS)


def test_a_logger_that_transformers_can_not_use(tmp_path, monkeypatch):
    monkeypatch.setattr("s2ft.packages.is_installed", lambda package: True)
    with pytest.raises(ValueError, match="report_to: transformers can't use comet_ml with"):
        check_packages_of_run(arguments_for(tmp_path, report_to=["comet_ml"]))
