"""Token rows and batches: only the answer has a loss, and no row is cut silently."""

import pytest
import torch
import torch.nn.functional as F
from train.tiny import tiny_model, tiny_tokenizer

from s2ft.text.encoding import AnswerCollator, TokenRow, encode_examples, encode_prompts, left_pad
from s2ft.text.examples import Example

ROWS = [TokenRow([5, 6, 7], [8, 2]), TokenRow([9], [10, 11, 12, 2]), TokenRow([13, 14, 15, 16, 17, 18], [19, 2])]


def example(question, output="4"):
    return Example(({"role": "user", "content": question},), output)


def test_answers_are_at_the_end_and_only_they_have_labels():
    batch = AnswerCollator(pad=0)(ROWS)
    assert batch["logits_to_keep"] == 5 == batch["labels"].shape[1]
    for number, row in enumerate(ROWS):
        length = len(row)
        assert batch["input_ids"][number, -length:].tolist() == row.prompt + row.answer
        assert batch["attention_mask"][number].sum() == length
        assert batch["labels"][number].tolist() == [-100] * (5 - len(row.answer)) + row.answer
        assert batch["position_ids"][number, -length:].tolist() == list(range(length))


def test_loss_is_that_of_the_answer_tokens_without_padding():
    model = tiny_model()
    loss = model(**AnswerCollator(pad=2)(ROWS)).loss
    terms = []
    for row in ROWS:
        logits = model(torch.tensor([row.prompt + row.answer])).logits[0]
        terms.append(F.cross_entropy(logits[len(row.prompt) - 1 : -1], torch.tensor(row.answer), reduction="none"))
    assert torch.allclose(loss, torch.cat(terms).mean(), rtol=1e-5)


def test_gradients_are_finite_with_padding():
    model = tiny_model()
    model(**AnswerCollator(pad=2)(ROWS)).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_long_rows_are_left_out_and_counted(caplog):
    examples = [example("a"), example("b" * 500), example("c", "d" * 500)]
    rows = encode_examples(tiny_tokenizer(), examples, max_length=120)
    assert len(rows) == 1
    assert "left out 2 of 3 rows: 1 with a prompt of 120 tokens or more, 1 with a prompt and an answer" in caplog.text


def test_a_row_of_exactly_max_length_is_kept():
    (row,) = encode_examples(tiny_tokenizer(), [example("a")], max_length=10_000)
    assert encode_examples(tiny_tokenizer(), [example("a")], max_length=len(row)) == [row]


def test_no_row_left_is_an_error():
    with pytest.raises(ValueError, match="none of 2 rows fits: 2 with a prompt"):
        encode_examples(tiny_tokenizer(), [example("b" * 500)] * 2, max_length=100)


def test_prompt_longer_than_the_context_is_left_out_and_counted(caplog):
    prompts = encode_prompts(tiny_tokenizer(), [example("a"), example("b" * 500)], room=100)
    assert prompts[1] is None and prompts[0] and "left out 1 of 2 rows" in caplog.text


def test_no_prompt_left_is_an_error():
    with pytest.raises(ValueError, match="none of 1 prompts fits into the 100 tokens"):
        encode_prompts(tiny_tokenizer(), [example("b" * 500)], room=100)


def test_left_pad_adds_nothing_to_one_sequence():
    batch = left_pad([[3, 4]], pad=0)
    assert batch["input_ids"].tolist() == [[3, 4]] and batch["attention_mask"].all()
