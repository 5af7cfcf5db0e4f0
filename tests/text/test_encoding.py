"""Token rows: labels are those of TRL, nothing is cut silently, and the counts are right."""

import json
import random

import pytest
from datasets import Dataset
from support.inside import (
    DataOptions,
    Example,
    PromptFormat,
    RowOutcome,
    encode_prompts,
    load_rows,
    prompt_format,
    tokenize_rows,
)
from text.merging_tokenizers import TOKENIZERS, trained_text
from train.tiny import CHAT, MARKED, tiny_model, tiny_tokenizer, write_jsonl

QUESTION, ANSWER = {"role": "user", "content": "2+3="}, {"role": "assistant", "content": "5"}
PAIR = {"prompt": "[2+3] ", "completion": "The sum is 5"}
LISTS = {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]}


def chats(count=100):
    """Chats of one to four questions and answers, some with a system message."""
    draw = random.Random(0)

    def said(role):
        return {"role": role, "content": "".join(draw.choices("abc de.,\n", k=draw.randint(1, 40))).strip() or "x"}

    return [
        [said("system")] * (draw.random() < 0.3)
        + [said(role) for _ in range(draw.randint(1, 4)) for role in ("user", "assistant")]
        for _ in range(count)
    ]


def tokens(rows, tokenizer=None, form="chat", max_length=10_000, **options):
    tokenizer = tokenizer or tiny_tokenizer()
    dataset = rows if hasattr(rows, "map") else Dataset.from_list(rows)
    return tokenize_rows(dataset, tokenizer, prompt_format(tokenizer, form), max_length=max_length, **options)


def rows_of_trl(rows, tokenizer, tmp_path, **options):
    """Token rows as SFTTrainer prepares them."""
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=None, eos_token="<|im_end|>",
        pad_token="<|im_end|>", **options,
    )  # fmt: skip
    trainer = SFTTrainer(tiny_model(), arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return [{name: row[name] for name in ("input_ids", "labels")} for row in trainer.train_dataset]


def test_100_chats_have_the_assistant_mask_of_trl(tmp_path):
    rows = [{"messages": chat} for chat in chats()]
    expected = rows_of_trl(rows, tiny_tokenizer(MARKED), tmp_path, assistant_only_loss=True)
    tokenized = tokens(rows, tiny_tokenizer(MARKED))
    assert list(tokenized.dataset) == expected
    supervised = sum(label >= 0 for row in expected for label in row["labels"])
    assert f"{supervised:,} of them in the loss" in str(tokenized)
    without_marks = tokens(rows)  # the same template without marks, and without the line break after the last answer
    assert f"{supervised:,} of them in the loss" in str(without_marks)
    assert [row["labels"] for row in without_marks.dataset] == [row["labels"][:-1] for row in expected]


@pytest.mark.parametrize("row, options", [(PAIR, {}), (PAIR, {"completion_only_loss": False}), ({"text": "2+3=5"}, {})])
def test_texts_are_those_of_trl(tmp_path, row, options):
    expected = rows_of_trl([row], tiny_tokenizer(), tmp_path, **options)
    tokenized = tokens([row], form="text", completion_only=options.get("completion_only_loss", True))
    assert list(tokenized.dataset) == expected


def test_message_lists_are_those_of_trl(tmp_path):
    expected = rows_of_trl([LISTS], tiny_tokenizer(MARKED), tmp_path, assistant_only_loss=True)
    assert list(tokens([LISTS], tiny_tokenizer(MARKED)).dataset) == expected
    assert trained_text(tiny_tokenizer(), expected[0]["labels"]) == "5<|im_end|>"
    whole = rows_of_trl([LISTS], tiny_tokenizer(MARKED), tmp_path, completion_only_loss=False)
    assert list(tokens([LISTS], tiny_tokenizer(MARKED), loss_on="all", completion_only=False).dataset) == whole


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_prompt_of_a_text_row_is_that_of_generation(kind):
    from support.inside import encode_prompt

    tokenizer = TOKENIZERS[kind]()
    (row,) = tokens([PAIR], tokenizer, "text").dataset
    prompt = encode_prompt(tokenizer, PAIR["prompt"])
    assert row["input_ids"][: len(prompt)] == prompt and set(row["labels"][: len(prompt)]) == {-100}
    assert trained_text(tokenizer, row["labels"]).strip() == "The sum is 5<|im_end|>"


def answered(question, answer="4"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_loss_on_the_last_answer_only_or_on_everything():
    tokenizer, rows = tiny_tokenizer(), [{"messages": [QUESTION, ANSWER, QUESTION, {**ANSWER, "content": "6"}]}]
    assert trained_text(tokenizer, tokens(rows, loss_on="last").dataset[0]["labels"]) == "6<|im_end|>"
    assert trained_text(tokenizer, tokens(rows).dataset[0]["labels"]) == "5<|im_end|>6<|im_end|>"
    plain = [{"prompt": "2+3=", "completion": "5"}]  # in a chat template, and nothing of its prompt is learned
    assert trained_text(tokenizer, tokens(plain, loss_on="all").dataset[0]["labels"]).endswith("5<|im_end|>")
    assert "2+3" not in trained_text(tokenizer, tokens(plain, loss_on="all").dataset[0]["labels"])
    whole = tokens(rows, loss_on="all")
    count = len(whole.dataset[0]["input_ids"])
    assert f"{count - 1} of them in the loss" in str(whole)  # nothing predicts the first token


def test_system_prompt_is_added_where_a_row_has_none():
    tokenizer, system = tiny_tokenizer(), {"role": "system", "content": "a"}
    rows = [{"messages": [QUESTION, ANSWER]}, {"messages": [system, QUESTION, ANSWER]}, LISTS]
    dataset = Dataset.from_list([{"messages": None, "prompt": None, "completion": None, **row} for row in rows])
    found = tokenize_rows(dataset, tokenizer, PromptFormat("chat", CHAT, "Be brief."), max_length=999).dataset
    texts = [tokenizer.decode(row["input_ids"]) for row in found]
    assert [text.count("system\nBe brief.") for text in texts] == [1, 0, 1]
    assert [trained_text(tokenizer, row["labels"]) for row in found] == ["5<|im_end|>"] * 3


def test_long_chats_are_left_out_or_cut_where_something_is_left_to_learn():
    rows = [answered("a"), answered("b" * 500), answered("c", "d" * 500)]
    tokenized = tokens(rows, max_length=120)
    assert tokenized.outcomes == {RowOutcome.KEPT: 1, RowOutcome.LONG_PROMPT: 1, RowOutcome.LONG_ROW: 1}
    assert len(tokenized.dataset) == 1 and "2 too long rows left out" in str(tokenized)
    tokenized = tokens(rows[1:], max_length=120, too_long="cut")
    (row,) = tokenized.dataset
    assert len(row["input_ids"]) == 120 and "d" * 20 in trained_text(tiny_tokenizer(), row["labels"])
    assert tokenized.outcomes == {RowOutcome.CUT: 1, RowOutcome.LONG_PROMPT: 1}
    assert tokens(rows[:1], max_length=len(tokens(rows[:1]).dataset[0]["input_ids"])).outcomes == {RowOutcome.KEPT: 1}


def test_long_texts_are_cut_into_several_rows_and_no_token_is_lost():
    rows = [{"text": "a b c d e f " * 20}]
    tokenized = tokens(rows, form="text", max_length=64)
    whole = tokens(rows, form="text").dataset[0]["input_ids"]
    assert [token for row in tokenized.dataset for token in row["input_ids"]] == whole
    assert tokenized.outcomes == {RowOutcome.CUT: 1, RowOutcome.KEPT: 3}
    found, whole = (
        tokens(rows, TOKENIZERS["SentencePiece"](), form="text", max_length=n).dataset for n in (64, 10_000)
    )
    # each part begins as a text does
    assert {row["input_ids"][0] for row in found} == {1} and [
        token for row in found for token in row["input_ids"][1:]
    ] == whole[0]["input_ids"][1:]


def test_rows_that_the_template_refuses_are_named_and_can_be_left_out(tmp_path):
    gemma = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
    rows = [{"messages": [{"role": "system", "content": "a"}, QUESTION, ANSWER]}, {"messages": [QUESTION, ANSWER]}]
    dataset = load_rows(DataOptions(data=[str(write_jsonl(tmp_path / "a.jsonl", rows))]))
    with pytest.raises(ValueError, match="1 of 2 rows can't be used.*\n.*a.jsonl, line 1: .*System role"):
        tokens(dataset, tiny_tokenizer(gemma))
    tokenized = tokens(dataset, tiny_tokenizer(gemma), skip_bad_rows=True)
    assert tokenized.outcomes == {RowOutcome.KEPT: 1, RowOutcome.BAD: 1} and len(tokenized.dataset) == 1


def test_template_with_another_prompt_before_an_answer_is_said(caplog):
    thought = "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    tokenized = tokens([answered("a")], tiny_tokenizer(CHAT + thought), loss_on="last")
    assert trained_text(tiny_tokenizer(), tokenized.dataset[0]["labels"]) == "4<|im_end|>" and not caplog.text
    assert tokens([answered("a")], tiny_tokenizer(MARKED + thought)).outcomes == {RowOutcome.OTHER_PROMPT: 1}
    assert "another prompt" in caplog.text and "1 of 1 rows" in caplog.text


def test_later_steps_of_datasets_do_not_mix_two_data_sets_up():
    first, second = (tokens([answered(text)]).dataset for text in "ab")
    packed = [rows.map(lambda row: {"input_ids": row["input_ids"][:-1]}) for rows in (first, second)]
    assert packed[0][0]["input_ids"] != packed[1][0]["input_ids"] == second[0]["input_ids"][:-1]


@pytest.mark.parametrize(
    "row, options, message",
    [
        (answered("b" * 500), {"max_length": 100}, "1 with a prompt of 100 tokens.*max_length"),
        ({"text": "a" * 99}, {"form": "text", "max_length": 64, "too_long": "leave_out"}, "1 .*longer together"),
        (answered("a"), {"form": "text"}, "form='text'"),
        (answered("a"), {"loss_on": "first"}, "loss_on.*assistant"),
        (answered("a"), {"too_long": "drop"}, "too_long.*leave_out"),
    ],
)
def test_rows_and_choices_that_can_not_be_used_are_named(row, options, message):
    with pytest.raises(ValueError, match=message):
        tokens([row], **options)


def test_prompts_have_the_format_and_long_ones_are_left_out(caplog):
    tokenizer, long = tiny_tokenizer(), Example(({"role": "user", "content": "b" * 500},), "4")
    text = Example("2+3=", "5")
    for form, expected in ((PromptFormat("text"), "2+3="), (PromptFormat(system="Be brief."), "system\nBe brief.")):
        (ids,) = encode_prompts(tokenizer, [text], 150, form).values()
        assert expected in tokenizer.decode(ids)
    assert [*encode_prompts(tokenizer, [text, long], room=100)] == [0] and "left out 1 of 2 rows" in caplog.text
    with pytest.raises(ValueError, match="none of 1 prompts fits into the 100"):
        encode_prompts(tokenizer, [long], room=100)


def test_json_of_tools_reaches_the_template():
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    template = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHAT
    rows = Dataset.from_list([answered("a")]).map(lambda row: {"tools": tools})
    ids = tokens(rows, tiny_tokenizer(template)).dataset[0]["input_ids"]
    assert json.dumps(tools[0]) in tiny_tokenizer().decode(ids)
