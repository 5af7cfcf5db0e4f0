"""s2ft dpo and s2ft grpo from the command line: their folders, their config files, and what they refuse."""

import json

import pytest
import yaml
from support.commands import s2ft_command
from support.inside import read_log
from support.states import same, tensors_of
from train.tiny import write_jsonl

import s2ft
from s2ft.cli.main import main

PAIRS = [{"question": f"{a}+1=", "chosen": str(a + 1), "rejected": "no idea"} for a in range(12)]
TASKS = [{"question": f"{a}+1=", "answer": str(a + 1)} for a in range(8)]
SHORT = "def short(completions, **_):\n    return [-len(text[0]['content']) / 10 for text in completions]\n"


@pytest.fixture(scope="module")
def work(work):
    write_jsonl(work / "pairs.jsonl", PAIRS)
    write_jsonl(work / "held-out.jsonl", PAIRS[:3])
    write_jsonl(work / "tasks.jsonl", TASKS)
    (work / "mine.py").write_text(SHORT)
    return work


@pytest.fixture(autouse=True)
def _there(work, monkeypatch):
    monkeypatch.chdir(work)


def run(command, output, *more):
    data = "pairs.jsonl" if command == "dpo" else "tasks.jsonl"
    own = ["--rewards", "mine.py:short", "--num-generations", 4, "--max-completion-length", 8]
    steps = ("--max-steps", 2, "--batch-size", 4, "--lr", 1e-2, *(own if command == "grpo" else []))
    return s2ft_command(command, "--model", "model", "--data", data, "--output", output, *steps, *more)


RUNS = {  # options, what is printed, names in the log, values of config.yaml
    "dpo": (
        ["--eval-data", "held-out.jsonl", "--beta", 0.2],
        "adapter: dpo/adapter",
        {"loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "eval_loss", "eval_rewards/accuracies"},
        {"beta": 0.2, "batch_size": 4},
    ),
    "grpo": (
        ["--epsilon", 0.3, "--beta", 0.1],
        "reward -",
        {"loss", "reward", "rewards/short/mean", "kl", "completions/mean_length"},
        {"epsilon": 0.3, "rewards": ["mine.py:short"]},
    ),
}


@pytest.mark.parametrize("command", RUNS)
def test_a_run_has_its_prompt_its_log_and_a_config_that_repeats_it(command, work, capsys):
    options, printed, names, values = RUNS[command]
    assert run(command, command, *options) == 0 and printed in capsys.readouterr().out
    info = s2ft.read_adapter(f"{command}/adapter").info
    assert info["training"]["method"] == command and "<|im_start|>" in info["prompt"]["template"]
    assert names <= {name for line in read_log(work / command / "log.jsonl") for name in line}
    assert values.items() <= yaml.safe_load((work / command / "config.yaml").read_text()).items()
    assert "training.adam_epsilon" not in json.loads((work / command / "run.json").read_text())
    assert main([command, "--config", f"{command}/config.yaml", "--output", f"{command}-again"]) == 0
    assert same(tensors_of(f"{command}/adapter"), tensors_of(f"{command}-again/adapter"))


def test_pairs_of_plain_text_say_that_no_template_is_used_and_what_was_learned(work, capsys, caplog):
    caplog.set_level("INFO")
    write_jsonl(work / "plain.jsonl", [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": "no"} for a in range(8)])
    options = ["--data", "plain.jsonl", "--max-steps", 2, "--batch-size", 4, "--output", "plain", "--model", "model"]
    assert s2ft_command("dpo", *options, "--lr", 1e-9) == 0
    assert "the model's chat template is not used: --form chat uses it" in caplog.text
    assert "the loss has hardly changed, from 0.6931 to 0.6931: train longer" in caplog.text
    assert "chosen above rejected: 0% of the first logged pairs" in capsys.readouterr().out
    caplog.clear()
    assert s2ft_command("dpo", *options, "--form", "text", "--overwrite", "--lr", 1e-2) == 0
    assert "template is not used" not in caplog.text


def test_a_run_goes_on_only_with_the_same_rewards(capsys):
    assert run("grpo", "stopped", "--stop-after", 1) == 0
    assert run("grpo", "stopped", "--resume", "--rewards", "format") == 2
    assert "rewards was ['mine.py:short'], is ['mine.py:short', 'format']" in capsys.readouterr().err
    assert run("grpo", "stopped", "--resume") == 0


def test_a_reward_that_fails_is_named_and_the_run_can_go_on(work, capsys):
    (work / "fails.py").write_text("def broken(completions, **_):\n    return 1 / 0\n")
    assert run("grpo", "failed", "--rewards", "fails.py") == 2
    assert "reward fails.py:broken raised ZeroDivisionError in line 2: division by zero" in capsys.readouterr().err
