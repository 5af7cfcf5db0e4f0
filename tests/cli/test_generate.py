"""s2ft generate prints the answer on stdout and reports a user's mistake in one line."""

import io
import sys

import pytest
from support.commands import s2ft_command
from support.inside import generate, load_model, native
from train.tiny import OTHER, UNTIED, save_random_adapter, save_tiny, tiny_model, tiny_tokenizer

import s2ft


@pytest.fixture(scope="module")
def work(work):
    """A folder with model/ and adapter/."""
    save_tiny(work / "model", **UNTIED)
    save_random_adapter(work / "adapter", tiny_model(**UNTIED), 0.3, d_ratio=0.2, o_ratio=0.5)
    return work


def answer(capsys, work, *arguments):
    assert s2ft_command("generate", "--model", work / "model", *arguments) == 0
    return capsys.readouterr().out


def chat_text(*messages, template=None):
    messages = [{"role": role, "content": content} for role, content in messages]
    return tiny_tokenizer().apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )


HELLO = chat_text(("user", "Hello"))
CHAT_FORM = {"form": "chat", "template": OTHER, "system": "Be brief."}
TEXT_FORM = {"form": "text", "template": None, "system": None}
PROMPTS = [  # what the adapter records of its prompt, options, and the text that is continued
    (None, (), HELLO),
    (CHAT_FORM, (), chat_text(("system", "Be brief."), ("user", "Hello"), template=OTHER)),
    (CHAT_FORM, ("--system", "Be long."), chat_text(("system", "Be long."), ("user", "Hello"), template=OTHER)),
    (CHAT_FORM, ("--system", ""), chat_text(("user", "Hello"), template=OTHER)),
    (CHAT_FORM, ("--raw",), "Hello"),
    (TEXT_FORM, (), "Hello"),
    (TEXT_FORM, ("--chat",), HELLO),
]


@pytest.mark.parametrize("form, options, wanted", PROMPTS)
def test_the_prompt_is_that_of_the_training(form, options, wanted, capsys, work, tmp_path):
    """The answer is that of an evaluation. A checkpoint and the output of a run are taken too."""
    adapter = s2ft.read_adapter(work / "adapter")
    adapter.info |= {"prompt": form} if form else {}
    native.write(adapter, tmp_path / "adapter")
    (tmp_path / "config.yaml").touch()
    model, tokenizer = load_model(str(work / "model"))
    s2ft.load_adapter(model, work / "adapter")
    expected = generate(model, tokenizer, [tokenizer(wanted, add_special_tokens=False)["input_ids"]], 1, 9)[0]
    found = answer(capsys, work, "--adapter", tmp_path, "--prompt", "Hello", "--max-new-tokens", 9, *options)
    assert found.endswith("\n") and found.strip() == expected


def test_the_prompt_comes_from_a_file_or_stdin(capsys, work, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("Hello\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert (
        len(
            {
                answer(capsys, work, *words, "--max-new-tokens", 9)
                for words in (["--prompt", "Hello"], ["--prompt-file", tmp_path / "prompt.txt"], ["--prompt", "-"])
            }
        )
        == 1
    )


def test_options_of_the_sampling_are_those_of_the_sampler_and_a_seed_gives_the_same_answer_again(capsys, work):
    draw = ["--prompt", "Hello", "--max-new-tokens", 20, "--temperature", 1.5, "--seed", 1]
    assert answer(capsys, work, *draw) == answer(capsys, work, *draw) != answer(capsys, work, *draw[:-1], 2)
    greedy = answer(capsys, work, *draw[:4])
    assert answer(capsys, work, *draw, "--top-k", 1) == greedy == answer(capsys, work, *draw, "--min-p", 1)
    assert answer(capsys, work, *draw[:4], "--repetition-penalty", 9) != greedy
