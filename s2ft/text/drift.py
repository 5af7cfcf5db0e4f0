"""How far training has moved a model from its base, and the rows on which this is measured.

Forgetting is the rise of the mean loss on other text, in nats a token. The divergence is KL(base‖model) on the prompts
of the task, in nats a position; it predicts forgetting better than the size or the sparsity of an update (RL's Razor,
arXiv 2509.04259).
"""

import contextlib
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from s2ft.model.modes import evaluation_mode
from s2ft.selection.batches import IGNORED
from s2ft.text.data import DataOptions, load_rows
from s2ft.text.divergence import BaseDistributions, base_switch, mean_loss
from s2ft.text.encoding import context_length, tokenize_rows
from s2ft.text.generation import answer_ids
from s2ft.text.output_head import contiguous_head
from s2ft.text.prompts import end_ids, prompt_for_rows

ROWS = 64  # rows of a measurement, if the user names no number


@dataclass(frozen=True)
class Drift:
    """One measurement.

    Attributes:
        forgetting: Rise of the loss on other text over that of the base, in nats a token; None if it is not measured.
        other_loss: The loss on other text, in nats a token.
        base_kl: KL(base‖model) on the task's prompts, in nats a position; None if it is not measured.
    """

    forgetting: float | None = None
    other_loss: float | None = None
    base_kl: float | None = None

    def to_dict(self) -> dict[str, float]:
        """What was measured, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        words = []
        if self.forgetting is not None:
            words.append(f"forgetting {self.forgetting:+.4f} (loss {self.other_loss:.4f} on other text)")
        if self.base_kl is not None:
            words.append(f"KL from the base {self.base_kl:.4f}")
        return ", ".join(words)


class DriftMeter:
    """Measures a model against its base.

    The base is measured when the object is made. Adapters are switched off for that; a model without adapters is its
    own base, so make the object before it is trained.

    Args:
        model: A causal language model, as in :func:`s2ft.text.divergence.mean_loss`.
        other: Token rows of other text, for the forgetting, or None.
        prompts: Token rows whose labels are the positions of the divergence, see :func:`prompt_rows`, or None.
        batch_size: Rows of a forward pass.

    Attributes:
        base_loss: The loss of the base on the other text, or None.
        distributions: The base's distributions on the prompts, or None.

    Raises:
        ValueError: Neither kind of rows is given, or rows can't be measured.

    Example:
        >>> from s2ft.text.drift import DriftMeter
        >>> rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in input_ids]
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> meter = DriftMeter(model, other=rows, prompts=rows)
        >>> meter.measure(model)
        Drift(forgetting=0.0, other_loss=4..., base_kl=0.0)
    """

    def __init__(self, model: Any, *, other: Any = None, prompts: Any = None, batch_size: int = 8) -> None:
        if other is None and prompts is None:
            raise ValueError("nothing is measured: give other, prompts, or both")
        self._other, self._batch_size = other, batch_size
        self.base_loss: float | None = None
        self.distributions: BaseDistributions | None = None
        if other is not None:
            switch = base_switch(model)
            with switch() if switch else contextlib.nullcontext():
                self.base_loss = mean_loss(model, other, batch_size)
        if prompts is not None:
            self.distributions = BaseDistributions.of(model, prompts, batch_size)

    def measure(self, model: Any) -> Drift:
        """Measure the model as it is now, with its active adapters.

        Args:
            model: The model.

        Returns:
            What was measured.
        """
        loss = None if self._other is None else mean_loss(model, self._other, self._batch_size)
        rise = None if loss is None else loss - self.base_loss
        return Drift(rise, loss, None if self.distributions is None else self.distributions.kl(model))


# ---- rows ----------------------------------------------------------------------------------------------


def drawn(count: int, most: int, seed: int) -> list[int]:
    """Draw the numbers of rows, in their order.

    Args:
        count: Number of rows there are.
        most: Number of rows to draw. If there are fewer, all are taken.
        seed: Seed of the draw.
    """
    return sorted(random.Random(seed).sample(range(count), min(count, most)))


def read_texts(options: DataOptions, most: int = ROWS, seed: int = 0) -> Any:
    """Read data and draw rows.

    Args:
        options: Which data is read, and how.
        most: Number of rows to draw.
        seed: Seed of the draw.

    Returns:
        A Dataset, as :func:`s2ft.text.data.load_rows` returns it.

    Raises:
        ValueError: The data can't be read.
    """
    rows = load_rows(options)
    return rows.select(drawn(len(rows), most, seed)) if len(rows) > most else rows


def longest_other_row(model) -> int:
    """Return the tokens of the longest row of other text: the context, but at most 1024, as in training."""
    return min(context_length(model) or 1024, 1024)


def text_rows(rows: Any, tokenizer, longest: int, most: int = ROWS, seed: int = 0) -> list[dict[str, Any]]:
    """Make token rows whose labels are all of their tokens.

    Plain texts are taken as they are, and chats and answers in the tokenizer's chat template. A longer plain text is
    cut into several rows, another one at its end.

    Args:
        rows: The rows, as :func:`read_texts` returns them.
        tokenizer: The model's tokenizer.
        longest: Longest token row.
        most: Number of token rows to draw.
        seed: Seed of the draw.

    Returns:
        Token rows.

    Raises:
        ValueError: No row has text.

    Example:
        >>> from pathlib import Path
        >>> from transformers import ByT5Tokenizer
        >>> from s2ft.text.data import DataOptions
        >>> from s2ft.text.drift import read_texts, text_rows
        >>> _ = Path("texts.jsonl").write_text('{"text": "ab"}')
        >>> text_rows(read_texts(DataOptions(data=["texts.jsonl"])), ByT5Tokenizer(), longest=100)
        [{'input_ids': [100, 101, 1], 'labels': [100, 101, 1]}]
    """
    prompt = prompt_for_rows(tokenizer, rows, DataOptions())
    how = {"max_length": longest, "too_long": "cut", "loss_on": "all", "completion_only": False}
    tokens = tokenize_rows(rows, tokenizer, prompt, **how).dataset
    return [tokens[number] for number in drawn(len(tokens), most, seed)]


def prompt_rows(rows: Any, most: int = ROWS, seed: int = 0) -> list[dict[str, Any]]:
    """Make rows that measure the divergence on the prompts of token rows.

    Args:
        rows: Token rows. The prompt of a row ends before its first label. A row without a prompt, such as plain text,
            is measured as a whole.
        most: Number of rows to draw.
        seed: Seed of the draw.

    Returns:
        Token rows whose labels are the tokens of the prompt and the first one of the answer.

    Example:
        >>> from s2ft.text.drift import prompt_rows
        >>> prompt_rows([{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}])
        [{'input_ids': [5, 6, 7], 'labels': [-100, 6, 7]}]
    """
    found = []
    for row in _some(rows, most, seed):
        first = _first_label(row)
        ids = list(row["input_ids"])[: first + 1 if first > 1 else None]
        found.append({"input_ids": ids, "labels": [IGNORED, *ids[1:]]})
    return found


def _some(rows, most: int, seed: int) -> list:
    """Draw rows; of a stream, whose length is not known, take the first ones."""
    if hasattr(rows, "__len__"):
        return [rows[number] for number in drawn(len(rows), most, seed)]
    return list(itertools.islice(rows, most))


def prompts_of(rows, most: int = ROWS, seed: int = 0) -> list[list[int]]:
    """Return the prompts of token rows, for :func:`answer_rows`. Rows without a prompt are left out.

    Args:
        rows: Token rows.
        most: Number of rows to draw.
        seed: Seed of the draw.

    Raises:
        ValueError: No row has a prompt.
    """
    found = [list(row["input_ids"])[: _first_label(row)] for row in _some(rows, most, seed) if _first_label(row) > 1]
    if not found:
        raise ValueError("no row has a prompt that the base could answer: measure the divergence on the prompts' rows")
    return found


def _first_label(row) -> int:
    """The first token with a label. Nothing stands before it if it is the second token, since the first has none."""
    labels = list(row["labels"])
    return next((place for place, label in enumerate(labels) if place and label != IGNORED), len(labels))


def row_of_prompt(prompt: Sequence[int]) -> dict[str, Any]:
    """Make a token row of a prompt that has no answer, for :func:`prompt_rows` and :func:`prompts_of`.

    Args:
        prompt: Token ids.

    Returns:
        The row. Its last token stands for the answer. It only marks the position that predicts it and is never read.

    Example:
        >>> from s2ft.text.drift import row_of_prompt
        >>> row_of_prompt([5, 6])
        {'input_ids': [5, 6, 6], 'labels': [-100, -100, 6]}
    """
    return {"input_ids": [*prompt, prompt[-1]], "labels": [IGNORED] * len(prompt) + [prompt[-1]]}


class ConvertedRows(Sequence):
    """Rows that become token rows when they are read.

    Args:
        rows: The rows.
        convert: Function of a row that returns a token row.

    Example:
        >>> from s2ft.text.drift import ConvertedRows, row_of_prompt
        >>> ConvertedRows([[5, 6]], row_of_prompt)[0]
        {'input_ids': [5, 6, 6], 'labels': [-100, -100, 6]}
    """

    def __init__(self, rows, convert: Callable[[Any], dict[str, Any]]) -> None:
        self.rows, self.convert = rows, convert

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number):
        return self.convert(self.rows[number])


def answer_rows(
    model, tokenizer, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64, batch_size: int = 8
) -> list[dict[str, Any]]:
    """Let the base answer prompts greedily, and make rows whose labels are these answers.

    On them, KL(base‖model) is the divergence of the two policies where the base goes, as RL's Razor measures it.

    Args:
        model: A causal language model. Its adapters are switched off.
        tokenizer: The model's tokenizer.
        prompts: Token ids of each prompt.
        max_new_tokens: Longest answer in tokens.
        batch_size: Prompts that are answered at once.

    Returns:
        Token rows, in the order of the prompts.
    """
    switch, ends = base_switch(model), end_ids(tokenizer, model.generation_config)
    with switch() if switch else contextlib.nullcontext(), evaluation_mode(model), torch.no_grad():
        with contiguous_head(model):
            answers = answer_ids(model, tokenizer, prompts, batch_size, max_new_tokens)
    return [_answered(prompt, answer, ends) for prompt, answer in zip(prompts, answers)]


def _answered(prompt: Sequence[int], answer: list[int], ends: Sequence[int]) -> dict[str, Any]:
    """The row of a prompt and its answer up to the end token. What follows it is padding."""
    length = next((place + 1 for place, token in enumerate(answer) if token in ends), len(answer))
    return {"input_ids": [*prompt, *answer[:length]], "labels": [IGNORED] * len(prompt) + answer[:length]}
