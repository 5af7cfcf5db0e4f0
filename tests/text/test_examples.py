"""Data files: every accepted format is read, and every bad row raises a clear error."""

import gzip
import json

import pytest
from train.tiny import write_jsonl

from s2ft.text.examples import read_examples

GOOD = {"instruction": "Add.", "input": "1 and 2", "output": "3", "answer": "3"}


def read(tmp_path, text, name="data.jsonl"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_examples(path)


def test_instruction_with_input(tmp_path):
    (example,) = read_examples(write_jsonl(tmp_path / "a.jsonl", [GOOD]))
    assert example.question == "Add.\n\n1 and 2" and example.output == "3" and example.answer == "3"


def test_empty_or_absent_input_adds_nothing(tmp_path):
    rows = [{**GOOD, "input": ""}, {**GOOD, "input": None}, {"instruction": "Add.", "output": "3"}]
    assert {e.question for e in read_examples(write_jsonl(tmp_path / "a.jsonl", rows))} == {"Add."}


def test_prompt_completion(tmp_path):
    (example,) = read_examples(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}]))
    assert (example.question, example.output, example.answer) == ("p", "c", None)


def test_messages(tmp_path):
    turns = [("system", "be brief"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    row = {"messages": [{"role": role, "content": content, "extra": 0} for role, content in turns]}
    (example,) = read_examples(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert example.output == "4" and [m["content"] for m in example.conversation] == ["be brief", "1", "2", "3"]


def test_json_list_and_several_files_in_order(tmp_path):
    first = tmp_path / "a.json"
    first.write_text(json.dumps([GOOD, {**GOOD, "output": "4"}]))
    second = write_jsonl(tmp_path / "b.jsonl", [{**GOOD, "output": "5"}])
    assert [example.output for example in read_examples([first, second])] == ["3", "4", "5"]


@pytest.mark.parametrize("value, text", [(3, "3"), (2.5, "2.5"), (True, "true"), ("x", "x")])
def test_answer_may_be_a_number_or_a_bool(tmp_path, value, text):
    (example,) = read_examples(write_jsonl(tmp_path / "a.jsonl", [{**GOOD, "answer": value}]))
    assert example.answer == text


def test_byte_order_mark_and_blank_lines_and_line_separators(tmp_path):
    row = json.dumps({**GOOD, "output": "a\u2028b"}, ensure_ascii=False)
    (example,) = read(tmp_path, f"\ufeff\n{row}\r\n\n")
    assert example.output == "a\u2028b"


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json.*doesn't exist"):
        read_examples(tmp_path / "nowhere.json")


def test_a_folder_is_not_a_data_file(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        read_examples(tmp_path)


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_empty_file(tmp_path, text):
    with pytest.raises(ValueError, match="data.jsonl is empty"):
        read(tmp_path, text)


def test_empty_list(tmp_path):
    with pytest.raises(ValueError, match="has no rows"):
        read(tmp_path, "[]")


def test_not_json_names_the_line(tmp_path):
    with pytest.raises(ValueError, match="data.jsonl, line 3: not JSON"):
        read(tmp_path, json.dumps(GOOD) + "\n\n{broken\n")


def test_not_a_json_list_names_the_line(tmp_path):
    with pytest.raises(ValueError, match="line 3: not JSON"):
        read(tmp_path, '[\n{"instruction": "a", "output": "b"},\n{"instruction": }]')


def test_not_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"instruction": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_examples(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"instruction": "a"}, "line 1: field 'output' is missing"),
        ({"output": "a"}, "line 1: field 'instruction' is missing"),
        ({"prompt": "a"}, "line 1: field 'completion' is missing"),
        ({"question": "a", "reply": "b"}, "line 1: needs 'instruction' and 'output'.* it has 'question', 'reply'"),
        ({"instruction": 3, "output": "b"}, "field 'instruction' must be text, got int"),
        ({"instruction": "a", "output": None}, "field 'output' must be text, got NoneType"),
        ({"instruction": "a", "output": " "}, "field 'output' is empty"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "field 'input' must be text, got list"),
        ({**GOOD, "answer": ["b"]}, "field 'answer' must be text or a number, got list"),
        ({"messages": "hi"}, "'messages' must be a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "at least two messages"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}, "'role' and 'content'"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "last message must be the assistant's"),
        ({"messages": [{"role": "assistant", "content": "a"}] * 2}, "before the last"),
        ([1], "expected an object"),
    ],
)
def test_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_examples(write_jsonl(tmp_path / "a.jsonl", [row]))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", "[" * 100000, "a.json, row 1: it is nested too deeply"),
        ("a.json", '[{"instruction": "a", "output": "b"}, ' + "[" * 100000, "a.json, row 2: it is nested too deeply"),
        (
            "a.jsonl",
            '{"instruction": "a", "output": "b"}\n{"a": ' + "[" * 100000,
            "a.jsonl, line 2: it is nested too deeply",
        ),
        (
            "a.json",
            '[{"instruction": "a", "output": "b"}, {"answer": ' + "9" * 6000 + "}]",
            "a.json, row 2: a number is too",
        ),
        ("a.jsonl", '{"instruction": "a", "output": ' + "9" * 6000 + "}", "a.jsonl, line 1: a number is too long"),
    ],
)
def test_json_that_python_can_not_read_names_file_and_row(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content, name)


@pytest.mark.parametrize(
    "row, field",
    [
        ('{"instruction": "\\ud800", "output": "x"}', "instruction"),
        ('{"prompt": "a", "completion": "\\udfff b"}', "completion"),
        ('{"instruction": "a", "input": "\\ud800", "output": "x"}', "input"),
        ('{"instruction": "a", "output": "x", "answer": "\\ud800"}', "answer"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}', "content"),
    ],
)
def test_half_of_a_surrogate_pair_names_the_field(tmp_path, row, field):
    with pytest.raises(ValueError, match=f"data.jsonl, line 1: field '{field}' is not valid Unicode: character 1 is"):
        read(tmp_path, row)


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    assert read(tmp_path, '{"instruction": "\\ud83d\\ude42", "output": "x"}')[0].question == "\U0001f642"


def test_compressed_data_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    with pytest.raises(ValueError, match=r"a.jsonl.gz is compressed \(gzip\): unpack it"):
        read_examples(tmp_path / "a.jsonl.gz")
