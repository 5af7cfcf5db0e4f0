"""Training runs: what is trained, written and resumed."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from train.tiny import sums, tiny_model, tiny_tokenizer

import s2ft
from s2ft.train.encoding import encode_examples
from s2ft.train.examples import example_from
from s2ft.train.finetune import finetune, warmup_steps
from s2ft.train.options import TrainOptions
from s2ft.train.output import RunFolder, read_log

CONFIG = s2ft.S2FTConfig(d_ratio=0.1, v_ratio=0.5)
OPTIONS = dict(batch_size=4, micro_batch_size=2, max_steps=8, save_steps=4, learning_rate=1e-2, keep_checkpoints=0)


def run(path, resume=False, config=CONFIG, model_changes=None, **changes):
    """One run on the tiny model; gives the model, the folder and the result."""
    tokenizer, model = tiny_tokenizer(), tiny_model(**(model_changes or {}))
    rows = encode_examples(tokenizer, [example_from(row, "row") for row in sums(14)], 256)
    s2ft.attach(model, config)
    folder = RunFolder(path)
    folder.check(resume=resume)
    options = TrainOptions(**{**OPTIONS, **changes})
    folder.begin(options.to_dict(), resume)
    return model, folder, finetune(model, tokenizer, rows, options, folder, resume)


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
    assert changed == {f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("mlp.down_proj",
                                                                                      "self_attn.v_proj")}
    moved = (base["model.layers.0.mlp.down_proj.weight"] != plain["model.layers.0.mlp.down_proj.weight"]).any(0)
    assert moved.sum() == 6


def test_log_has_loss_rate_and_speed(whole):
    for line in read_log(whole[1].log):
        assert line.keys() == {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second"}
        assert line["tokens_per_second"] > 0


def test_everything_is_written_and_the_adapter_loads(whole):
    folder = whole[1]
    assert {path.name for path in folder.path.iterdir()} == {
        "adapter", "log.jsonl", "loss.png", "run.json", "report.json", "checkpoint-4", "checkpoint-8"}
    assert folder.plot.read_bytes().startswith(b"\x89PNG")
    assert json.loads(folder.report.read_text())["steps"] == 8
    s2ft.load_adapter(tiny_model(), folder.adapter)


def test_checkpoint_holds_the_adapter_and_no_weights_of_the_base(whole):
    checkpoint = whole[1].path / "checkpoint-4"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"s2ft_adapter.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
            "s2ft_checkpoint.json"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin", "config.json"}


def interrupted(whole, path):
    """The folder as it was after step 4, with what an interrupt in the next checkpoint would leave."""
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
    _, folder, result = run(interrupted(whole, tmp_path / "again"), resume=True,
                            model_changes={"attention_dropout": dropout})
    assert result.steps == 8 and losses(folder) == losses(whole[1])
    assert all(torch.equal(value, deltas(whole[1])[key]) for key, value in deltas(folder).items())


def test_resume_with_other_options_is_an_error_that_names_them(whole, tmp_path):
    again = interrupted(whole, tmp_path / "again")
    with pytest.raises(ValueError, match="other options: learning_rate was 0.01, is 0.5"):
        run(again, resume=True, learning_rate=0.5)


def test_resume_with_another_selection_is_an_error(whole, tmp_path):
    again = interrupted(whole, tmp_path / "again")
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


def test_accumulation_gives_what_one_large_batch_gives(whole, tmp_path):
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


def test_warm_up_is_capped_and_says_so(caplog):
    caplog.set_level("INFO")
    assert warmup_steps(TrainOptions(), 3000) == 100 and not caplog.text
    assert warmup_steps(TrainOptions(), 80) == 8 and "8 steps instead of 100" in caplog.text
    assert warmup_steps(TrainOptions(warmup_steps=0), 80) == 0


@pytest.mark.parametrize("changes, message", [
    ({"learning_rate": 0}, "learning_rate must be positive"), ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"epochs": 0}, "epochs must be positive"), ({"save_steps": -1}, "save_steps must be at least 0")])
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**changes)


def test_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="batch_size 6 must be a multiple of micro_batch_size 4 times 1"):
        TrainOptions(batch_size=6, micro_batch_size=4).accumulation(1)
