"""The folder in the form of PEFT's method comparison: its protocol, its experiments, and the suite."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_model, tiny_tokenizer

pytest.importorskip("peft")
FOLDER = Path(__file__).parents[2] / "examples" / "peft_method_comparison"
sys.path.insert(0, str(FOLDER))

import run as command
from comparison import answers, data, report, results, running, settings, suite, training
from comparison.clock import Clock, OutOfTime
from comparison.evaluation import accuracy_of_numbers, generation_config
from comparison.memory import Memory

STEPS = 4
SMALL = {"max_steps": STEPS, "eval_steps": 2, "batch_size": 2, "batch_size_eval": 4, "dtype": "float32"}
SHORT = {"generation_kwargs": {"max_length": 200, "max_new_tokens": 4, "do_sample": False}}
# what PEFT's processing.py reads of a result
READ = {
    "run_info": ["experiment_name", "train_config", "peft_config", "total_time", "peft_branch", "created_at"],
    "train_info": ["status", "metrics", "accelerator_memory_reserved_avg", "accelerator_memory_max",
                   "accelerator_memory_reserved_99th", "train_time", "file_size", "num_trainable_params"],
    "meta_info": ["package_info", "system_info"],
}  # fmt: skip
LAST = ["test accuracy", "train loss", "train samples", "train total tokens", "forgetting"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model, and made-up rows with the fields of the real sets."""
    folder = tmp_path_factory.mktemp("comparison")
    save_tiny(folder / "tiny")
    (folder / "data").mkdir()
    sums = [(f"What is {a} plus {b}?", a + b) for a in range(6) for b in range(10)]
    rows = {
        "metamathqa": [
            {"query": q, "response": f"It makes {n}.\nThe answer is: {n}", "type": "made up"} for q, n in sums
        ],
        "gsm8k-train": [{"question": q, "answer": f"It makes {n}.\n#### {n}"} for q, n in sums],
        "gsm8k-test": [{"question": q, "answer": f"It makes {n}.\n#### {n}"} for q, n in sums[:6]],
        "encyclopedia": [{"text": f"The sea number {n} is deep."} for n in range(104)],
    }
    for name, lines in rows.items():
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def params(files, **changes):
    return settings.training_params({"model_id": str(files / "tiny"), **SMALL, **SHORT, **changes})


def s2ft_run(files, **changes):
    return settings.Run("s2ft/tiny", params(files, **changes), None, "s2ft", {"d_ratio": 0.1})


# ---- the experiments ---------------------------------------------------------------------------------


EXPERIMENTS = sorted(path.parent for path in FOLDER.glob("experiments/*/*/adapter_config.json"))


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_an_experiment_is_a_config_of_peft_whose_name_has_its_rate(folder):
    run = settings.read_experiment(folder, {})
    assert run.adapter["peft_type"] == "S2FT" and run.params.model_id == "meta-llama/Llama-3.2-3B"
    assert folder.name.startswith("llama-3.2-3B-") and folder.name.endswith(f"-lr_{run.params.rate:g}")
    assert run.params.optimizer_kwargs["weight_decay"] == 0.1


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The public shape of Llama-3.2-3B, without weights."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("shape")
    LlamaConfig(vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                num_attention_heads=24, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
                architectures=["LlamaForCausalLM"]).save_pretrained(folder)  # fmt: skip
    return folder


def test_the_experiments_train_as_much_as_their_names_say_and_no_more_than_lora(llama):
    from comparison.estimates import _s2ft_config

    import s2ft
    from s2ft.text.models import hollow_model

    model, trained = hollow_model(str(llama)), {}
    for folder in EXPERIMENTS:
        config = _s2ft_config(settings.read_experiment(folder, {}))
        if config.selection != "random":  # a hollow model has no weights to choose by
            config = s2ft.S2FTConfig(d_ratio=config.d_ratio)
        trained[folder.name.split("3B-")[1].rsplit("-lr", 1)[0]] = s2ft.plan(model, config).trainable
    channel, head, layers = 3072, 128 * 3072, 28
    assert trained.pop("d85-o1") == (85 * channel + head) * layers <= 18_350_080  # LoRA r=64 on q_proj and v_proj
    assert trained.pop("d70-o8layers") == 70 * channel * layers + 8 * head <= 9_175_040  # the same with r=32
    assert set(trained.values()) == {106 * channel * layers} and 106 * channel * layers <= 9_175_040
    assert suite._default_size(str(llama)) == 9_175_040


# ---- the protocol ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, right, expected",
    [
        ("It is 5. The answer is: 5.", "#### 5", True),
        ("The answer is: $50%", "#### 50", True),
        ("The answer is: 7/2", "#### 3.5", True),
        ("The answer is: 7/0", "#### 3.5", False),
        ("The answer is: 1,200", "#### 1,200", True),
        ("The answer is: 1200", "#### 1,200", False),  # PEFT compares such numbers as text
        ("#### 4\nThe answer is 5", "#### 5", True),
        ("The answer is: 5\n\nQuestion: what?", "#### 5", True),
        ("The answer is: NaN", "#### 5", False),
        ("5", "#### 5", False),
        ("The answer is: sNaN", "#### 5", False),
    ],
)
def test_answers_are_compared_by_peft_s_rules(text, right, expected):
    assert answers.is_right(text, right) is expected


def test_a_set_s_answer_without_a_mark_is_an_error():
    with pytest.raises(ValueError, match="the set's answer has none of"):
        answers.is_right("The answer is: 5", "5")


def test_the_accuracy_of_numbers_takes_commas():
    assert accuracy_of_numbers(["so 1200.", "no"], [("", "#### 1,200"), ("", "#### 3")]) == 0.5


def test_batches_are_sorted_within_twenty_batches_only():
    rows = [[0] * length for length in range(1, 101)]
    made = list(training.batches(rows, 2))
    assert sum(made, []) == sorted(rows[:40], key=len)[::-1] + sorted(rows[40:80], key=len)[::-1] + rows[80:][::-1]


def test_a_batch_labels_all_tokens_and_one_end_token():
    batch = training.tensors([[5, 6, 7, 8], [5, 6], [9]], 2, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 2, 2], [9, 2, 2, 2]]
    assert batch["labels"].tolist() == [[5, 6, 7, 8], [5, 6, 2, -100], [9, 2, -100, -100]]
    assert batch["attention_mask"].sum(1).tolist() == [4, 2, 1]


def test_the_loss_of_a_step_is_the_sum_over_labels_by_the_tokens(files):
    """PEFT divides by the number of tokens that are no padding."""
    model, rows = tiny_model(), [[5, 6, 7, 8], [5, 6]]
    trainer = training.Trainer(model, rows, 2, params(files, max_steps=1, eval_steps=1), Memory(torch.device("cpu")))
    batch = training.tensors(rows, 2, torch.device("cpu"))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    trainer.step(rows)
    assert trainer.progress.losses[0] == pytest.approx(expected.item() / 6, rel=1e-5)
    assert trainer.progress.tokens == [8]


def test_the_rate_warms_up_for_a_tenth_and_falls_as_a_cosine(files):
    trainer = training.Trainer(tiny_model(), [[5]] * 400, 2, params(files, max_steps=200), Memory(torch.device("cpu")))
    rates = []
    for _ in range(200):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.schedule.step()
    assert rates[:21] == pytest.approx([1e-4 * step / 20 for step in range(21)])
    assert rates[110] == pytest.approx(0.5e-4) and rates[-1] < 1e-7


def test_the_smaller_of_both_limits_ends_a_generation():
    both = {"max_length": 800, "max_new_tokens": 300, "do_sample": None}
    assert [generation_config(both, length, 0).max_length for length in (100, 600)] == [400, 800]
    assert generation_config(both, 100, 0).do_sample is None and generation_config(both, 100, 0).max_new_tokens is None


def test_a_generation_is_greedy_even_if_the_model_samples(files):
    model = tiny_model()
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    config = generation_config({"max_length": 30, "do_sample": False}, 3, 0)
    ids = torch.tensor([[5, 6, 7]])
    made = [model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config) for _ in range(3)]
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_long_rows_are_left_out_and_the_validation_set_is_always_the_same(files, tmp_path):
    import numpy as np

    for name in data.SETS:
        lines = (files / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        if name == "metamathqa":
            lines.insert(1, json.dumps({"query": "q", "response": "x" * 1299}) + "\n")
            lines.insert(1, json.dumps({"query": "q", "response": "x" * 1298}) + "\n")
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    read = data.read(tmp_path, 3)
    assert [len(answer) for _, answer in read.training] == [28, 1298, 28]
    np.random.seed(0)
    order = np.arange(60)
    np.random.shuffle(order)  # how PEFT draws it
    questions = [json.loads(line)["question"] for line in (tmp_path / "gsm8k-train.jsonl").read_text().splitlines()]
    assert [question for question, _ in read.validation] == [questions[number] for number in order[:50]]


def test_files_as_the_hub_has_them_are_read(files, tmp_path):
    from datasets import Dataset

    def rows(name):
        return [json.loads(line) for line in (files / "data" / f"{name}.jsonl").read_text().splitlines()]

    (tmp_path / "metamathqa").mkdir()
    (tmp_path / "metamathqa" / "MetaMathQA-395K.json").write_text(json.dumps(rows("metamathqa")))
    for split in ("train", "test"):
        Dataset.from_list(rows(f"gsm8k-{split}")).to_parquet(tmp_path / f"gsm8k/main/{split}-00000-of-00001.parquet")
    Dataset.from_list(rows("encyclopedia")).to_parquet(tmp_path / "finewiki/data/enwiki/000_00000.parquet")
    theirs, ours = data.read(tmp_path, 10), data.read(files / "data", 10)
    assert (theirs.training, theirs.validation, theirs.test, theirs.texts) == (
        ours.training, ours.validation, ours.test, ours.texts,
    )  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: (folder / "gsm8k-test.jsonl").unlink(), "has neither gsm8k-test.jsonl nor gsm8k/main/test-"),
        (lambda folder: (folder / "gsm8k-test.jsonl").write_text('{"q": ""}\n'), "gsm8k-test, row 0: field 'question' must be"),
        (lambda folder: (folder / "metamathqa.jsonl").write_text('{"query": "a", "response": "b"}\n'), "takes 8 rows"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used_is_named_before_the_model_is_loaded(files, tmp_path, monkeypatch, change, message):
    for name in data.SETS:
        (tmp_path / f"{name}.jsonl").write_text((files / "data" / f"{name}.jsonl").read_text())
    change(tmp_path)
    monkeypatch.setattr(running.models, "load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        running.execute(s2ft_run(files), tmp_path / "results", tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"max_steps": 0}, "max_steps must be a whole number"),
        ({"eval_steps": 9}, "eval_steps must be at most max_steps"),
        ({"compile": True}, "compile must be False here"),
        ({"optimizer_kwargs": {}}, "must have lr above 0"),
        ({"query_template": "Question"}, "query_template must contain {query}"),
        ({"lr": 1}, "there is no training parameter lr"),
        ({"lr_scheduler": "linear"}, "lr_scheduler must be"),
    ],
)
def test_a_wrong_training_parameter_is_refused(files, change, message):
    with pytest.raises(ValueError, match=message):
        params(files, **change)


# ---- a run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    return running.execute(s2ft_run(files), output, files / "data"), output


def test_a_result_has_what_peft_reads(finished):
    content, output = finished
    assert (
        json.loads((output / "s2ft--tiny.json").read_text()) == content and content["train_info"]["status"] == "success"
    )
    assert {part: [key for key in keys if key not in content[part]] for part, keys in READ.items()} == {
        "run_info": [], "train_info": [], "meta_info": [],
    }  # fmt: skip
    *validations, last = content["train_info"]["metrics"]
    assert [key for key in LAST if key not in last] == [] and last["train samples"] == 2 * STEPS
    assert [one["step"] for one in validations] == [2, 4] and "valid accuracy" in validations[0]
    versions = content["meta_info"]["package_info"]
    assert {f"{name}-version" for name in ("peft", "transformers", "datasets", "torch", "bitsandbytes")} <= set(
        versions
    )
    assert list((output / "work").iterdir()) == []


def test_what_a_run_measures_is_right(files, finished):
    """Loss, forgetting and size against direct computations."""
    import s2ft

    info = finished[0]["train_info"]
    model, tokenizer = tiny_model(), tiny_tokenizer()
    texts = [json.loads(line)["text"] for line in (files / "data" / "encyclopedia.jsonl").read_text().splitlines()][
        :100
    ]

    def loss():
        total, tokens = 0.0, 0
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                logits = model(ids).logits.double()
            total += torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
            tokens += ids.shape[1] - 1
        return total / tokens

    before = loss()
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.1)
    rows = training.encoded(tokenizer, data.read(files / "data", 40).training, params(files))
    losses = []
    for step, batch in enumerate(list(training.batches(rows, 2))[:STEPS]):
        optimizer.param_groups[0]["lr"] = 1e-4 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / STEPS)).item())
        tensors = training.tensors(batch, tokenizer.eos_token_id, torch.device("cpu"))
        labels, mask = tensors["labels"], tensors["attention_mask"]
        logits = model(input_ids=tensors["input_ids"], attention_mask=mask).logits
        total = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        optimizer.zero_grad()
        (total / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append((total / mask.sum()).item())
    last = info["metrics"][-1]
    assert last["train loss"] == pytest.approx(sum(losses[-2:]) / 2, rel=1e-5)
    assert last["loss on the encyclopedia before"] == pytest.approx(before, rel=1e-6)
    assert last["forgetting"] == pytest.approx(loss() - before, abs=1e-6) and abs(last["forgetting"]) > 1e-6
    assert info["num_trainable_params"] == sum(each.numel() for each in trained) == 2 * 6 * 32
    assert 4 * info["num_trainable_params"] <= info["file_size"] < 4 * info["num_trainable_params"] + 4000


def test_the_peft_method_trains_the_same_as_the_attached_model(files, finished, tmp_path):
    """An experiment's folder, through PEFT: same units, same losses, same forgetting."""
    from s2ft.peft import S2FTPeftConfig

    folder = tmp_path / "experiments" / "s2ft" / "tiny"
    S2FTPeftConfig(task_type="CAUSAL_LM", d_ratio=0.1).save_pretrained(folder)
    (folder / "training_params.json").write_text(json.dumps({**SMALL, **SHORT}))
    run = settings.read_experiment(folder, {"model_id": str(files / "tiny")})
    content = running.execute(run, tmp_path / "results", files / "data")
    attached, peft = finished[0]["train_info"], content["train_info"]
    assert peft["num_trainable_params"] == attached["num_trainable_params"]
    for key in ("train loss", "forgetting", "test accuracy", "train total tokens"):
        assert peft["metrics"][-1][key] == pytest.approx(attached["metrics"][-1][key], abs=1e-6)
    assert content["run_info"]["peft_config"]["peft_type"] == "S2FT"


class Limited(Clock):
    """A clock whose limit comes at the nth check."""

    def __init__(self, checks):
        super().__init__()
        self.left = checks

    def check(self, needed):
        self.left -= 1
        if self.left < 0:
            raise OutOfTime


SLOW = pytest.mark.slow


@pytest.mark.parametrize("checks", [pytest.param(1, marks=SLOW), 3, 16, pytest.param(30, marks=SLOW), 31])
def test_a_run_that_its_limit_stopped_goes_on_to_the_same_result(files, finished, tmp_path, monkeypatch, checks):
    """In training, before a validation, in one, after training, in the test."""
    monkeypatch.setattr(running, "Clock", lambda until: Limited(checks))
    assert running.execute(s2ft_run(files), tmp_path, files / "data") is None
    assert not (tmp_path / "s2ft--tiny.json").exists()
    monkeypatch.setattr(running, "Clock", Clock)
    content = running.execute(s2ft_run(files), tmp_path, files / "data")

    def measured(content):
        metrics = content["train_info"]["metrics"]
        return [{key: one.get(key) for key in ("step", "valid accuracy", *LAST)} for one in metrics]

    assert measured(content) == measured(finished[0])


def test_a_checkpoint_of_other_settings_is_refused(files, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "Clock", lambda until: Limited(1))
    running.execute(s2ft_run(files), tmp_path, files / "data")
    monkeypatch.setattr(running, "Clock", Clock)
    with pytest.raises(ValueError, match="is of a run with other settings"):
        running.execute(s2ft_run(files, seed=1), tmp_path, files / "data")


def test_too_little_memory_is_a_result(files, tmp_path, monkeypatch):
    def step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")

    monkeypatch.setattr(training.Trainer, "step", step)
    content = running.execute(s2ft_run(files), tmp_path, files / "data")
    assert content["train_info"]["status"] == "canceled" and results.is_done(content)
    assert content["run_info"]["error_msg"] == "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert report.row_of(content) == "out of memory"


def test_a_loss_that_is_no_number_ends_the_run(files, tmp_path):
    content = running.execute(s2ft_run(files, optimizer_kwargs={"lr": 1e30}), tmp_path, files / "data")
    assert "lower the learning rate" in content["run_info"]["error_msg"] and results.is_done(content)
    assert list((tmp_path / "work").iterdir()) == []


# ---- the suite ---------------------------------------------------------------------------------------


def test_the_suite_s_methods_have_the_same_size(files):
    variants = suite.read_variants(suite.VARIANTS)
    runs = suite.runs_of([str(files / "tiny")], variants, [1e-3], [0], 3000, {})
    assert [run.name.split("/")[0] for run in runs] == list(variants)
    assert {run.options["budget"] for run in runs if run.method == "s2ft"} == {3000}
    assert {run.method for run in runs} == {"s2ft", "lora", "dora", "rslora", "shira", "miss", "full"}


@pytest.mark.parametrize(
    "content, message",
    [
        ({"a": {"method": "lore", "rates": [1]}}, "method of a must be one of"),
        ({"a": {"method": "lora"}}, "at least one learning rate"),
        ({"a": {"method": "lora", "rate": 1}}, "method, options and rates"),
    ],
)
def test_a_wrong_list_of_variants_is_refused(tmp_path, content, message):
    (tmp_path / "suite.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        suite.read_variants(tmp_path / "suite.json")


@pytest.fixture
def short_answers(tmp_path, monkeypatch):
    """Default parameters with short answers."""
    file = tmp_path / "defaults.json"
    file.write_text(json.dumps({**json.loads(settings.DEFAULTS.read_text()), **SHORT}))
    monkeypatch.setattr(settings, "DEFAULTS", file)


def options(files, output, *more):
    return ["--models", str(files / "tiny"), "--data", str(files / "data"), "--output", str(output), "--steps", "2",
            "--eval-steps", "1", "--batch-size", "2", "--eval-batch-size", "50", "--dtype", "float32",
            "--parameters", "2000", "--test-rows", "2", *more]  # fmt: skip


def test_every_method_of_the_suite_runs_and_is_in_the_table(files, short_answers, tmp_path, monkeypatch, capsys):
    assert command.main(options(files, tmp_path, "--rates", "1e-3", "--in-process")) == 0
    printed = capsys.readouterr().out
    lines = printed[: printed.index("Each method")].splitlines()
    assert all(any(line.split()[1:2] == [name] for line in lines) for name in suite.read_variants(suite.VARIANTS))
    assert "not run" not in printed and (tmp_path / "tables" / "best.csv").is_file()
    monkeypatch.setattr(running, "execute", lambda *_: pytest.fail("a run that has a result was repeated"))
    assert command.main(options(files, tmp_path, "--rates", "1e-3", "--in-process")) == 0


def test_what_a_suite_needs_is_estimated_without_a_run(files, tmp_path, capsys):
    assert command.main(options(files, tmp_path, "--rates", "1e-3", "--estimate")) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    trained = {line[0].removeprefix("| ").split("/")[0]: int(line[2].replace(",", "")) for line in lines}
    assert trained.pop("full") == sum(each.numel() for each in tiny_model().parameters())
    assert set(trained) == set(suite.read_variants(suite.VARIANTS)) - {"full"}
    assert all(1000 < number <= 2000 for number in trained.values())


def test_a_failed_run_is_a_row_and_the_others_go_on(files, tmp_path, monkeypatch, capsys):
    seen = []

    def process(run, limits):
        seen.append(run.name)
        content = results.result(
            run, results.now(), results.FAILED, {"metrics": []}, "the process was ended by signal 9: x"
        )
        results.write(limits.output / run.file_name, content)
        return content

    monkeypatch.setattr(suite, "_in_process", process)
    assert command.main(options(files, tmp_path, "--methods", "lora", "full", "--rates", "1e-3")) == 1
    assert len(seen) == 2 and "the process was ended by signal 9" in capsys.readouterr().out
    assert command.main(options(files, tmp_path, "--methods", "lora", "full", "--rates", "1e-3")) == 1
    assert len(seen) == 4  # a failed run is repeated


def test_no_run_is_started_when_the_time_is_over(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "_in_process", lambda *_: pytest.fail("a run was started"))
    more = ["--methods", "lora", "--time-limit", "0.001"]
    assert command.main(options(files, tmp_path, *more)) == 3
    assert "not run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give either"),
        (["--models", "m", "--data", "nowhere"], "--data must be a folder"),
        (["x", "--methods", "lora"], "go with --models"),
        (["--models", "m", "--time-limit", "0"], "must be above 0"),
    ],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_an_unknown_method_is_named(capsys):
    assert command.main(["--models", "m", "--methods", "lore"]) == 2
    assert "methods must be of s2ft" in capsys.readouterr().err


def test_units_chosen_with_data_are_written_into_an_experiment(files, short_answers, tmp_path, capsys):
    import s2ft

    folder = tmp_path / "experiments" / "s2ft" / "chosen"
    chosen = {"d_ratio": 0.1, "selection": "activation", "order": "smallest", "protect_ratio": 0.5}
    line = [str(folder), "--model", str(files / "tiny"), "--dtype", "float32", "--data", str(files / "data"),
            "--steps", "10", "--eval-steps", "10"]  # fmt: skip
    assert command.main([*line, "--units", json.dumps(chosen)]) == 0
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["info"] == {"chosen_by": chosen} and written["selection"] == "random" and written["d_ratio"] == 0
    read, tokenizer = data.read(files / "data", 40), tiny_tokenizer()
    rows = training.encoded(tokenizer, read.training, params(files, max_steps=10, batch_size=4))
    with_data = s2ft.select(
        tiny_model(),
        s2ft.S2FTConfig(**chosen),
        [training.tensors(rows, 2, torch.device("cpu"))],
        protect=[training.tensors([tokenizer.encode(text) for text in read.protected], 2, torch.device("cpu"))],
    )
    from s2ft.peft import S2FTPeftConfig

    assert S2FTPeftConfig.from_pretrained(folder).units == with_data.to_dict()
    assert settings.read_experiment(folder, {}).name == "s2ft/chosen"


@pytest.mark.slow
def test_runs_in_processes_of_their_own(files, tmp_path):
    more = ["--methods", "s2ft", "--rates", "1e-3", "--time-limit", "10"]
    line = [sys.executable, str(FOLDER / "run.py"), *options(files, tmp_path, *more)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "s2ft" in done.stdout and "not run" not in done.stdout
