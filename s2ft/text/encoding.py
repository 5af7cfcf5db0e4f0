"""Convert examples to token rows and batches.

A row that is too long is left out and counted. It is never cut, since the model would then learn to stop early.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from s2ft.selection.batches import IGNORED
from s2ft.text.examples import Example
from s2ft.text.prompts import encode_example, encode_prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenRow:
    """One example as token ids.

    Attributes:
        prompt: Ids of the prompt. They have no loss.
        answer: Ids of the answer. They are trained on.
    """

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def context_length(model) -> int | None:
    """Return the longest sequence that the model's config allows, in tokens, or None if it has no such value."""
    return getattr(model.config, "max_position_embeddings", None)


def encode_examples(tokenizer, examples: Sequence[Example], max_length: int) -> list[TokenRow]:
    """Encode examples as token rows, and log a warning with the number of rows that are left out.

    Args:
        tokenizer: The model's tokenizer.
        examples: The examples to encode.
        max_length: Longest row in tokens, prompt and answer together.

    Returns:
        The rows that fit, in the order of the examples.

    Raises:
        ValueError: No row fits.
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
        f"{long_prompts} with a prompt of {max_length} tokens or more, "
        f"{long_rows} with a prompt and an answer that are longer together"
    )
    if not rows:
        raise ValueError(f"none of {len(examples)} rows fits: {counts}; raise max_length or shorten the data")
    if len(rows) < len(examples):
        logger.warning("left out %d of %d rows: %s", len(examples) - len(rows), len(examples), counts)
    return rows


def encode_prompts(tokenizer, examples: Sequence[Example], room: int) -> list[list[int] | None]:
    """Encode the prompts of examples, and log a warning with the number of prompts that are too long.

    Args:
        tokenizer: The model's tokenizer.
        examples: The examples whose prompts are encoded.
        room: Longest prompt in tokens.

    Returns:
        Token ids for each example, or None if its prompt is too long.

    Raises:
        ValueError: No prompt fits.
    """
    prompts = [encode_prompt(tokenizer, example.conversation) for example in examples]
    fitting = [prompt if len(prompt) <= room else None for prompt in prompts]
    left_out = fitting.count(None)
    if left_out == len(prompts):
        raise ValueError(
            f"none of {len(prompts)} prompts fits into the {room} tokens that the model's context leaves for the prompt"
        )
    if left_out:
        logger.warning("left out %d of %d rows: the prompt is longer than %d tokens", left_out, len(prompts), room)
    return fitting


def left_pad(sequences: Sequence[Sequence[int]], pad: int, multiple: int = 1) -> dict[str, torch.Tensor]:
    """Make a batch of sequences, padded on the left.

    Args:
        sequences: Token ids of each row.
        pad: The token id to pad with.
        multiple: The length of the batch is a multiple of this number.

    Returns:
        input_ids, attention_mask and position_ids, each [rows, longest] int64. Positions count from the first token
        of each row, so that they do not depend on the padding.

    Example:
        >>> from s2ft.text.encoding import left_pad
        >>> batch = left_pad([[5, 6, 7], [8]], pad=0)
        >>> batch["input_ids"].tolist()
        [[5, 6, 7], [0, 0, 8]]
        >>> batch["position_ids"].tolist()
        [[0, 1, 2], [0, 0, 0]]
    """
    longest = -(-max(map(len, sequences)) // multiple) * multiple
    input_ids = torch.full((len(sequences), longest), pad)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        attention_mask[row, longest - len(ids) :] = 1
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


@dataclass(frozen=True)
class AnswerCollator:
    """Collate token rows so that all answers end at the last position, and request logits for the answers only.

    Logits of the prompt have no loss, and with a large vocabulary they are the most expensive part of a step. Labels
    have the length of the requested logits: the longest answer and the position before it.

    Attributes:
        pad: The token id to pad with.

    Example:
        >>> from s2ft.text.encoding import AnswerCollator, TokenRow
        >>> batch = AnswerCollator(pad=0)([TokenRow(prompt=[5, 6], answer=[7]), TokenRow([8], [9, 10])])
        >>> batch["labels"].tolist()
        [[-100, -100, 7], [-100, 9, 10]]
        >>> model(**batch).loss
        tensor(4..., grad_fn=...)
    """

    pad: int

    def __call__(self, rows: Sequence[TokenRow]) -> dict:
        batch = left_pad([row.prompt + row.answer for row in rows], self.pad)
        keep = max(len(row.answer) for row in rows) + 1
        labels = torch.full((len(rows), keep), IGNORED)
        for number, row in enumerate(rows):
            labels[number, keep - len(row.answer) :] = torch.tensor(row.answer)
        return {**batch, "labels": labels, "logits_to_keep": keep, "use_cache": False}
