"""Training runs train the slices, write the output folder and resume from it."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from train.tiny import sums, tiny_model, tiny_tokenizer

import s2ft
from s2ft.packages import NEEDS, MissingPackages
from s2ft.text.encoding import encode_examples
from s2ft.text.examples import example_from
from s2ft.train.finetune import check_packages_of_run, finetune, log_length
from s2ft.train.held_out import HeldOut
from s2ft.train.options import SCHEDULES, TrainOptions
from s2ft.train.output import RunFolder, read_log

CONFIG = s2ft.S2FTConfig(d_ratio=0.1, v_ratio=0.5)
OPTIONS = dict(batch_size=4, micro_batch_size=2, max_steps=8, save_steps=4, learning_rate=1e-2, keep_checkpoints=0)


def run(path, resume=False, config=CONFIG, model_changes=None, evaluated=0, **changes):
    """Train the tiny model and hold out `evaluated` rows. Returns the model, the folder and the result."""
    tokenizer, model = tiny_tokenizer(), tiny_model(**(model_changes or {}))
    rows = encode_examples(tokenizer, [example_from(row, "row") for row in sums(14)], 256)
    s2ft.attach(model, config)
    folder = RunFolder(path)
    folder.check(resume=resume)
    options = TrainOptions(**{**OPTIONS, **changes})
    folder.begin(options.to_dict(), resume)
    return (
        model,
        folder,
        finetune(model, tokenizer, rows, options, folder, resume, HeldOut(rows[:evaluated]) if evaluated else None),
    )


def evaluations(folder):
    return [line["step"] for line in read_log(folder.log) if "eval_loss" in line]


def deltas(folder):
    return load_file(folder.adapter / "s2ft_adapter.safetensors")


def losses(folder):
    return [(line["step"], line["loss"], line["learning_rate"], line["grad_norm"]) for line in read_log(folder.log)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "whole")


def test_loss_falls_and_only_the_slices_move(whole):
    model, folder, result = whole
    logged = [loss for _, loss, *_ in losses(folder)]
    assert result.steps == 8 == len(logged) and logged[-1] < logged[0]
    base, plain = tiny_model().state_dict(), s2ft.merge(model).state_dict()
    changed = {key for key in base if not torch.equal(base[key], plain[key])}
    assert changed == {
        f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("mlp.down_proj", "self_attn.v_proj")
    }
    moved = (base["model.layers.0.mlp.down_proj.weight"] != plain["model.layers.0.mlp.down_proj.weight"]).any(0)
    assert moved.sum() == 6


def test_log_has_loss_rate_and_speed(whole):
    for line in read_log(whole[1].log):
        assert line.keys() == {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second"}
        assert line["tokens_per_second"] > 0


def test_every_file_is_written_and_the_adapter_loads(whole):
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
    assert json.loads(folder.report.read_text())["steps"] == 8
    s2ft.load_adapter(tiny_model(), folder.adapter)


def test_checkpoint_holds_the_adapter_and_no_weights_of_the_base(whole):
    checkpoint = whole[1].path / "checkpoint-4"
    names = {path.name for path in checkpoint.iterdir()}
    assert {
        "s2ft_adapter.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "s2ft_checkpoint.json",
    } <= names
    assert not names & {"model.safetensors", "pytorch_model.bin", "config.json"}


def interrupted_copy(whole, path):
    """Copy the folder and leave in it what an interrupt during the checkpoint after step 4 leaves."""
    shutil.copytree(whole[1].path, path)
    shutil.rmtree(path / "adapter"), (path / "report.json").unlink()
    (path / "checkpoint-8" / "trainer_state.json").unlink()
    with (path / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    return path


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_resumed_run_equals_the_whole_run_exactly(whole, tmp_path, dropout):
    if dropout:
        whole = run(tmp_path / "whole", model_changes={"attention_dropout": dropout})
    _, folder, result = run(
        interrupted_copy(whole, tmp_path / "again"), resume=True, model_changes={"attention_dropout": dropout}
    )
    assert result.steps == 8 and losses(folder) == losses(whole[1])
    assert all(torch.equal(value, deltas(whole[1])[key]) for key, value in deltas(folder).items())


def test_resume_with_other_options_is_an_error_that_names_them(whole, tmp_path):
    again = interrupted_copy(whole, tmp_path / "again")
    with pytest.raises(ValueError, match="other options: learning_rate was 0.01, is 0.5"):
        run(again, resume=True, learning_rate=0.5)


def test_resume_with_another_selection_is_an_error(whole, tmp_path):
    again = interrupted_copy(whole, tmp_path / "again")
    with pytest.raises(ValueError, match="another selection"):
        run(again, resume=True, config=s2ft.S2FTConfig(d_ratio=0.1, v_ratio=0.5, seed=1))


def test_resume_of_a_finished_run_changes_nothing(whole, tmp_path):
    shutil.copytree(whole[1].path, tmp_path / "again")
    _, folder, result = run(tmp_path / "again", resume=True)
    assert losses(folder) == losses(whole[1])
    assert all(torch.equal(value, deltas(whole[1])[key]) for key, value in deltas(folder).items())


def test_gradient_checkpointing_gives_the_same_deltas(whole, tmp_path):
    model, folder, _ = run(tmp_path / "out", gradient_checkpointing=True, save_steps=0)
    for key, value in deltas(folder).items():
        torch.testing.assert_close(value, deltas(whole[1])[key], rtol=1e-3, atol=1e-5)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_accumulation_equals_one_large_batch(whole, tmp_path):
    _, folder, _ = run(tmp_path / "out", micro_batch_size=4, save_steps=0)
    for (_, ours, *_), (_, theirs, *_) in zip(losses(folder), losses(whole[1])):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_half_precision_base_keeps_float32_deltas(tmp_path):
    _, folder, _ = run(tmp_path / "out", model_changes={"dtype": torch.bfloat16}, max_steps=2, save_steps=0)
    assert all(value.dtype == torch.float32 for key, value in deltas(folder).items() if key.endswith("delta"))


def test_float16_without_a_gpu_is_an_error(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    model = tiny_model().half()
    s2ft.attach(model, CONFIG)
    with pytest.raises(ValueError, match="float16 needs a GPU"):
        finetune(model, tiny_tokenizer(), [None], TrainOptions(**OPTIONS), RunFolder(tmp_path / "out"))


# ---- learning rates ------------------------------------------------------------------------------------


def test_warm_up_is_at_most_a_tenth_of_the_run():
    assert TrainOptions().warmup(3000) == 100 and TrainOptions().warmup(80) == 8 and TrainOptions().warmup(9) == 0
    assert TrainOptions(warmup_steps=0).warmup(80) == 0


def rates(path, schedule, steps):
    return [
        line["learning_rate"]
        for line in read_log(run(path, schedule=schedule, max_steps=steps, save_steps=0, batch_size=2)[1].log)
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_update_has_a_positive_learning_rate(tmp_path, schedule):
    for steps in (1, 11):  # without and with warm-up
        found = rates(tmp_path / str(steps), schedule, steps)
        assert len(found) == steps and all(0 < rate <= OPTIONS["learning_rate"] for rate in found)
        assert max(found) == OPTIONS["learning_rate"] or schedule == "inverse_sqrt"


def test_warm_up_rises_in_equal_parts_to_the_learning_rate(tmp_path):
    found = rates(tmp_path / "out", "linear", 20)  # 2 steps of warm-up
    assert found[:4] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2 * 17 / 18])
    assert found[-1] == pytest.approx(1e-2 / 18)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_resuming_in_the_warm_up_equals_the_whole_run_exactly(tmp_path, schedule):
    changes = dict(schedule=schedule, max_steps=20, save_steps=1, batch_size=2)
    _, folder, _ = run(tmp_path / "whole", **changes)
    run(tmp_path / "again", stop_after=1, **changes)
    _, again, _ = run(tmp_path / "again", resume=True, **changes)
    assert losses(again) == losses(folder)
    assert all(torch.equal(value, deltas(folder)[key]) for key, value in deltas(again).items())


def test_a_run_of_one_update_trains(tmp_path):
    """Earlier, the warm-up took the only step, with a learning rate of 0."""
    _, folder, result = run(tmp_path / "out", max_steps=-1, epochs=1, batch_size=64, micro_batch_size=8)
    assert result.steps == 1
    assert all(bool((value != 0).any()) for key, value in deltas(folder).items() if key.endswith("delta"))


def test_a_shortened_warm_up_is_logged_once(tmp_path, caplog):
    caplog.set_level("INFO")
    run(tmp_path / "out", save_steps=0)
    assert caplog.text.count("warm-up is 0 steps instead of 100") == 1


def test_a_run_of_few_updates_gets_a_warning(caplog):
    caplog.set_level("INFO")
    log_length(TrainOptions(warmup_steps=0), 1000)
    log_length(TrainOptions(warmup_steps=0, max_steps=2), 40)  # the user chose max_steps, so there is no warning
    assert not caplog.text
    log_length(TrainOptions(warmup_steps=0), 48)
    assert "48 rows at batch size 64 and 3 epochs are 3 updates" in caplog.text and "--batch-size" in caplog.text


# ---- an error in an optional part loses no run ---------------------------------------------------------


def test_without_matplotlib_the_adapter_is_saved_and_the_log_names_the_package(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, folder, result = run(tmp_path / "out", save_steps=0, max_steps=2)
    assert result.finished and deltas(folder) and folder.report.is_file() and not folder.plot.exists()
    assert "loss.png was not drawn" in caplog.text and "pip install matplotlib" in caplog.text


def test_a_plot_that_fails_loses_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("s2ft.train.plot.plot_loss", lambda *args: 1 / 0)
    _, folder, result = run(tmp_path / "out", save_steps=0, max_steps=2)
    assert result.finished and deltas(folder) and "division by zero" in caplog.text


def test_a_report_that_can_not_be_written_loses_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("s2ft.train.finetune.write_json", lambda *args: 1 / 0)
    _, folder, result = run(tmp_path / "out", save_steps=0, max_steps=2)
    assert result.finished and deltas(folder) and "report.json was not written" in caplog.text


def test_an_evaluation_that_fails_leaves_the_adapter_saved(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("s2ft.train.trainer.S2FTTrainer.evaluation_loop", lambda *args, **options: 1 / 0)
    _, folder, result = run(tmp_path / "out", evaluated=3, eval_steps=3, save_steps=0)
    assert result.finished and result.steps == 8 and deltas(folder)
    for step in (3, 6, 8):
        assert f"the evaluation at step {step} failed: division by zero" in caplog.text


def test_an_interrupt_in_the_last_evaluation_leaves_the_adapter_saved(tmp_path, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("s2ft.train.trainer.S2FTTrainer.evaluation_loop", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", evaluated=3, save_steps=0)
    assert deltas(RunFolder(tmp_path / "out"))


def test_a_logger_that_fails_at_the_end_leaves_the_adapter_saved(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("s2ft.train.callbacks.LossBar.on_train_end", lambda *args, **options: 1 / 0)
    _, folder, result = run(tmp_path / "out", save_steps=0)
    assert result.finished and deltas(folder) and "the trainer failed after the last one" in caplog.text


def test_an_error_in_the_middle_is_raised(tmp_path, monkeypatch):
    monkeypatch.setattr("s2ft.train.callbacks.JsonlLog.on_log", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "out", save_steps=0)
    assert not (tmp_path / "out/adapter").exists()


def test_a_run_that_ended_before_its_adapter_was_saved_is_resumed(whole, tmp_path):
    shutil.copytree(whole[1].path, tmp_path / "again")
    shutil.rmtree(tmp_path / "again/adapter"), (tmp_path / "again/report.json").unlink()
    _, folder, result = run(tmp_path / "again", resume=True)
    assert result.finished and all(torch.equal(value, deltas(whole[1])[key]) for key, value in deltas(folder).items())


@pytest.mark.parametrize("eval_steps, steps", [(0, [8]), (2, [2, 4, 6, 8]), (3, [3, 6, 8]), (20, [8])])
def test_the_last_step_is_evaluated_once(tmp_path, eval_steps, steps):
    _, folder, _ = run(tmp_path / "out", evaluated=3, eval_steps=eval_steps)
    assert evaluations(folder) == steps
    run(tmp_path / "out", resume=True, evaluated=3, eval_steps=eval_steps)
    assert evaluations(folder) == steps


# ---- packages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, package, message",
    [
        (
            {},
            "accelerate",
            "s2ft finetune needs the package accelerate, which is not installed: pip install accelerate",
        ),
        ({"optimizer": "adamw_8bit"}, "bitsandbytes", "optimizer adamw_8bit .* pip install bitsandbytes"),
        ({"optimizer": "paged_lion_8bit"}, "bitsandbytes", "pip install bitsandbytes"),
        ({"optimizer": "schedule_free_adamw"}, "schedulefree", "pip install schedulefree"),
    ],
)
def test_a_missing_package_of_a_run_is_named(options, package, message, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackages, match=message):
        check_packages_of_run(TrainOptions(**options))


def test_every_logger_has_a_package():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert {f"report_to {name}" for name in INTEGRATION_TO_CALLBACK} <= set(NEEDS)


def test_a_logger_that_transformers_can_not_use(monkeypatch):
    monkeypatch.setattr("s2ft.packages.is_installed", lambda package: True)
    with pytest.raises(ValueError, match="report_to: transformers can't use comet_ml with"):
        check_packages_of_run(TrainOptions(report_to=["comet_ml"]))


def test_every_optimizer_that_needs_bitsandbytes_is_known():
    from transformers.training_args import OptimizerNames

    from s2ft.packages import BITSANDBYTES

    words = ("bnb", "8bit", "lion", "ademamix", "paged")
    others = ("galore", "adamw_torch")
    assert {
        name.value
        for name in OptimizerNames
        if any(word in name.value for word in words) and not name.value.startswith(others)
    } <= set(BITSANDBYTES)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 0}, "learning_rate must be positive"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"epochs": 0}, "epochs must be positive"),
        ({"epochs": float("inf")}, "epochs must be a finite number"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number"),
        ({"save_steps": -1}, "save_steps must be at least 0"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**changes)


def test_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="batch_size 6 must be a multiple of micro_batch_size 4 times 1"):
        TrainOptions(batch_size=6, micro_batch_size=4).accumulation(1)
