"""s2ft generate prints the answer on stdout and reports a user's mistake in one line."""

import io
import sys

import pytest
from train.tiny import save_tiny, tiny_tokenizer

import s2ft
from s2ft.cli.main import main
from s2ft.text.generation import generate
from s2ft.text.models import load_model

UNTIED = dict(tie_word_embeddings=False)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with model/ and adapter/."""
    import torch

    work = tmp_path_factory.mktemp("work")
    save_tiny(work / "model", **UNTIED)
    model, _ = load_model(str(work / "model"))
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.2, o_ratio=0.5))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    s2ft.save_adapter(model, work / "adapter")
    return work


def answer(capsys, work, *arguments):
    assert main(["generate", "--model", str(work / "model"), *map(str, arguments)]) == 0
    return capsys.readouterr().out


def expected(work, prompt, count, adapter=False):
    model, tokenizer = load_model(str(work / "model"))
    if adapter:
        s2ft.load_adapter(model, work / "adapter")
    return generate(model, tokenizer, [tokenizer(prompt, add_special_tokens=False)["input_ids"]], 1, count)[0]


@pytest.mark.parametrize("adapter", [False, True])
def test_a_greedy_answer_equals_that_of_evaluation(capsys, work, adapter):
    options = ["--adapter", work / "adapter"] if adapter else []
    found = answer(capsys, work, "--prompt", "Hello", "--max-new-tokens", 20, *options)
    assert found.endswith("\n") and found.strip() == expected(work, "Hello", 20, adapter)


def test_chat_puts_the_prompt_in_the_template(capsys, work):
    text = tiny_tokenizer().apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert answer(capsys, work, "--prompt", "Hello", "--chat", "--max-new-tokens", 9).strip() == expected(work, text, 9)


def test_the_prompt_comes_from_a_file_or_stdin(capsys, work, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("Hello\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    wanted = answer(capsys, work, "--prompt", "Hello", "--max-new-tokens", 9)
    assert answer(capsys, work, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 9) == wanted
    assert answer(capsys, work, "--prompt", "-", "--max-new-tokens", 9) == wanted


def test_a_seed_gives_the_same_answer_again(capsys, work):
    draw = ["--prompt", "Hello", "--max-new-tokens", 20, "--temperature", 1.5, "--top-p", 0.9, "--seed"]
    assert answer(capsys, work, *draw, 1) == answer(capsys, work, *draw, 1) != answer(capsys, work, *draw, 2)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--prompt or --prompt-file"),
        (["--prompt", "a", "--prompt-file", "b"], "--prompt or --prompt-file"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["--prompt", ""], "empty"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens"),
        (["--prompt", "a", "--top-p", "0"], "top_p"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a" * 300], "context is 256"),
        (["--prompt", "a", "--adapter", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(capsys, work, arguments, words):
    assert main(["generate", "--model", str(work / "model"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
