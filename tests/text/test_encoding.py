"""Token rows: labels are those of TRL, nothing is cut silently, and the counts are right."""

import json
import random

import pytest
import torch
from datasets import Dataset
from text.merging_tokenizers import TOKENIZERS
from train.tiny import CHAT, tiny_model, tiny_tokenizer, write_jsonl

from s2ft.text.collator import TokenCollator
from s2ft.text.data import DataOptions, load_rows
from s2ft.text.encoding import RowOutcome, encode_prompts, left_pad, tokenize_rows
from s2ft.text.examples import Example
from s2ft.text.prompts import PromptFormat, prompt_format

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTION, ANSWER = {"role": "user", "content": "2+3="}, {"role": "assistant", "content": "5"}
PAIR = {"prompt": "[2+3] ", "completion": "The sum is 5"}
LISTS = {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]}


def chats(count=100):
    """Chats of one to four questions and answers, some with a system message."""
    draw = random.Random(0)

    def words():
        return " ".join(
            "".join(draw.choices("abc de.,\n", k=draw.randint(1, 9))).strip() or "x" for _ in range(draw.randint(1, 5))
        )

    return [
        [{"role": "system", "content": words()}] * (draw.random() < 0.3)
        + [{"role": role, "content": words()} for _ in range(draw.randint(1, 4)) for role in ("user", "assistant")]
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


def trained(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label >= 0])


def test_100_chats_have_the_assistant_mask_of_trl(tmp_path):
    rows = [{"messages": chat} for chat in chats()]
    expected = rows_of_trl(rows, tiny_tokenizer(MARKED), tmp_path, assistant_only_loss=True)
    tokenized = tokens(rows, tiny_tokenizer(MARKED))
    assert list(tokenized.dataset) == expected
    supervised = sum(label >= 0 for row in expected for label in row["labels"])
    assert f"the loss falls on {supervised:,} of them" in str(tokenized)
    without_marks = tokens(rows)  # the same template without marks, and without the line break after the last answer
    assert f"the loss falls on {supervised:,} of them" in str(without_marks)
    assert [row["labels"] for row in without_marks.dataset] == [row["labels"][:-1] for row in expected]


@pytest.mark.parametrize("row, options", [(PAIR, {}), (PAIR, {"completion_only_loss": False}), ({"text": "2+3=5"}, {})])
def test_texts_are_those_of_trl(tmp_path, row, options):
    expected = rows_of_trl([row], tiny_tokenizer(), tmp_path, **options)
    tokenized = tokens([row], form="text", completion_only=options.get("completion_only_loss", True))
    assert list(tokenized.dataset) == expected


def test_message_lists_are_those_of_trl(tmp_path):
    expected = rows_of_trl([LISTS], tiny_tokenizer(MARKED), tmp_path, assistant_only_loss=True)
    assert list(tokens([LISTS], tiny_tokenizer(MARKED)).dataset) == expected
    assert trained(tiny_tokenizer(), expected[0]) == "5<|im_end|>"
    whole = rows_of_trl([LISTS], tiny_tokenizer(MARKED), tmp_path, completion_only_loss=False)
    assert list(tokens([LISTS], tiny_tokenizer(MARKED), loss_on="all", completion_only=False).dataset) == whole


def test_sharegpt_and_messages_of_the_same_chats_have_the_same_loss(tmp_path):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [[{"from": names[m["role"]], "value": m["content"]} for m in chat] for chat in chats(8)]
    files = (
        write_jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats(8)]),
        write_jsonl(tmp_path / "b.jsonl", [{"conversations": chat} for chat in shared]),
    )
    first, second = (list(tokens(load_rows(DataOptions(data=[str(file)]))).dataset) for file in files)
    assert first == second
    model, collate = tiny_model(max_position_embeddings=1024), TokenCollator(pad=2)
    assert model(**collate(first)).loss.item() == model(**collate(second)).loss.item()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_prompt_of_a_text_row_is_that_of_generation(kind):
    from s2ft.text.prompts import encode_prompt

    tokenizer = TOKENIZERS[kind]()
    (row,) = tokens([PAIR], tokenizer, "text").dataset
    prompt = encode_prompt(tokenizer, PAIR["prompt"])
    assert row["input_ids"][: len(prompt)] == prompt and set(row["labels"][: len(prompt)]) == {-100}
    assert trained(tokenizer, row).strip() == "The sum is 5<|im_end|>"


def test_text_prompts_become_messages_in_form_chat():
    as_chat = {
        "messages": [{"role": "user", "content": PAIR["prompt"]}, {"role": "assistant", "content": PAIR["completion"]}]
    }
    assert list(tokens([PAIR]).dataset) == list(tokens([as_chat]).dataset)


def test_loss_on_the_last_answer_only():
    tokenizer, rows = tiny_tokenizer(), [{"messages": [QUESTION, ANSWER, QUESTION, {**ANSWER, "content": "6"}]}]
    assert trained(tokenizer, tokens(rows, loss_on="last").dataset[0]) == "6<|im_end|>"
    assert trained(tokenizer, tokens(rows).dataset[0]) == "5<|im_end|>6<|im_end|>"
    whole = tokens(rows, loss_on="all")
    count = len(whole.dataset[0]["input_ids"])
    assert f"the loss falls on {count - 1} of them" in str(whole)  # nothing predicts the first token


def test_system_prompt_is_added_where_a_row_has_none():
    tokenizer, rows = (
        tiny_tokenizer(),
        [{"messages": [QUESTION, ANSWER]}, {"messages": [{"role": "system", "content": "a"}, QUESTION, ANSWER]}, LISTS],
    )
    dataset = [{"messages": None, "prompt": None, "completion": None, **row} for row in rows]
    found = tokenize_rows(
        Dataset.from_list(dataset), tokenizer, PromptFormat("chat", CHAT, "Be brief."), max_length=999
    )
    texts = [tokenizer.decode(row["input_ids"]) for row in found.dataset]
    assert [text.count("system\nBe brief.") for text in texts] == [1, 0, 1]
    assert [trained(tokenizer, row) for row in found.dataset] == ["5<|im_end|>"] * 3


def answered(question, answer="4"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_long_chats_are_left_out_and_counted():
    tokenized = tokens([answered("a"), answered("b" * 500), answered("c", "d" * 500)], max_length=120)
    assert tokenized.outcomes == {RowOutcome.KEPT: 1, RowOutcome.LONG_PROMPT: 1, RowOutcome.LONG_ROW: 1}
    assert "2 too long rows left out" in str(tokenized)


def test_long_chats_are_cut_if_asked_where_something_is_left_to_learn():
    tokenized = tokens([answered("b" * 500), answered("c", "d" * 500)], max_length=120, too_long="cut")
    (row,) = tokenized.dataset
    assert len(row["input_ids"]) == 120 and "d" * 20 in trained(tiny_tokenizer(), row)
    assert tokenized.outcomes == {RowOutcome.CUT: 1, RowOutcome.LONG_PROMPT: 1} and "1 too long row cut" in str(
        tokenized
    )


def test_long_texts_are_cut_into_several_rows_and_no_token_is_lost():
    whole = tokens([{"text": "a b c d e f " * 20}], form="text").dataset[0]["input_ids"]
    tokenized = tokens([{"text": "a b c d e f " * 20}], form="text", max_length=64)
    assert [token for row in tokenized.dataset for token in row["input_ids"]] == whole
    assert tokenized.outcomes == {RowOutcome.CUT: 1, RowOutcome.KEPT: 3}
    with pytest.raises(ValueError, match="none of 1 rows fits: 1 with a prompt and an answer that are longer together"):
        tokens([{"text": "a" * 100}], form="text", max_length=64, too_long="leave_out")


def test_a_row_of_exactly_max_length_is_kept():
    length = len(tokens([answered("a")]).dataset[0]["input_ids"])
    assert tokens([answered("a")], max_length=length).outcomes == {RowOutcome.KEPT: 1}


def test_no_row_left_is_an_error():
    with pytest.raises(
        ValueError, match="none of 2 rows fits: 2 with a prompt of 100 tokens or more; raise max_length"
    ):
        tokens([answered("b" * 500)] * 2, max_length=100)


def test_rows_that_the_template_refuses_are_named_and_can_be_left_out(tmp_path):
    gemma = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
    rows = [{"messages": [{"role": "system", "content": "a"}, QUESTION, ANSWER]}, {"messages": [QUESTION, ANSWER]}]
    dataset = load_rows(DataOptions(data=[str(write_jsonl(tmp_path / "a.jsonl", rows))]))
    with pytest.raises(
        ValueError, match="1 of 2 rows can't be used; .*:\n  .*a.jsonl, line 1: the chat template can't.*System"
    ):
        tokens(dataset, tiny_tokenizer(gemma))
    tokenized = tokens(dataset, tiny_tokenizer(gemma), skip_bad_rows=True)
    assert tokenized.outcomes == {
        RowOutcome.KEPT: 1,
        RowOutcome.BAD: 1,
    } and "1 row left out that the chat template can't" in str(tokenized)


def test_template_with_another_prompt_before_an_answer_is_said(caplog):
    other = CHAT + "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    tokenized = tokens([answered("a")], tiny_tokenizer(other), loss_on="last")
    assert trained(tiny_tokenizer(), tokenized.dataset[0]) == "4<|im_end|>" and not caplog.text
    marked = MARKED + "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    assert tokens([answered("a")], tiny_tokenizer(marked)).outcomes == {RowOutcome.OTHER_PROMPT: 1}
    assert "writes another prompt when an answer follows it, in 1 of 1 rows" in caplog.text


def test_messages_need_a_template():
    with pytest.raises(ValueError, match="messages need a chat template, but form='text' uses none"):
        tokens([answered("a")], form="text")


def test_streamed_rows_equal_the_stored_ones(tmp_path):
    rows = [*(answered("q" * n) for n in range(1, 40)), answered("b" * 500)]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    stored, streamed = (
        tokens(load_rows(DataOptions(data=[path], streaming=streaming)), max_length=200) for streaming in (False, True)
    )
    assert list(streamed.dataset) == list(stored.dataset) and len(stored.dataset) == 39
    assert "the rows are streamed" in str(streamed)


def test_later_steps_of_datasets_do_not_mix_two_data_sets_up():
    first, second = (tokens([answered(text)]).dataset for text in "ab")
    packed = [rows.map(lambda row: {"input_ids": row["input_ids"][:-1]}) for rows in (first, second)]
    assert packed[0][0]["input_ids"] != packed[1][0]["input_ids"] == second[0]["input_ids"][:-1]


@pytest.mark.slow
def test_several_processes_make_the_same_rows():
    rows = [answered("q" * n) for n in range(1, 40)]
    one, two = (tokens(rows, processes=count) for count in (None, 2))
    assert list(one.dataset) == list(two.dataset) and str(one) == str(two)


@pytest.mark.parametrize("options, message", [({"loss_on": "first"}, "loss_on must be one of assistant, last, all"),
                                              ({"too_long": "drop"}, "too_long must be one of leave_out, cut")])  # fmt: skip
def test_unknown_choices_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tokens([answered("a")], **options)


def example(question):
    return Example(({"role": "user", "content": question},), "4")


def test_prompt_longer_than_the_context_is_left_out_and_counted(caplog):
    prompts = encode_prompts(tiny_tokenizer(), [example("a"), example("b" * 500)], room=100)
    assert prompts[1] is None and prompts[0] and "left out 1 of 2 rows" in caplog.text


def test_no_prompt_left_is_an_error():
    with pytest.raises(ValueError, match="none of 1 prompts fits into the 100 tokens"):
        encode_prompts(tiny_tokenizer(), [example("b" * 500)], room=100)


def test_prompts_of_examples_have_the_format():
    tokenizer = tiny_tokenizer()
    text = Example("2+3=", "5")
    for form, expected in (
        (PromptFormat("text"), "2+3="),
        (PromptFormat("chat", None, "Be brief."), "system\nBe brief."),
    ):
        (ids,) = encode_prompts(tokenizer, [text], 999, form)
        assert expected in tokenizer.decode(ids)


def test_left_pad_adds_nothing_to_one_sequence():
    batch = left_pad([[3, 4]], pad=0)
    assert batch["input_ids"].tolist() == [[3, 4]] and batch["attention_mask"].all()


def test_json_of_tools_reaches_the_template():
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    template = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHAT
    rows = Dataset.from_list([{**answered("a"), "tools": json.dumps(tools)}])
    rows = rows.map(lambda row: {"tools": json.loads(row["tools"])})
    ids = tokens(rows, tiny_tokenizer(template)).dataset[0]["input_ids"]
    assert json.dumps(tools[0]) in tiny_tokenizer().decode(ids)
    assert torch.tensor(ids).max() < len(tiny_tokenizer())
