"""Rows of dpo and grpo: every form gives the same pair or prompt, and a row that can't be used says why."""

import pytest
from support.inside import (
    PAIRS,
    PROMPTS,
    BadRow,
    DataOptions,
    PromptFormat,
    encode_pairs,
    encode_prompt,
    form_of,
    load_rows,
    pair,
    prompt_format,
    scored_prompt,
    token_row,
    with_columns,
)
from train.tiny import assistant, tiny_tokenizer, user, write_jsonl

CHAT = [user("2+3="), assistant("5")]
ASKED = {"prompt": [user("2+3=")], "chosen": [assistant("5")], "rejected": [assistant("6")]}
FORMS = {
    "messages": ASKED,
    "question": {"question": "2+3=", "chosen": "5", "rejected": "6"},
    "instruction": {"instruction": "2+3=", "input": "", "chosen": "5", "rejected": 6},
    "whole chats": {"chosen": [user("2+3="), assistant("5")], "rejected": [user("2+3="), assistant("6")]},
    "whole chats and the prompt's text": {
        "prompt": "2+3=",
        "chosen": [user("2+3="), assistant("5")],
        "rejected": [user("2+3="), assistant("6")],
    },
    "text and messages": {"prompt": "2+3=", "chosen": [assistant("5")], "rejected": [assistant("6")]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "2+3="}],
        "chosen": {"from": "gpt", "value": "5"},
        "rejected": {"from": "gpt", "value": "6"},
    },
    "null fields": {"prompt": [user("2+3=")], "chosen": [assistant("5")], "rejected": [assistant("6")], "tools": None},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_pair_is_the_same_pair(form):
    assert pair(FORMS[form], {}) == ASKED


def test_texts_stay_texts():
    assert pair({"prompt": "2+3=", "chosen": "5", "rejected": "6"}, {}) == (
        {"prompt": "2+3=", "chosen": "5", "rejected": "6"}
    )
    found = pair({"chosen": "\n\nHuman: 2+3=\n\nAssistant: 5", "rejected": "\n\nHuman: 2+3=\n\nAssistant: 6"}, {})
    assert found == {"prompt": "\n\nHuman: 2+3=\n\nAssistant:", "chosen": " 5", "rejected": " 6"}


def test_a_system_prompt_and_earlier_turns_belong_to_the_prompt():
    found = pair({"system": "Be brief.", "question": "2+3=", "chosen": "5", "rejected": "6"}, {})
    assert found["prompt"] == [{"role": "system", "content": "Be brief."}, user("2+3=")]
    turns = [user("hi"), assistant("hello"), user("2+3=")]
    assert pair({name: [*turns, *ASKED[name]] for name in ("chosen", "rejected")}, {}) == {**ASKED, "prompt": turns}


AB = {"prompt": "a", "chosen": "b"}


@pytest.mark.parametrize(
    ("convert", "row", "words"),
    [
        (pair, AB, "'rejected' is missing.*it has 'prompt'"),
        (pair, {**AB, "rejected": None}, "'rejected' is missing"),
        (pair, {**AB, "rejected": "b"}, "the same answer"),
        (pair, {"chosen": CHAT, "rejected": CHAT}, "the same answer"),
        (pair, {**AB, "chosen": " ", "rejected": "c"}, "'chosen' is empty"),
        (pair, {**AB, "rejected": [assistant("c")]}, "both be text"),
        (pair, {**AB, "prompt": [], "rejected": "c"}, "no prompt"),
        (pair, {"chosen": [assistant("b")], "rejected": [assistant("c")]}, "no prompt"),
        (pair, {"chosen": [], "rejected": CHAT}, "'chosen' must begin and end"),
        (pair, {**AB, "chosen": [user("b")], "rejected": [user("c")]}, "'chosen' must begin and end"),
        (pair, {**AB, "prompt": 5, "rejected": "c"}, "'prompt' must be a list of messages, got int"),
        (pair, {**AB, "chosen": "\ud800", "rejected": "c"}, "Unicode"),
        (pair, "text", "expected an object .*got str"),
        (scored_prompt, {"text": "a"}, "needs prompt.*it has 'text'.*--field"),
        (scored_prompt, {"messages": [assistant("a")]}, "'messages' has no message before"),
        (scored_prompt, {"prompt": "a", "tools": [{}]}, "'tools' is not used"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(convert, row, words):
    with pytest.raises(BadRow, match=words):
        convert(row, {})


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "2+3=", "answer": "3+2 #### 5", "level": 1}, {"answer": "3+2 #### 5", "level": 1}),
        ({"prompt": [user("2+3=")], "answer": 5}, {"answer": "5"}),
        ({"question": "2+3=", "answer": ["B"]}, {"answer": "B"}),
        ({"messages": [user("2+3="), assistant("5")]}, {"answer": "5"}),
        ({"messages": [user("2+3=")], "metadata": {"seed": 1}}, {"metadata": {"seed": 1}}),
        ({"instruction": "2+3=", "output": "5"}, {"answer": "5", "output": "5"}),
        ({"prompt": [user("2+3=")], "answer": ["5", "five"], "completion": "6"}, {"answer": ["5", "five"]}),
        ({"messages": [user("2+3="), assistant("6")], "answer": ["5", "five"]}, {"answer": ["5", "five"]}),
    ],
)
def test_prompts_keep_the_columns_for_the_rewards(row, columns):
    assert scored_prompt(row, {}) == {"prompt": [user("2+3=")], "columns": columns}


# ---- files, and token rows -----------------------------------------------------------------------------


def test_files_are_read_with_renamed_fields_and_bad_rows_are_named(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"q": "2+3=", "good": "5", "bad": "6"}, {"q": "a", "good": "b"}])
    options = dict(data=[str(path)], field=["question=q", "chosen=good", "rejected=bad"])
    with pytest.raises(ValueError, match="1 of 2 rows .*\n.*pairs.jsonl, line 2: field 'rejected'"):
        load_rows(DataOptions(**options), shape=PAIRS)
    (row,) = load_rows(DataOptions(**options, skip_bad_rows=True), shape=PAIRS)
    assert {name: row[name] for name in ASKED} == ASKED


def test_texts_that_look_like_json_stay_texts(tmp_path):
    path = write_jsonl(
        tmp_path / "tasks.jsonl", [{"prompt": "5", "answer": "1"}, {"prompt": "[1]", "extra": 0.1234567890123456}]
    )
    rows = load_rows(DataOptions(data=[str(path)]), shape=PROMPTS)
    assert form_of(rows, DataOptions()) == "text"
    assert list(with_columns(rows, PromptFormat("text"))) == [
        {"prompt": "5", "answer": "1", "extra": None},
        {"prompt": "[1]", "answer": None, "extra": 0.1234567890123456},
    ]
    chats = with_columns(rows, PromptFormat("chat", "{{ messages }}", "Be brief."))
    assert chats[0]["prompt"] == [{"role": "system", "content": "Be brief."}, user("5")]


def test_a_pair_has_the_prompt_of_generation_and_ends_after_the_end_of_turn(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = load_rows(DataOptions(data=[str(write_jsonl(tmp_path / "pairs.jsonl", [ASKED]))]), shape=PAIRS)
    found = encode_pairs(rows, tokenizer, prompt_format(tokenizer), max_length=100)
    (row,) = found.dataset
    assert row["prompt_ids"] == encode_prompt(tokenizer, ASKED["prompt"])
    assert [tokenizer.decode(row[name]) for name in ("chosen_ids", "rejected_ids")] == ["5<|im_end|>", "6<|im_end|>"]
    assert str(found).startswith("1 pair: ")
    assert token_row(found.dataset[0], "chosen_ids")["labels"][-2:] == row["chosen_ids"]


def test_long_pairs_are_left_out_or_cut(tmp_path):
    tokenizer = tiny_tokenizer()
    long = {**ASKED, "chosen": [assistant("5" * 90)]}
    rows = load_rows(DataOptions(data=[str(write_jsonl(tmp_path / "pairs.jsonl", [ASKED, long]))]), shape=PAIRS)
    how = dict(tokenizer=tokenizer, prompt=prompt_format(tokenizer))
    assert str(encode_pairs(rows, max_length=100, **how)).endswith("; 1 too long row left out")
    cut = encode_pairs(rows, max_length=100, too_long="cut", **how).dataset
    assert len(cut) == 2 and max(len(row["prompt_ids"] + row["chosen_ids"]) for row in cut) == 100
    with pytest.raises(ValueError, match="none of 2 rows fits.* 2 with a prompt and an answer"):
        encode_pairs(rows, max_length=20, **how)
    late = {**ASKED, "chosen": [assistant("5" * 90)], "rejected": [assistant("5" * 90 + "6")]}  # differ after the cut
    rows = load_rows(DataOptions(data=[str(write_jsonl(tmp_path / "late.jsonl", [ASKED, late]))]), shape=PAIRS)
    assert "1 too long row left out" in str(encode_pairs(rows, max_length=100, too_long="cut", **how))
