"""Convert pairs of a better and a worse answer to token rows, with the prompts and answers of the other training."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s2ft.text.collator import TokenCollator
from s2ft.text.data.scratch import scratch_file
from s2ft.text.encoding import IGNORED, ROWS, TOO_LONG, Rendered, _Tokenize, check_notes
from s2ft.text.prompts import PromptFormat, pad_id
from s2ft.text.tokens import encode_rendered

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")  # the columns of TRL's DPOTrainer


@dataclass(frozen=True)
class TokenPairs:
    """Pairs of token rows and what is known of them.

    Attributes:
        dataset: A datasets.Dataset with the columns prompt_ids, chosen_ids and rejected_ids.
        prompts: Number of tokens of the prompts.
        chosen: Number of tokens of the better answers.
        rejected: Number of tokens of the worse answers.
        long: Pairs left out because they are too long.
        cut: Pairs with an answer that will be cut.
        bad: Pairs left out because the chat template cannot render them.
    """

    dataset: Any
    prompts: int
    chosen: int
    rejected: int
    long: int
    cut: int
    bad: int

    def __str__(self) -> str:
        notes = [
            (self.long, "too long pair{s} left out"),
            (self.cut, "too long pair{s} cut"),
            (self.bad, "pair{s} left out that the chat template can't render"),
        ]
        count = len(self.dataset)
        return "; ".join(
            [
                f"{count:,} pair{'s' * (count != 1)}: {self.prompts / count:,.0f} tokens of prompt, "
                f"{self.chosen / count:,.0f} of the chosen answer and {self.rejected / count:,.0f} of the rejected one "
                "in the mean",
                *(f"{count:,} {text.format(s='s' * (count != 1))}" for count, text in notes if count),
            ]
        )


@dataclass(frozen=True)
class _Encode:
    """Turns normalised pairs into pairs of token rows."""

    tokenize: _Tokenize

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
        rendered = [[self._rendered(row, answer) for answer in ("chosen", "rejected")] for row in rows]
        good = [one for pair in rendered for one in pair if isinstance(one, Rendered)]
        encoded = iter(encode_rendered(self.tokenize.tokenizer, good))
        result: dict[str, list] = {name: [] for name in (*IDS, "note")}
        for pair in rendered:
            rows_of_pair = [next(encoded) if isinstance(one, Rendered) else one for one in pair]
            wrong = [one for one in rows_of_pair if isinstance(one, str)]
            values = ([], [], [], f"bad {wrong[0]}") if wrong else self._fitted(*rows_of_pair)
            for column, value in zip(result.values(), values):
                column.append(value)
        return result

    def _rendered(self, row: dict[str, Any], answer: str) -> Rendered | str:
        return self.tokenize._rendered({**row, "completion": row[answer]})

    def _fitted(self, chosen: tuple, rejected: tuple) -> tuple[list[int], list[int], list[int], str]:
        """Return the ids of prompt and answers, which are empty for a pair that does not fit, and a note."""
        starts, rows = [], []
        for ids, labels in (chosen, rejected):
            trained = [place for place, label in enumerate(labels) if label != IGNORED]
            starts.append(trained[0] if trained else len(ids))
            rows.append(ids[: trained[-1] + 1] if trained else ids)
        start = next((n for n in range(min(starts)) if rows[0][n] != rows[1][n]), min(starts))
        longest, room = max(map(len, rows)), self.tokenize.max_length
        note = ""
        if longest > room:
            note = "cut" if self.tokenize.too_long == "cut" and start < room else "long"
        if note == "long" or rows[0][start:] == rows[1][start:]:
            return [], [], [], "long" if note == "long" else "bad chosen and rejected have the same tokens"
        return rows[0][:start], rows[0][start:], rows[1][start:], note


def encode_pairs(
    dataset,
    tokenizer,
    prompt: PromptFormat,
    *,
    max_length: int,
    too_long: str | None = None,
    skip_bad_rows: bool = False,
    processes: int | None = None,
) -> TokenPairs:
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
    from datasets import Features, List, Value

    if too_long not in (None, *TOO_LONG):
        raise ValueError(f"too_long must be one of {', '.join(TOO_LONG)}, got {too_long!r}")
    job = _Encode(_Tokenize(tokenizer, prompt, max_length, too_long, "assistant", True))
    rows = dataset.map(
        job,
        batched=True,
        batch_size=ROWS,
        remove_columns=dataset.column_names,
        features=Features({name: List(Value("int32")) for name in IDS} | {"note": Value("string")}),
        cache_file_name=scratch_file("pairs.arrow"),
        load_from_cache_file=False,
        new_fingerprint=secrets.token_hex(8),  # later maps of datasets name their files by it
        num_proc=processes,
        desc="tokenizing",
    )
    notes = rows.data.column("note").to_pylist()
    bad = check_notes(notes, len(notes), skip_bad_rows)
    kept = [number for number, note in enumerate(notes) if note in ("", "cut")]
    if not kept:
        raise ValueError(
            f"none of {len(notes)} pairs can be used: {notes.count('long')} are longer than max_length {max_length}, "
            f"{bad} are wrong; raise max_length, or shorten the data"
        )
    rows = rows.remove_columns("note")
    rows = rows.select(kept) if len(kept) < len(notes) else rows
    tokens = {name: sum(map(len, rows[name])) for name in IDS}
    return TokenPairs(rows, *tokens.values(), notes.count("long"), notes.count("cut"), bad)


class ChosenRows(Sequence):
    """The prompts of pairs with their better answers, as token rows.

    Args:
        pairs: A Dataset of :func:`encode_pairs`.

    Example:
        >>> from s2ft.text.pairs import ChosenRows
        >>> ChosenRows([{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}])[0]
        {'input_ids': [5, 6, 7], 'labels': [-100, -100, 7]}
    """

    def __init__(self, pairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number):
        return token_row(self.pairs[number], "chosen_ids")


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
