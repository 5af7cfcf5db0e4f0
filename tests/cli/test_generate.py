"""s2ft generate prints the answer on stdout and reports a user's mistake in one line."""

import io
import sys

import pytest
from support.inside import generate, load_model, native
from train.tiny import CHAT, save_tiny, tiny_tokenizer

import s2ft
from s2ft.cli.main import main

UNTIED = dict(tie_word_embeddings=False)
OTHER = CHAT.replace("<|im_start|>", "<|endoftext|>")


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


def chat_text(*messages, template=None):
    messages = [{"role": role, "content": content} for role, content in messages]
    return tiny_tokenizer().apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )


HELLO = chat_text(("user", "Hello"))


@pytest.mark.parametrize("adapter", [False, True])
def test_a_greedy_answer_equals_that_of_evaluation(capsys, work, adapter):
    options = ["--adapter", work / "adapter"] if adapter else []
    found = answer(capsys, work, "--prompt", "Hello", "--max-new-tokens", 20, *options)
    assert found.endswith("\n") and found.strip() == expected(work, HELLO, 20, adapter)


def test_the_prompt_is_that_of_the_training(capsys, work, tmp_path):
    """The template and the system prompt are in the adapter. A checkpoint and the output of a run have them too."""
    adapter = s2ft.read_adapter(work / "adapter")
    adapter.info["prompt"] = {"form": "chat", "template": OTHER, "system": "Be brief."}
    native.write(adapter, tmp_path / "adapter")
    (tmp_path / "config.yaml").touch()
    ask = ["--adapter", tmp_path, "--prompt", "Hello", "--max-new-tokens", 9]
    for options, wanted in {
        (): chat_text(("system", "Be brief."), ("user", "Hello"), template=OTHER),
        ("--system", "Be long."): chat_text(("system", "Be long."), ("user", "Hello"), template=OTHER),
        ("--system", ""): chat_text(("user", "Hello"), template=OTHER),
        ("--raw",): "Hello",
    }.items():
        assert answer(capsys, work, *ask, *options).strip() == expected(work, wanted, 9, adapter=True), options


def test_an_adapter_of_plain_text_continues_the_prompt_unless_asked_for_a_chat(capsys, work, tmp_path):
    adapter = s2ft.read_adapter(work / "adapter")
    adapter.info["prompt"] = {"form": "text", "template": None, "system": None}
    native.write(adapter, tmp_path)
    ask = ["--adapter", tmp_path, "--prompt", "Hello", "--max-new-tokens", 9]
    assert answer(capsys, work, *ask).strip() == expected(work, "Hello", 9, adapter=True)
    assert answer(capsys, work, *ask, "--chat").strip() == expected(work, HELLO, 9, adapter=True)


def test_the_prompt_comes_from_a_file_or_stdin(capsys, work, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("Hello\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    wanted = answer(capsys, work, "--prompt", "Hello", "--max-new-tokens", 9)
    assert answer(capsys, work, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 9) == wanted
    assert answer(capsys, work, "--prompt", "-", "--max-new-tokens", 9) == wanted


def test_options_of_the_sampling_are_those_of_the_sampler_and_a_seed_gives_the_same_answer_again(capsys, work):
    draw = ["--prompt", "Hello", "--max-new-tokens", 20, "--temperature", 1.5, "--seed", 1]
    assert answer(capsys, work, *draw) == answer(capsys, work, *draw) != answer(capsys, work, *draw[:-1], 2)
    greedy = answer(capsys, work, "--prompt", "Hello", "--max-new-tokens", 20)
    assert answer(capsys, work, *draw, "--top-k", 1) == greedy == answer(capsys, work, *draw, "--min-p", 1)
    assert answer(capsys, work, "--prompt", "Hello", "--max-new-tokens", 20, "--repetition-penalty", 9) != greedy
