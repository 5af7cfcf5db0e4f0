"""s2ft chat: a script gives it lines, and reads the answers on stdout."""

import io
import json
import sys

import pytest
from cli.test_generate import OTHER, UNTIED, answer
from support.commands import s2ft_command
from support.inside import Chat, Sampler, chat as command, load_with_adapter, native
from train.tiny import CHAT, save_random_adapter, save_tiny, tiny_model

import s2ft

SHORT = ("--max-new-tokens", 9)


@pytest.fixture(scope="module")
def work(work):
    """A folder with model/ and the outputs of two runs, runs/math and runs/talk."""
    save_tiny(work / "model", **UNTIED)
    for seed, (name, template) in enumerate({"math": CHAT, "talk": OTHER}.items()):
        info, folder = {"prompt": {"form": "chat", "template": template, "system": f"Be {name}."}}, work / "runs" / name
        save_random_adapter(
            folder / "adapter", tiny_model(**UNTIED), 0.3, info=info, d_ratio=0.2, o_ratio=0.5, seed=seed
        )
        (folder / "config.yaml").touch()
    return work


@pytest.fixture
def chat(work, monkeypatch, capsys):
    """A function that gives lines to the command and returns its status, the answers and the other output."""

    def run(lines, *arguments, terminal=False):
        stdin = io.StringIO("".join(f"{line}\n" for line in lines))
        stdin.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stdin", stdin)
        return s2ft_command("chat", "--model", work / "model", *SHORT, *arguments), *capsys.readouterr()

    return run


def test_each_line_is_answered_with_the_prompt_of_the_adapter(chat, capsys, work):
    wanted = answer(capsys, work, *SHORT, "--prompt", "Hello", "--adapter", work / "runs/talk")
    assert chat(["Hello"], "--adapter", work / "runs/talk")[:2] == (0, wanted)
    wanted = answer(capsys, work, *SHORT, "--prompt", "Hello\nyou", "--system", "S")
    assert chat(["", "Hello\\", "you"], "--system", "S")[:2] == (0, wanted)
    assert chat(["//x"])[1] == answer(capsys, work, *SHORT, "--prompt", "/x")


def test_adapters_are_switched_in_mid_conversation(chat, work, tmp_path):
    """Each answer is that of a chat which had the adapter from the beginning and the same messages before."""
    both = ["--adapter", work / "runs"]
    lines = [
        "/adapter",
        "Hello",
        "/adapter talk",
        "next",
        "/adapter base",
        "and then?",
        "/adapter math",
        "what is the sum?",
        f"/save {tmp_path}/a",
    ]
    status, out, err = chat(lines, *both)
    assert (
        status == 0
        and "adapters: math (on), talk, base" in err
        and "(adapter talk)" in err
        and "(the model without an adapter)" in err
    )
    said = json.loads((tmp_path / "a").read_text())["messages"]
    assert out == "".join(one["content"] + "\n" for one in said if one["role"] == "assistant")
    assert said[0] == {"role": "system", "content": "Be math."}
    for turn, name in enumerate(("math", "talk", None, "math")):
        model, prompter = load_with_adapter(str(work / "model"), name and str(work / "runs" / name))
        alone = Chat(model, prompter, lambda seed: Sampler(), 9)
        alone.messages = said[1 : 1 + 2 * turn]
        assert "".join(alone.answer(said[1 + 2 * turn]["content"])) == said[2 + 2 * turn]["content"], name


def test_an_adapter_of_plain_text_chats_in_the_template_of_the_base(chat, work, tmp_path):
    adapter = s2ft.read_adapter(work / "runs/math")
    adapter.info["prompt"] = {"form": "text", "template": None, "system": None}
    native.write(adapter, tmp_path / "text")
    _, out, err = chat(["Hello"], "--adapter", tmp_path / "text")
    assert "adapter text was trained on plain text" in err
    assert out == chat(['/system ""', "Hello"], "--adapter", work / "runs/math")[1]  # the same without a system prompt


def test_undo_reset_system_and_save(chat, tmp_path):
    lines = [
        "Hello",
        "/undo",
        "Hello",
        '/system "Be brief."',
        "more",
        "/system",
        f"/save {tmp_path}/a.jsonl",
        "/exit",
        "x",
    ]
    status, out, err = chat(lines)
    messages = json.loads((tmp_path / "a.jsonl").read_text())["messages"]
    assert status == 0 and [one["role"] for one in messages] == ["system", *["user", "assistant"] * 2]
    assert out.startswith((messages[2]["content"] + "\n") * 2) and messages[0]["content"] == "Be brief."
    assert "Be brief.\n(4 messages in" in err
    assert chat(["Hello", "/reset", "Hello"])[1] == (messages[2]["content"] + "\n") * 2


@pytest.mark.parametrize(
    "lines, options, message",
    [
        (["/adaptor x"], [], "there is no /adaptor; did you mean /adapter? (see /help)"),
        (["/adapter maths"], ["--adapter", "RUNS"], "there is no adapter 'maths'; did you mean math?"),
        (["/undo"], [], "there is nothing to undo"),
        (["/save x"], [], "there is no conversation to save"),
        (["Hello", "/save RUNS"], [], "exists: choose another"),
        (["x" * 300], [], "the model's context is 256 tokens"),
    ],
)
def test_mistakes_end_a_script_with_one_line(chat, work, lines, options, message):
    place = lambda text: text.replace("RUNS", str(work / "runs"))  # noqa: E731
    status, _, err = chat([place(line) for line in lines], *map(place, options))
    assert status == 2 and message in err and "Traceback" not in err


def test_a_mistake_in_a_terminal_leaves_the_chat_and_the_present_adapter(chat, work, tmp_path):
    save_random_adapter(tmp_path / "other", tiny_model(seed=5, **UNTIED), d_ratio=0.2)
    lines = ["/adaptor x", "Hello", "/adapter other", "/adapter"]
    err = chat(lines, "--adapter", work / "runs/math", tmp_path / "other", terminal=True)[2]
    assert "error: there is no /adaptor" in err
    assert "was trained on another base" in err and "math (on), other, base" in err


def test_ctrl_c_stops_an_answer_in_a_terminal_and_ends_a_script(chat, monkeypatch, tmp_path):
    printed = []

    def interrupted(*words, **options):
        print(*words, **options)
        printed.append(words)
        if len(printed) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "print", interrupted, raising=False)
    lines = ["Hello", "more", f"/save {tmp_path}/a"]
    assert chat(lines, "--max-new-tokens", 20, terminal=True)[0] == 0
    first, second = [one for one in json.loads((tmp_path / "a").read_text())["messages"] if one["role"] == "assistant"]
    assert 0 < len(first["content"]) < len(second["content"])
    printed.clear()
    assert chat(lines, "--max-new-tokens", 20)[0] == 130
