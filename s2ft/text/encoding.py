"""From examples to token rows and batches. A row that is too long is left out and counted, never cut."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from s2ft.text.examples import Example
from s2ft.text.prompts import encode_example, encode_prompt

logger = logging.getLogger(__name__)
IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class TokenRow:
    """One example as token ids."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def context_length(model) -> int | None:
    """The longest sequence that the model was built for; None if it doesn't say."""
    return getattr(model.config, "max_position_embeddings", None)


def encode_examples(tokenizer, examples: Sequence[Example], max_length: int) -> list[TokenRow]:
    """Rows of at most `max_length` tokens. Warns with counts of what was left out.

    Raises: ValueError if no row is left.
    """
    rows, long_prompts, long_rows = [], 0, 0
    for example in examples:
        row = TokenRow(*encode_example(tokenizer, example))
        if len(row) <= max_length:
            rows.append(row)
        elif len(row.prompt) >= max_length:
            long_prompts += 1
        else:
            long_rows += 1
    counts = (
        f"{long_prompts} with a prompt that fills {max_length} tokens alone, "
        f"{long_rows} with prompt and answer longer than that"
    )
    if not rows:
        raise ValueError(f"none of {len(examples)} rows fits: {counts}; raise max_length or shorten the data")
    if len(rows) < len(examples):
        logger.warning("left out %d of %d rows: %s", len(examples) - len(rows), len(examples), counts)
    return rows


def encode_prompts(tokenizer, examples: Sequence[Example], room: int) -> list[list[int] | None]:
    """Prompts of at most `room` tokens, None for a longer one. Warns with a count.

    Raises: ValueError if no prompt fits.
    """
    prompts = [encode_prompt(tokenizer, example.conversation) for example in examples]
    fitting = [prompt if len(prompt) <= room else None for prompt in prompts]
    left_out = fitting.count(None)
    if left_out == len(prompts):
        raise ValueError(
            f"none of {len(prompts)} prompts fits into the {room} tokens that the model's context "
            "leaves beside the answer"
        )
    if left_out:
        logger.warning("left out %d of %d rows: the prompt is longer than %d tokens", left_out, len(prompts), room)
    return fitting


def left_pad(sequences: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and position_ids, [rows, longest] int64, filled on the left.

    Positions start at each row's first token, so that they are the same however the row is filled.
    """
    longest = max(map(len, sequences))
    input_ids = torch.full((len(sequences), longest), pad)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        attention_mask[row, longest - len(ids) :] = 1
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


@dataclass(frozen=True)
class AnswerCollator:
    """Batches rows so that all answers stand at the end, and asks for logits there only.

    The logits of the prompt bear no loss; with a large vocabulary they cost more than anything else.
    Labels have the length of the kept logits: the longest answer and the position before it.
    """

    pad: int

    def __call__(self, rows: Sequence[TokenRow]) -> dict:
        batch = left_pad([row.prompt + row.answer for row in rows], self.pad)
        keep = max(len(row.answer) for row in rows) + 1
        labels = torch.full((len(rows), keep), IGNORED)
        for number, row in enumerate(rows):
            labels[number, keep - len(row.answer) :] = torch.tensor(row.answer)
        return {**batch, "labels": labels, "logits_to_keep": keep, "use_cache": False}
