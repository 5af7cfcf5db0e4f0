"""Options of the training commands: TRL's names, short names, config files, and errors that name the nearest one."""

import os
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import yaml
from support.inside import RunOptions, UsageError, config_text, fitting_batch, parser_of, read_run, set_batches

from s2ft import S2FTConfig

NEEDED = ["--model", "m", "--data", "d", "--output", "o"]


def parse(*words):
    return read_run("sft", [str(word) for word in words])


def from_yaml(tmp_path, text, *words):
    (tmp_path / "run.yaml").write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return parse("--config", tmp_path / "run.yaml", *words)


def message(call, *arguments):
    with pytest.raises(UsageError) as error:
        call(*arguments)
    assert "\n" not in str(error.value) and "see s2ft sft --help" in str(error.value) or "config" in str(error.value)
    return str(error.value)


# ---- names ---------------------------------------------------------------------------------------------


def test_every_option_is_reachable_by_its_own_name_and_no_short_name_stands_for_two():
    parsers = [parser_of(command) for command in ("sft", "dpo", "grpo", "compare")]
    for parser in parsers:
        names = [short for shorts in parser.short.values() for short in shorts]
        assert len(names) == len(set(names))
        for kind in parser.kinds:
            for one in fields(kind):
                name = parser.name_of(one, kind)
                assert not one.init or name in parser.options or name.replace("_", "-") in names, name
    known = {name for parser in parsers for name in parser.options}
    assert {name for name in parsers[0].entries if name not in known} == set()


READ = {  # words → what the run has
    "--learning_rate 1e-3 --num_train_epochs 2": lambda run: run.arguments.learning_rate == 1e-3,
    "--lr=1e-3 --epochs=2": lambda run: (run.arguments.learning_rate, run.arguments.num_train_epochs) == (1e-3, 2),
    "--per-device-train-batch-size 4": lambda run: run.arguments.per_device_train_batch_size == 4,
    "--micro-batch-size=4": lambda run: run.arguments.per_device_train_batch_size == 4,
    "--field instruction=q --field output=a": lambda run: run.data.renamed == {"q": "instruction", "a": "output"},
    "--dataset_text_field body": lambda run: run.data.renamed == {"body": "text"},
    "--packing no --no-chunked-loss": lambda run: (run.arguments.packing, run.options.chunked_loss) == (False, False),
    "--bf16": lambda run: run.arguments.bf16 is True and run.options.keep_memory,
    "--no-keep-memory --dtype bf16": lambda run: not run.options.keep_memory and run.model.dtype == "bfloat16",
    "": lambda run: run.config.seed == S2FTConfig().seed,
    "--seed 7": lambda run: run.config.seed == 7 == run.arguments.seed,
    "--seed 7 --selection-seed 0": lambda run: (run.config.seed, run.arguments.seed) == (0, 7),
    "--layers 1 --layers 2 3": lambda run: run.config.layers == [1, 2, 3],
}


@pytest.mark.parametrize("words", READ)
def test_words_become_values(words):
    assert READ[words](parse(*NEEDED, *words.split()))


SUGGESTED = {
    "--learning-rat": "did you mean --learning-rate?",
    "--lora-rank": "did you mean --match-lora-rank?",
    "--autocast": "did you mean --bf16?",
    "--max_seq_length": "did you mean --max-length?",
    "--group-by-length": "did you mean --train-sampling-strategy group_by_length?",
    "--epoch": "did you mean --epochs?",
}


@pytest.mark.parametrize("word", SUGGESTED)
def test_an_unknown_option_is_answered_with_the_nearest_one(word, tmp_path):
    assert SUGGESTED[word] in message(parse, *NEEDED, word, "1")
    key = word[2:].replace("-", "_")
    said = message(from_yaml, tmp_path, {"model": "m", key: 1})
    assert f"run.yaml: there is no option {key}" in said and SUGGESTED[word] in said


WRONG = [
    ({"learning_rate": [1]}, "learning_rate must be one value, got [1]"),
    ({"learning_rate": "much"}, "learning_rate must be a number, got 'much'"),
    ({"lr": -1}, "learning_rate must be positive, got -1"),
    ({"max_steps": 1.5}, "max_steps must be a whole number, got '1.5'"),
    ({"packing": "perhaps"}, "packing must be true or false, got 'perhaps'"),
    ({"optim": "adam"}, "did you mean adamw_torch?"),
    ({"dtype": True}, "dtype must not be true; put a word into quotes"),
    ({"model_init_kwargs": 3}, "model_init_kwargs"),
    ({"seed": 10**30}, "seed must be at most 4294967295"),
    ({"label_smoothing_factor": 1}, "label_smoothing_factor does not work here: "),
    ({"use_liger_kernel": True}, "use_liger_kernel does not work here: "),
    ({"auto_find_batch_size": True}, "auto_find_batch_size does not work here: "),
    ({"save_only_model": True}, "save_only_model does not work here: "),
    ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint does not work here: "),
    ({"optim": "galore_adamw"}, "works on the gradients of whole weights"),
    ({"hub_strategy": "all_checkpoints"}, "the adapter is uploaded once, at the end"),
    ({"truncation_mode": "keep_end"}, "see too_long"),
    ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "dataset_kwargs is not used"),
    ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit and load_in_4bit exclude each other"),
    ({"env": [1]}, "env must hold lines such as"),
    ("a: [", "can't be read as YAML"),
    ("lr: 1\nseed: 2\nlr: 3", "lr stands twice"),
    ("lr: 1e-4\nlearning_rate: 1e-3\n", "run.yaml: lr and learning_rate are the same option: keep one of them"),
    ("- a", "must hold lines such as 'learning_rate: 2e-4', got list"),
]


@pytest.mark.parametrize("wrong, said", WRONG, ids=lambda value: str(value)[:40] if type(value) is not str else "")
def test_a_wrong_value_in_a_config_is_one_line(wrong, said, tmp_path):
    if isinstance(wrong, dict):
        wrong = {"model": "m", "data": "d", "output": "o", **wrong}
    assert said in message(from_yaml, tmp_path, wrong)


# ---- config files --------------------------------------------------------------------------------------

FULL = """
model_name_or_path: m
output-dir: o
learning_rate: 2e-5            # a word for PyYAML, and a number here
eval_strategy: no              # false for YAML
packing: false
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 1e-6}
model_init_kwargs:
  attn_implementation: eager
layers: [0, 1]
field: {output: a}
report_to: [tensorboard]
budget: 9.2M
datasets:
  - {path: x, split: train, fraction: 0.5}
  - {path: y, fraction: 0.5}
env: {S2FT_OF_A_CONFIG: 1}
"""


def test_a_config_holds_lists_dictionaries_switches_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("S2FT_OF_A_CONFIG", "")
    parsed = from_yaml(tmp_path, FULL, "--layers", "1", "--max-steps", "3")
    arguments = parsed.arguments
    assert arguments.learning_rate == 2e-5 and arguments.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert arguments.eval_strategy == "no" and arguments.packing is False and arguments.report_to == ["tensorboard"]
    assert arguments.model_init_kwargs == {"attn_implementation": "eager"} and arguments.max_steps == 3
    assert [entry["path"] for entry in parsed.data.datasets] == ["x", "y"] and parsed.data.renamed == {"a": "output"}
    assert parsed.config.layers == [1] and parsed.config.budget == 9_200_000  # the command line overrides
    assert os.environ["S2FT_OF_A_CONFIG"] == "1"


STOP_AT_IMPORT = """
import os, sys
from s2ft.cli.main import main

class Stop:
    def find_spec(self, name, path, target=None):
        if name in ("torch", "transformers", "huggingface_hub"):
            print(name, os.environ.get("HF_HUB_OFFLINE"), flush=True)
            os._exit(3)

sys.meta_path.insert(0, Stop())
main(["sft", "--config", "run.yaml"])
"""


def test_the_environment_is_set_before_other_libraries_are_imported(tmp_path):
    """They read it when they are imported. The process ends at the first such import."""
    (tmp_path / "run.yaml").write_text("env: {HF_HUB_OFFLINE: 'of the file'}\nmodel: m\n")
    done = subprocess.run([sys.executable, "-c", STOP_AT_IMPORT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 3 and done.stdout.split(maxsplit=1)[1] == "of the file\n", done.stderr


def test_the_written_config_gives_the_same_options_and_no_secret(tmp_path):
    first = from_yaml(tmp_path, FULL, "--hub-token", "secret", "--resume", "--num-train-epochs", "3")
    text = config_text(first)
    assert "secret" not in text and "resume" not in text
    assert "num_train_epochs: 3" in text  # the default, but without it the epochs would follow from the rows
    assert text.startswith("# s2ft ") and "torch" in text.splitlines()[0] and "trl" in text.splitlines()[0]
    again = from_yaml(tmp_path, text)
    assert config_text(again) == text and first.determining() == again.determining()


def test_a_resumed_run_may_log_save_and_evaluate_more_often():
    def options(*words):
        return parse(*NEEDED, *words).determining()

    free = ["--log-steps", 5, "--save-steps", 7, "--eval-steps", 3, "--report-to", "tensorboard", "--stop-after", 4]
    assert (
        options() == options(*free) == options("--epochs", 3) == options("--resume", "--overwrite", "--run-name", "a")
    )
    bound = (["--lr", 1], ["--seed", 1], ["--limit", 5], ["--packing"], ["--load-in-4bit"], ["--name", "a"],
             ["--load-best-model-at-end"], ["--batch-size", 8, "--epochs", 2])  # fmt: skip
    assert [words for words in bound if options() == options(*words)] == []
    assert options("--load-best-model-at-end", "--eval-data", "a") != options(
        "--load-best-model-at-end", "--eval-data", "b"
    )


def test_options_of_lora_become_the_size_of_the_selection(tmp_path, caplog):
    caplog.set_level("INFO")
    lora = {
        "model": "m",
        "data": "d",
        "output": "o",
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "use_dora": True,
    }
    assert from_yaml(tmp_path, lora).config.match_lora_rank == 16
    assert "S²FT takes the place of LoRA: match_lora_rank 16; not used: lora_alpha, use_dora" in caplog.text
    given = from_yaml(tmp_path, {**lora, "d_ratio": 0.1, "lora_modules_to_save": ["lm_head"]}).config
    assert given.match_lora_rank is None and given.modules_to_save == ["lm_head"]
    assert from_yaml(tmp_path, {**lora, "use_peft": False}).config.match_lora_rank is None


EVALUATION = {  # → when to evaluate, and every how many updates to save
    "eval_steps: 5": ("steps", 5, 200, False),
    "eval_steps: 0": ("no", None, 200, False),
    "eval_strategy: epoch": ("epoch", None, 200, False),
    "eval_strategy: steps": ("steps", 200, 200, False),
    "{eval_strategy: steps, logging_steps: 7}": ("steps", 7, 200, False),  # as in transformers
    "{load_best_model_at_end: true, save_steps: 7}": ("steps", 7, 7, True),
    "{early_stopping_patience: 2, eval_steps: 3}": ("steps", 3, 3, True),
    "{early_stopping_patience: 2, eval_steps: 3, save_steps: 6}": ("steps", 3, 6, True),
    "{load_best_model_at_end: true, save_strategy: epoch}": ("epoch", None, 200, True),
}


@pytest.mark.parametrize("text", EVALUATION)
def test_the_options_of_an_evaluation_need_each_other_only_once(text, tmp_path):
    arguments = from_yaml(tmp_path, text, *NEEDED).arguments
    found = arguments.eval_strategy, arguments.eval_steps, arguments.save_steps, arguments.load_best_model_at_end
    assert found == EVALUATION[text]


# ---- batches -------------------------------------------------------------------------------------------

BATCHES = {  # rows, per device, passes, devices → per device, passes
    (None, None, None, 1): (8, 8),
    (None, None, None, 3): (7, 3),
    (None, 2, None, 4): (2, 1),
    (None, None, 3, 1): (8, 3),
    (4, None, None, 1): (4, 1),
    (32, None, None, 2): (8, 2),
    (12, None, None, 1): (6, 2),
    (64, 2, None, 2): (2, 16),
    (64, None, 16, 1): (4, 16),
    (16, 4, 2, 2): (4, 2),
    (7, None, None, 2): "batch_size 7 must be a multiple of 2: of per_device_train_batch_size 1 × "
    "gradient_accumulation_steps 1 × 2 devices",
    (3, None, None, 4): "batch_size 3 must be a multiple of 4: of ",
    (10, 4, None, 1): "multiple of 4: of per_device_train_batch_size 4 × gradient_accumulation_steps 1 × 1 device",
    (16, 4, 3, 1): "batch_size 16 contradicts per_device_train_batch_size 4 × gradient_accumulation_steps 3 × 1 device "
    "= 12 rows: leave one of them out",
}


def alone(devices, **options):
    """Arguments of a trainer whose devices hold the whole model each."""
    return SimpleNamespace(world_size=devices, parallelism_config=None, **options)


@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_rows_of_an_update_are_divided_among_devices_and_passes(case):
    rows, micro, passes, devices = case
    names = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": passes}
    given = {name: value for name, value in names.items() if value is not None}
    arguments = alone(devices, **{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, **given})
    if isinstance(BATCHES[case], str):
        with pytest.raises(ValueError) as error:
            set_batches(arguments, RunOptions(batch_size=rows), given)
        assert BATCHES[case] in str(error.value)
        return
    line = set_batches(arguments, RunOptions(batch_size=rows), given)
    found = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    assert found == BATCHES[case] and line.startswith(f"{found[0] * found[1] * devices} rows an update")


@pytest.mark.parametrize(
    "rows, changes, expected",
    [
        (67, {}, (4, 3)),  # 50 updates, not 3
        (400, {}, (32, 3)),
        (1000, {}, (None, 3)),
        (8, {}, (4, 16)),
        (8, {"num_train_epochs": 2}, (4, 2)),
        (40, {"max_steps": 9}, (32, 3)),  # no more than there are rows
        (67, {"num_train_epochs": 40}, (None, 40)),
    ],
)
def test_few_rows_make_smaller_updates_and_more_epochs(rows, changes, expected):
    arguments = alone(1, **{"num_train_epochs": 3, "max_steps": -1, **changes})
    run = SimpleNamespace(arguments=arguments, given=changes, say=str, method=SimpleNamespace(fits_batch=True))
    assert (fitting_batch(run, rows), arguments.num_train_epochs) == expected
    run.given = {"gradient_accumulation_steps": 2}
    assert fitting_batch(run, rows) is None
