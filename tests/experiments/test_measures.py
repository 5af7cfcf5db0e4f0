"""Methods are made ready as planned, and measures equal direct computations."""

import json
import signal

import pytest
import torch
from support.inside import TUNERS, mean_loss, prepare
from support.models import model_of
from train.tiny import tiny_model

import s2ft
from bench.experiments import comparison, memory, metamath, serving
from bench.experiments.learning import Base, base_of
from bench.experiments.matched_methods import matched, trained_parameters
from bench.experiments.smoke import smoke_data, smoke_model
from bench.experiments.tasks import TASKS


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments")
    return {
        "model": smoke_model(folder / "model"), "dtype": "float32", "data": smoke_data(folder / "data"), "seed": 0,
        "questions": {"train": 4, "validation": 2, "test": 2}, "method": "s2ft", "rate": 0.01,
    }  # fmt: skip


# ---- methods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, options", [
    ("s2ft", {"d_ratio": 0.1, "o_ratio": 0.25, "allocation": "global"}), ("s2ft", {"d_ratio": 0.3, "selection": "weight"}),
    ("lora", {"r": 4}), ("dora", {"r": 4}), ("rslora", {"r": 4}), ("shira", {"r": 4}), ("miss", {"r": 4}), ("full", {}),
])  # fmt: skip
def test_the_number_of_parameters_is_known_before_and_can_be_matched(method, options):
    with torch.device("meta"):
        hollow = type(model_of("llama"))(model_of("llama").config)
    assert trained_parameters(hollow, method, options) == prepare(model_of("llama"), method, options).trainable
    if TUNERS[method].size:
        found = matched(hollow, method, 2500, options)
        assert 1200 < prepare(model_of("llama"), method, found).trainable <= 2500
        assert "lora_alpha" not in found or found["lora_alpha"] == found["r"] * 32 / 4


# ---- tasks and scores ------------------------------------------------------------------------------------


def test_tasks_without_packages_are_the_same_each_time_and_share_no_question(settings):
    for name in ("arithmetic", "math10k", "boolq"):
        task, again = TASKS[name](settings), TASKS[name](settings)
        assert task.train == again.train and task.tests == again.tests
        assert not {one.question for one in task.train} & {one.question for one in task.validation}
    assert len(TASKS["arithmetic"](settings).train) == 4 and len(TASKS["math10k"](settings).tests) == 7
    assert "Answer format: true/false" in TASKS["boolq"](settings).train[0].question.replace("\n", " ")
    assert TASKS["math10k"]({**settings, "seed": 1}).train != TASKS["math10k"](settings).train


def test_distance_from_the_base_is_zero_for_the_base(settings):
    base = base_of(settings)
    known = {**settings, "task": "math10k", "probes": ["other_text.jsonl"], "probe_texts": 2, "kl_prompts": 1}
    assert base.distance(base.model, known) == {"forgetting": {"other_text.jsonl": 0.0}, "kl": 0.0}
    moved = base.copy()
    moved.lm_head.weight.data.mul_(2)
    found = base.distance(moved, {**known, "kl_prompts": None, "kl_texts": True})
    assert found["forgetting"]["other_text.jsonl"] != 0 and found["kl"] > 0


def test_the_losses_of_single_questions_make_the_mean_loss(settings):
    base, known = base_of(settings), {**settings, "task": "math10k"}
    rows = base.rows([one for ones in base.task(known).tests.values() for one in ones], known)
    found = base.losses(base.model, base.task(known), known)
    assert [found["test"], found["each"][-1] / found["tokens"][-1]] == pytest.approx(
        [mean_loss(base.model, rows), mean_loss(base.model, [rows[-1]])], rel=1e-5
    )


def test_questions_are_answered_at_the_part_of_the_update_that_is_reported(settings, tmp_path, monkeypatch):
    run = {
        **settings, "task": "arithmetic", "method": "full", "options": {}, "training": {"max_steps": 2},
        "probes": ["other_text.jsonl"], "probe_texts": 2, "scales": [1.0], "answer_within": 0.05,
    }  # fmt: skip
    moved = []

    def answer(base, model, *rest):
        moved.append((model.lm_head.weight - base.model.lm_head.weight).norm().item())
        return {"test": 0.5}

    monkeypatch.setattr(Base, "scores", answer)
    for scale in (0.25, 0.5):
        monkeypatch.setattr(comparison, "best_within", lambda curve, limit, scale=scale: (0.0, 0.0, scale))
        (row,) = comparison.measure(run, tmp_path)
        assert row["answered_at"] == scale and row["tests"] == {"test": 0.5}
    assert moved[0] > 0 and moved[1] == pytest.approx(2 * moved[0], rel=1e-3)


def test_serving_finds_one_changed_bit_and_memory_is_limited():
    model, other = tiny_model(), tiny_model()
    assert serving.same_bits(model, other)
    other.lm_head.weight.data[0, 0] = torch.nextafter(other.lm_head.weight[0, 0], torch.tensor(9.0))
    assert not serving.same_bits(model, other)
    with memory.limited("cpu", 2**20), pytest.raises(RuntimeError):
        torch.empty(2**33, dtype=torch.uint8)  # more than other tests have freed, which the process keeps


# ---- PEFT's protocol -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, right, expected", [
    ("It is 5. The answer is: 5.", "#### 5", True), ("The answer is: $50%", "#### 50", True),
    ("The answer is: 7/2", "#### 3.5", True), ("The answer is: 7/0", "#### 3.5", False),
    ("The answer is: 1,200", "#### 1,200", True), ("The answer is: 1200", "#### 1,200", False),  # as text
    ("#### 4\nThe answer is 5", "#### 5", True), ("The answer is: 5\n\nQuestion: what?", "#### 5", True),
    ("The answer is: NaN", "#### 5", False), ("5", "#### 5", False), ("The answer is: sNaN", "#### 5", False),
])  # fmt: skip
def test_answers_are_compared_by_peft_s_rules(text, right, expected):
    assert metamath.is_right(text, right) is expected
    with pytest.raises(ValueError, match="the set's answer has none of"):
        metamath.is_right(text, "5")
    assert metamath.has_number("so 1200.", "#### 1,200") and not metamath.has_number("no", "#### 3")


def test_batches_are_sorted_within_twenty_batches_and_label_one_end_token():
    rows = [[0] * length for length in range(1, 101)]
    assert (
        sum(metamath.batches_of(rows, 2), [])
        == sorted(rows[:40], key=len)[::-1] + sorted(rows[40:80], key=len)[::-1] + rows[80:][::-1]
    )
    batch = metamath.tensors_of([[5, 6, 7, 8], [5, 6], [9]], 2)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 2, 2], [9, 2, 2, 2]]
    assert batch["labels"].tolist() == [[5, 6, 7, 8], [5, 6, 2, -100], [9, 2, -100, -100]]
    assert batch["attention_mask"].sum(1).tolist() == [4, 2, 1]


@pytest.fixture
def run(settings):
    from bench.experiments.__main__ import changed, read

    recipe = read("metamath")
    recipe = changed(recipe, {**recipe["smoke"], "model": settings["model"], "data": settings["data"]})
    recipe["rows"] = {"s2ft": recipe["rows"]["s2ft"]}
    return metamath.runs(recipe)[0].settings


def test_losses_and_forgetting_are_those_of_a_direct_computation(run, tmp_path):
    """And a run that was stopped after its first validation ends with the same numbers."""
    (row,) = metamath.measure(run, tmp_path / "whole")
    loaded = metamath._LoadedModel(run)
    model, rows = loaded.model, loaded.rows
    s2ft.attach(model, s2ft.S2FTConfig(**matched(model, "s2ft", run["parameters"], run["options"]), seed=0))
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=run["rate"], weight_decay=0.1), []
    for step, batch in enumerate(list(metamath.batches_of(rows, 2))[:4]):
        optimizer.param_groups[0]["lr"] = run["rate"] * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 4)).item())
        tensors = metamath.tensors_of(batch, loaded.end)
        logits = model(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits
        total = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tensors["labels"][:, 1:].flatten(), reduction="sum"
        )
        loss = total / tensors["attention_mask"].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert row["train_loss"] == pytest.approx(sum(losses[2:]) / 2, rel=1e-5) and row["forgetting"] != 0
    assert row["trained"] == sum(each.numel() for each in trained) and row["file_bytes"] >= 4 * row["trained"]

    save = metamath.Trainer.save
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(metamath.Trainer, "save", lambda self: (save(self), signal.raise_signal(signal.SIGINT)))
        metamath.measure(run, tmp_path / "part")
    (again,) = metamath.measure(run, tmp_path / "part")
    names = ("train_loss", "forgetting", "accuracy", "validation")
    assert {name: again[name] for name in names} == {name: row[name] for name in names}
    assert not list(tmp_path.glob("*/checkpoint.pt"))


def test_a_loss_that_is_no_number_ends_the_run_and_data_that_lack_a_field_are_named(run, tmp_path):
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        metamath.measure({**run, "rate": 1e30}, tmp_path)
    (tmp_path / "metamathqa.jsonl").write_text('{"query": "a"}\n')
    with pytest.raises(FileNotFoundError, match="has neither gsm8k-train.jsonl nor"):
        metamath.files_of(str(tmp_path))
    for name in ("gsm8k-train", "gsm8k-test", "encyclopedia"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="metamathqa, row 0: field 'response' must be text"):
        metamath.Data({**run, "data": str(tmp_path)}, 8)


def test_the_rows_of_s2ft_are_experiments_of_peft(settings, tmp_path):
    from bench.experiments.__main__ import main
    from s2ft.peft import S2FTPeftConfig

    assert main(["metamath", "--smoke", "--only", "s2ft", "s2ft-protect", "--set", f"peft={tmp_path / 'peft'}", "--plan",
                 "--output", str(tmp_path)]) == 0  # fmt: skip
    plain, chosen = (
        S2FTPeftConfig.from_pretrained(next(tmp_path.glob(f"peft/s2ft/*-{n}-lr_0.001"))) for n in ("s2ft", "protect")
    )
    assert plain.d_ratio == 0.1 and plain.units is None
    assert chosen.units and chosen.info == {"chosen_by": {"d_ratio": 0.1, "protect_ratio": 0.5}}
    (written,) = tmp_path.glob("peft/s2ft/*-protect-*/training_params.json")
    assert json.loads(written.read_text()) == {"optimizer_kwargs": {"lr": 0.001, "weight_decay": 0.1}}
