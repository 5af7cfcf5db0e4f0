"""Convert pairs of a better and a worse answer to token rows, with the prompts and answers of the other training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from s2ft.text.collator import TokenCollator
from s2ft.text.encoding import IGNORED, TOO_LONG, RowEncoder, RowOutcome, Tokenized, columns_of, encoded_rows, rows_of
from s2ft.text.prompts import PromptFormat, pad_id
from s2ft.text.templates import Rendered, in_common
from s2ft.text.tokens import encode_rendered

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")  # the columns of TRL's DPOTrainer


class TokenPair(NamedTuple):
    """A pair of :func:`encode_pairs`. One that is left out has no tokens."""

    prompt_ids: Sequence[int] = ()
    chosen_ids: Sequence[int] = ()
    rejected_ids: Sequence[int] = ()
    outcome: RowOutcome = RowOutcome.KEPT
    problem: str | None = None


@dataclass(frozen=True)
class _PairEncoder:
    """Turns normalised pairs into pairs of token rows."""

    rows: RowEncoder

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        rows = rows_of(batch)
        pairs = [
            [self.rows.rendered({**row, "completion": row[answer]}) for answer in ("chosen", "rejected")]
            for row in rows
        ]
        good = [one for pair in pairs for one in pair if isinstance(one, Rendered)]
        encoded = iter(encode_rendered(self.rows.tokenizer, good))
        found = []
        for row, pair in zip(rows, pairs):
            tokens = [next(encoded) for one in pair if isinstance(one, Rendered)]
            wrong = [str(one) for one in pair if not isinstance(one, Rendered)]
            found.append(TokenPair(outcome=RowOutcome.BAD, problem=wrong[0]) if wrong else self._fitted(row, *tokens))
        return columns_of(TokenPair, found)

    def _fitted(self, row: Mapping, *answers: tuple[list[int], list[int]]) -> TokenPair:
        starts, rows = [], []
        for ids, labels in answers:
            trained = [place for place, label in enumerate(labels) if label != IGNORED]
            starts.append(trained[0] if trained else len(ids))
            rows.append(ids[: trained[-1] + 1] if trained else ids)
        start = min(*starts, in_common(*rows))
        longest, room = max(map(len, rows)), self.rows.max_length
        if longest > room and (self.rows.too_long != "cut" or start >= room):
            return TokenPair(outcome=RowOutcome.LONG_ROW)
        if rows[0][start:] == rows[1][start:]:
            return TokenPair(
                outcome=RowOutcome.BAD, problem=f"{row['place']}: chosen and rejected have the same tokens"
            )
        outcome = RowOutcome.CUT if longest > room else RowOutcome.KEPT
        return TokenPair(rows[0][:start], rows[0][start:], rows[1][start:], outcome)


def encode_pairs(
    dataset,
    tokenizer,
    prompt: PromptFormat,
    *,
    max_length: int,
    too_long: str | None = None,
    skip_bad_rows: bool = False,
    processes: int | None = None,
) -> Tokenized:
    """Convert normalised pairs to pairs of token rows.

    Args:
        dataset: The rows, with the columns of :data:`s2ft.text.data.preferences.PAIRS`.
        tokenizer: The model's tokenizer.
        prompt: The format of prompts.
        max_length: Longest prompt with an answer.
        too_long: What happens to a longer pair: "leave_out" or "cut". None leaves it out. An answer is cut at its end.
        skip_bad_rows: Leave out pairs that the chat template cannot render. Otherwise they are an error.
        processes: Number of processes. None uses this one.

    Returns:
        The pairs and their numbers.

    Raises:
        ValueError: The template cannot render a pair, no pair is left, or an argument is not among its choices.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import ByT5Tokenizer
        >>> from s2ft.text.pairs import encode_pairs
        >>> from s2ft.text.prompts import PromptFormat, pad_id
        >>> rows = Dataset.from_list([{"prompt": "2+3=", "chosen": "5", "rejected": "6", "tools": None, "place": "a"}])
        >>> encode_pairs(rows, ByT5Tokenizer(), PromptFormat("text"), max_length=20).dataset[0]
        {'prompt_ids': [53, 46, 54, 64], 'chosen_ids': [56, 1], 'rejected_ids': [57, 1]}
    """
    if too_long not in (None, *TOO_LONG):
        raise ValueError(f"too_long must be one of {', '.join(TOO_LONG)}, got {too_long!r}")
    job = _PairEncoder(RowEncoder(tokenizer, prompt, max_length, too_long))
    rows, outcomes = encoded_rows(dataset, job, IDS, skip_bad_rows, processes)
    if not len(rows):
        raise ValueError(
            f"none of {len(dataset)} pairs can be used: {outcomes[RowOutcome.LONG_ROW]} are longer than max_length "
            f"{max_length}, {outcomes[RowOutcome.BAD]} are wrong; raise max_length, or shorten the data"
        )
    means = (f"{sum(map(len, rows[name])) / len(rows):,.0f}" for name in IDS)
    summary = "{}: {} tokens of prompt, {} of the chosen answer and {} of the rejected one in the mean".format(
        f"{len(rows):,} pair{'s' * (len(rows) != 1)}", *means
    )
    return Tokenized(rows, summary, outcomes)


def token_row(pair: Mapping[str, list[int]], answer: str) -> dict[str, list[int]]:
    """Return the prompt of a pair with one of its answers, "chosen_ids" or "rejected_ids", as a token row."""
    prompt, ids = pair["prompt_ids"], pair[answer]
    return {"input_ids": [*prompt, *ids], "labels": [IGNORED] * len(prompt) + list(ids)}


def longest_batch(pairs, tokenizer, rows: int) -> dict:
    """Return the largest batch of token rows that training on pairs has: both answers of the longest pairs.

    Args:
        pairs: A Dataset of :func:`encode_pairs`.
        tokenizer: The model's tokenizer.
        rows: Number of pairs in a batch.
    """
    lengths = [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in
               zip(*(pairs[name] for name in IDS))]  # fmt: skip
    longest = sorted(range(len(lengths)), key=lengths.__getitem__)[-rows:]
    answers = [(pairs[number], answer) for number in longest for answer in IDS[1:]]
    return TokenCollator(pad_id(tokenizer))([token_row(pair, answer) for pair, answer in answers])
