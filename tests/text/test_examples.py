"""Examples for scoring are read by the same functions as training data."""

import pytest
from train.tiny import write_jsonl

from s2ft.text.data import DataOptions
from s2ft.text.examples import read_examples
from s2ft.text.prompts import PromptFormat

GOOD = {"instruction": "Add.", "input": "1 and 2", "output": "3", "answer": "3"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "3"},
    {"role": "assistant", "content": "4"},
]


def read(tmp_path, *rows, **options):
    return read_examples(DataOptions(data=[str(write_jsonl(tmp_path / "a.jsonl", rows))], **options))


def test_last_answer_of_a_chat_is_the_output(tmp_path):
    lists = {"prompt": CHAT[:2], "completion": CHAT[2:]}
    for example in read(tmp_path, {"messages": CHAT}, lists):
        assert (example.question, example.output, example.answer) == ("3", "4", None)
        assert [message["content"] for message in example.conversation] == ["Be brief.", "1", "2", "3"]


def test_instruction_and_its_short_answer(tmp_path):
    (example,) = read(tmp_path, GOOD)
    assert (example.question, example.output, example.answer) == ("Add.\n\n1 and 2", "3", "3")


@pytest.mark.parametrize("value, text", [(3, "3"), (2.5, "2.5"), (True, "true"), ("x", "x"), (["C"], "C")])
def test_answer_may_be_a_number_a_bool_or_a_list_of_one(tmp_path, value, text):
    (example,) = read(tmp_path, {**GOOD, "answer": value})
    assert example.answer == text


def test_output_may_be_empty_if_the_answer_is_scored(tmp_path):
    assert read(tmp_path, {**GOOD, "output": ""})[0].output == ""
    with pytest.raises(ValueError, match="line 1: field 'output' is empty"):
        read(tmp_path, {**GOOD, "output": "", "answer": None})


def test_text_prompt_is_used_as_it_is_or_becomes_a_message(tmp_path):
    (example,) = read(tmp_path, {"prompt": "2+3=", "completion": "5"})
    assert example.question == "2+3=" == example.prompt_for(PromptFormat("text")) and example.output == "5"
    messages = example.prompt_for(PromptFormat("chat", None, "Be brief."))
    assert [message["content"] for message in messages] == ["Be brief.", "2+3="]


def test_text_without_a_question_can_not_be_scored(tmp_path):
    with pytest.raises(ValueError, match="a.jsonl, line 1: a row with only 'text' has no question"):
        read(tmp_path, {"text": "a"})


def test_several_files_and_a_limit(tmp_path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [{**GOOD, "output": name}] * 2) for name in "ab"]
    assert [example.output for example in read_examples(files)] == ["a", "a", "b", "b"]
    assert [example.output for example in read_examples(files, limit=3)] == ["a", "a", "b"]
