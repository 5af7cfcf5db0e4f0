"""Did the training work? The adapter beside its base, on rows that were not trained on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from typing import Any

from s2ft.text.divergence import base_switch, mean_loss, prompts_of, some
from s2ft.text.encoding import IGNORED
from s2ft.text.generation import generate
from s2ft.text.templates import shorten

WIDTH = 100  # characters of a text in a line


@dataclass(frozen=True)
class Sample:
    """A prompt, and what is answered to it.

    Attributes:
        prompt: The end of the prompt, as text.
        right: The answer of the data.
        base: The base's answer; None without an adapter.
        tuned: The adapter's answer.
    """

    prompt: str
    right: str
    base: str | None
    tuned: str


@dataclass(frozen=True)
class Comparison:
    """What an adapter has changed.

    Attributes:
        rows: Number of rows whose loss was computed.
        loss_before: Loss of the base on the answers of these rows, in nats a token; None without an adapter.
        loss_after: Loss with the adapter.
        samples: Answers of both, of some of the rows.
    """

    rows: int
    loss_before: float | None
    loss_after: float
    samples: tuple[Sample, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The comparison as values that JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        if self.loss_before is None:
            lines = [f"loss on {self.rows} rows: {self.loss_after:.4f}"]
        else:
            word = "lower" if self.loss_after < self.loss_before else "NOT lower"
            lines = [f"loss on {self.rows} rows: {self.loss_before:.4f} before, {self.loss_after:.4f} after ({word})"]
        for one in self.samples:
            words = " ".join(one.prompt.split())  # a chat's question is at the end
            lines += ["", "  " + (words if len(words) <= WIDTH else "…" + words[1 - WIDTH :])]
            shown = {"right": one.right, "base": one.base, "tuned": one.tuned}
            lines += [f"    {name + ':':<6} {shorten(text, WIDTH)}" for name, text in shown.items() if text is not None]
        return "\n".join(lines)


def compare(
    model, tokenizer, rows: Any, *, most: int = 64, samples: int = 3, max_new_tokens: int = 64, batch_size: int = 8
) -> Comparison:
    """Compare a model with its base: the loss of the answers, and some answers side by side.

    Args:
        model: A causal language model, with an adapter that is on or without one.
        tokenizer: The model's tokenizer.
        rows: Token rows with input_ids and labels that were not trained on.
        most: Number of rows to draw.
        samples: Number of rows to answer. Rows without a prompt, such as plain text, are not answered.
        max_new_tokens: Longest answer in tokens.
        batch_size: Rows of a forward pass.

    Returns:
        The comparison.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from s2ft.text.comparison import compare
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}]
        >>> found = compare(model, ByT5Tokenizer(), rows, max_new_tokens=4)
        >>> found.rows, found.loss_after - found.loss_before, len(found.samples)
        (1, 0.0, 1)
    """
    drawn, switch = some(rows, most), base_switch(model)
    after = mean_loss(model, drawn, batch_size)
    answered = [row for row in drawn if list(row["labels"])[1:2] == [IGNORED]][:samples]
    prompts = prompts_of(answered) if answered else []
    answer = partial(generate, model, tokenizer, prompts, batch_size, max_new_tokens, "answering")
    tuned, before, base = answer(), None, [None] * len(prompts)
    if switch is not None:
        with switch():
            before, base = mean_loss(model, drawn, batch_size), answer()
    right = [_first_answer(list(row["labels"])[len(prompt) :]) for row, prompt in zip(answered, prompts)]
    texts = zip(_texts(tokenizer, prompts), _texts(tokenizer, right), base, tuned)
    return Comparison(len(drawn), before, after, tuple(Sample(*each) for each in texts))


def _first_answer(labels: Sequence[int]) -> list[int]:
    return list(takewhile(lambda label: label != IGNORED, labels))


def _texts(tokenizer, rows: Sequence[Sequence[int]]) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
