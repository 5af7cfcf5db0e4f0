"""Every script of examples/ runs unchanged and prints what its docstring promises."""

import ast
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
HELPER = "tiny.py"  # the scripts import it
PRINTED = {
    "nano.py": ["question: ", "before: ", "trained: ", "loss: ", "merged: largest difference ", "after: "],
    "finetune_own_data.py": ["mlp.down_proj", "loss: ", "What is 0 + 0? -> "],
    "classification_head.py": ["score.weight", "loss: ", "the same after reloading: True"],
    "many_adapters.py": ["sea: loss", "city: loss", "one batch gives the same tokens: True"],
    "serve_and_query.py": ["models: base, polite", "base: ", "polite: "],
    "dpo_with_trl.py": ["loss: 0.693 before", "pairs in which the chosen answer gains: "],
    "grpo_reasoning_gym.py": ["mlp.down_proj", "reward of each update: ", "score of other problems: "],
    "grpo_with_trl.py": ["mlp.down_proj", "reward of each update: ", "adapter: grpo-adapter"],
    "images_with_trl.py": ["mlp.down_proj", "loss: ", "the same after reloading: True"],
    "embeddings.py": [
        "attention.output.dense",
        "questions that find their answer: ",
        "adapter: the same similarities: True",
        "merged model: the same similarities: True",
    ],
    "own_model.py": ["up", "down", "loss: ", "merged: Linear"],
    "export_and_reload.py": ["LoRA in PEFT: ", "merged: "],
}
NEEDS = {
    "images_with_trl.py": "torchvision",
    "embeddings.py": "sentence_transformers",
    "grpo_reasoning_gym.py": "reasoning_gym",
}
ARGUMENTS = {"nano.py": ["--model", "model", "--channels", "5", "--steps", "2"]}  # it makes no tiny model itself


def test_every_script_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*PRINTED, HELPER}


@pytest.mark.parametrize("script", PRINTED)
def test_a_script_runs(script, tmp_path, monkeypatch, capsys):
    if script in NEEDS:
        pytest.importorskip(NEEDS[script], reason=f"{NEEDS[script]} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [script, *ARGUMENTS.get(script, ())])
    monkeypatch.setitem(sys.modules, "tiny", None)  # tests/train has a module of this name; it is put back at the end
    del sys.modules["tiny"]
    if script in ARGUMENTS:
        for part in runpy.run_path(str(EXAMPLES / HELPER))["load"]():
            part.save_pretrained("model")
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    printed = capsys.readouterr().out
    print(printed)
    assert [words for words in PRINTED[script] if words not in printed] == []


@pytest.mark.parametrize("script", PRINTED)
def test_the_docstring_of_a_script_contains_its_command(script):
    docstring = ast.get_docstring(ast.parse((EXAMPLES / script).read_text(encoding="utf-8")))
    assert f"python examples/{script}" in docstring and "prints" in docstring


def test_the_readme_lists_every_script():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [name for name in PRINTED if f"[{name}]({name})" not in text] == []
