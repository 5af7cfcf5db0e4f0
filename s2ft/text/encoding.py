"""Convert data to token rows and batches.

A chat that is too long is left out and counted. It is cut only if the user asks for it, since a model that is trained
on cut answers learns to stop early. A plain text that is too long is cut into several rows.
"""

import logging
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from s2ft.config import refuse
from s2ft.selection.batches import IGNORED
from s2ft.text.data.rows import check_bad_rows
from s2ft.text.prompts import PromptFormat
from s2ft.text.templates import Rendered, TemplateError, begin_ids, encode_rendered, in_common, render_chat, template_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LOSS_ON = {"assistant": "all answers of the assistant", "last": "the last answer", "all": "the whole text"}
TOO_LONG = ("leave_out", "cut")
Labelled = tuple[list[int], list[int]]  # the ids and the labels of a text
UNLIMITED = 1 << 30
ROWS = 200  # rows that are tokenized at once; more need more memory and are no faster


def context_length(model) -> int:
    """Return the longest sequence that the model's config allows, in tokens, or UNLIMITED if it has no such value."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or UNLIMITED


class RowOutcome(IntEnum):
    """What became of a row."""

    KEPT = 0
    OTHER_PROMPT = 1  # kept, but the template writes another prompt when an answer follows it
    CUT = 2
    LONG_PROMPT = 3  # left out, because nothing with a loss fits into the longest row
    LONG_ROW = 4  # left out, because it is too long as a whole
    BAD = 5  # left out, because the template can't render it


@dataclass(frozen=True)
class Tokenized:
    """Token rows, or pairs of them, and what is known of them. Its text says so in one line.

    Attributes:
        dataset: A datasets.Dataset. Token rows have the columns input_ids and labels, lists of whole
            numbers. A label is -100 where the token has no loss. Pairs have the columns of TRL's DPOTrainer.
        summary: The number of rows and tokens, and how many of these are in the loss.
        outcomes: Number of rows by :class:`RowOutcome`.

    Example:
        >>> from s2ft.text.encoding import RowOutcome, Tokenized
        >>> print(Tokenized(None, "2 token rows", {RowOutcome.LONG_ROW: 1}))
        2 token rows; 1 too long row left out
    """

    dataset: Any
    summary: str
    outcomes: Mapping[RowOutcome, int] = field(default_factory=Counter)

    def __str__(self) -> str:
        count = Counter(self.outcomes)
        notes = (
            (count[RowOutcome.LONG_PROMPT] + count[RowOutcome.LONG_ROW], "too long row{s} left out"),
            (count[RowOutcome.CUT], "too long row{s} cut"),
            (count[RowOutcome.BAD], "row{s} left out that the chat template can't render"),
        )
        said = (f"{number:,} {text.format(s='s' * (number != 1))}" for number, text in notes if number)
        return "; ".join([self.summary, *said])


@dataclass(frozen=True)
class RowEncoder:
    """Turns normalised rows into token rows. The object is copied to other processes if there are several.

    Attributes:
        tokenizer: The model's tokenizer.
        prompt: The format of prompts.
        max_length: Longest token row.
        too_long: As in :func:`tokenize_rows`.
        loss_on: As in :func:`tokenize_rows`.
        completion_only: As in :func:`tokenize_rows`.
        columns: The columns with token ids.
    """

    tokenizer: Any
    prompt: PromptFormat
    max_length: int
    too_long: str | None = None
    loss_on: str = "assistant"
    completion_only: bool = True
    columns: tuple[str, ...] = ("input_ids", "labels")

    def __post_init__(self) -> None:
        loss_on, too_long = self.loss_on, self.too_long
        refuse(
            (loss_on not in LOSS_ON, f"loss_on must be one of {', '.join(LOSS_ON)}, got {loss_on!r}"),
            (too_long not in (None, *TOO_LONG), f"too_long must be one of {', '.join(TOO_LONG)}, got {too_long!r}"),
        )

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        """Return the columns, and the `outcome` and the `problem` of each row. One that is left out has no tokens."""
        good: list[tuple[dict[str, Any], list[Rendered]]] = []
        found: list[dict[str, Any]] = []
        for values in zip(*batch.values()):
            row = dict(zip(batch, values))
            try:
                good.append((row, self.texts(row)))
            except TemplateError as error:
                found.append({"outcome": RowOutcome.BAD, "problem": f"{row.get('place') or 'a row'}: {error}"})
        encoded = iter(encode_rendered(self.tokenizer, [text for _, texts in good for text in texts]))
        for row, texts in good:
            found += self.fitted(row, texts, [next(encoded) for _ in texts])
        return {name: [one.get(name) for one in found] for name in (*self.columns, "outcome", "problem")}

    def texts(self, row: dict[str, Any]) -> list[Rendered]:
        """Return what is encoded of a row. Raises TemplateError if the row can't be used."""
        return [self.rendered(row)]

    def rendered(self, row: dict[str, Any]) -> Rendered:
        """Return a row's text and spans. Raises TemplateError if the row can't be used."""
        prompt, answer = row.get("prompt"), row.get("completion")
        if row.get("messages") is not None:
            return self._chat(row, row["messages"])
        if row.get("text") is not None:
            prompt, answer = "", row["text"]
        elif not isinstance(prompt, str):
            return self._chat(row, [*prompt, *answer], len(prompt) if self.completion_only else 0)
        elif self.prompt.form == "chat":
            return self._chat(
                row,
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
                int(self.completion_only),
            )
        end = self.tokenizer.eos_token or ""
        text = prompt + answer + ("" if end and answer.endswith(end) else end)
        start = len(prompt) if self.completion_only else 0
        return Rendered(
            text, ((len(prompt),) if prompt else ()), ((start, len(text)),), tuple(begin_ids(self.tokenizer))
        )

    def _chat(self, row: dict[str, Any], messages: list, first: int = 0) -> Rendered:
        if self.prompt.form == "text":
            raise TemplateError("messages need a chat template, but form='text' uses none")
        whole = self.prompt.conversation(messages)
        added = len(whole) - len(messages)  # a system prompt
        return render_chat(
            self.tokenizer,
            whole,
            self.prompt.template or template_of(self.tokenizer),
            tools=row.get("tools"),
            loss_on=self.loss_on,
            first=first + added if first else 0,
        )

    def fitted(self, row: dict[str, Any], texts: list[Rendered], encoded: list[Labelled]) -> Iterator[dict[str, Any]]:
        """Yield the token rows of a row, which are cut or left out if they are too long.

        Args:
            row: The row.
            texts: Its texts.
            encoded: Ids and labels of its texts.
        """
        ((ids, labels),) = encoded
        longest, is_text = self.max_length, row.get("text") is not None
        if len(ids) <= longest:
            outcome = RowOutcome.OTHER_PROMPT if texts[0].other_prompt else RowOutcome.KEPT
            yield {"input_ids": ids, "labels": labels, "outcome": outcome}
        elif not _has_loss(labels[:longest]):
            yield {"outcome": RowOutcome.LONG_PROMPT}
        elif (self.too_long or ("cut" if is_text else "leave_out")) == "leave_out":
            yield {"outcome": RowOutcome.LONG_ROW}
        else:
            first = len(texts[0].begin)  # each piece begins with these tokens
            for start in range(first, len(ids) if is_text else first + 1, max(1, longest - first)):
                parts = ((*one[:first], *one[start : start + longest - first]) for one in (ids, labels))
                piece = dict(zip(("input_ids", "labels"), parts))
                if _has_loss(piece["labels"]):
                    yield {**piece, "outcome": RowOutcome.KEPT if start > first else RowOutcome.CUT}


def _has_loss(labels: Sequence[int]) -> bool:
    return any(label != IGNORED for label in labels[1:])


def tokenize_rows(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: PromptFormat,
    *,
    max_length: int,
    too_long: str | None = None,
    loss_on: str = "assistant",
    completion_only: bool = True,
    skip_bad_rows: bool = False,
    processes: int | None = None,
) -> Tokenized:
    """Convert normalised rows to token rows.

    Args:
        dataset: The rows, as :func:`s2ft.text.data.load_rows` returns them.
        tokenizer: The model's tokenizer.
        prompt: The format of prompts.
        max_length: Longest token row.
        too_long: What happens to a longer row: "leave_out" or "cut". None leaves chats and answers out, and cuts
            plain texts. A plain text is cut into several rows, another row at its end.
        loss_on: "assistant" trains on all answers of a chat, "last" on the last one, "all" on the whole text.
        completion_only: Whether a row with a prompt and a completion is trained on the completion only.
        skip_bad_rows: Leave out rows that the chat template cannot render. Otherwise they are an error.
        processes: Number of processes. None uses this one.

    Returns:
        The token rows and their numbers.

    Raises:
        ValueError: The template cannot render a row, no row is left, or an argument is not among its choices.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import ByT5Tokenizer
        >>> from s2ft.text.encoding import tokenize_rows
        >>> from s2ft.text.prompts import PromptFormat
        >>> rows = Dataset.from_list([{"prompt": "2+3=", "completion": "5"}])
        >>> tokenized = tokenize_rows(rows, ByT5Tokenizer(), PromptFormat("text"), max_length=20)
        >>> tokenized.dataset[0]
        {'input_ids': [53, 46, 54, 64, 56, 1], 'labels': [-100, -100, -100, -100, 56, 1]}
        >>> print(tokenized)
        1 token row, 6 tokens, 2 of them in the loss (33.3%): all answers of the assistant
    """
    job = RowEncoder(tokenizer, prompt, max_length, too_long, loss_on, completion_only)
    rows, outcomes = encoded_rows(dataset, job, skip_bad_rows, processes)
    if outcomes[RowOutcome.OTHER_PROMPT]:
        logger.warning(
            "the chat template writes another prompt when an answer follows it, in %d of %d rows: the model is trained "
            "on a context that differs from the one of generation",
            outcomes[RowOutcome.OTHER_PROMPT],
            len(dataset),
        )
    tokens = supervised = 0
    for batch in rows.with_format("numpy").iter(ROWS):
        tokens += sum(map(len, batch["labels"]))
        supervised += sum(int((labels[1:] != IGNORED).sum()) for labels in batch["labels"])  # the first has no loss
    summary = (
        f"{len(rows):,} token row{'s' * (len(rows) != 1)}, {tokens:,} tokens, {supervised:,} of them in the loss "
        f"({supervised / max(1, tokens):.1%}): {LOSS_ON[loss_on]}"
    )
    return Tokenized(rows, summary, outcomes)


def encoded_rows(
    dataset: "Dataset", job: RowEncoder, skip_bad_rows: bool, processes: int | None
) -> "tuple[Dataset, Counter[RowOutcome]]":
    """Run an encoder over rows, report the bad ones, and leave out those without tokens.

    Args:
        dataset: The normalised rows.
        job: The encoder.
        skip_bad_rows: Whether bad rows are left out. Otherwise they are an error.
        processes: Number of processes. None uses this one.

    Returns:
        The rows with the columns of the encoder, and the number of rows of each outcome.

    Raises:
        ValueError: Rows are bad, or no row is left.
    """
    from datasets import Features, List, Value

    token_lists = {name: List(Value("int32")) for name in job.columns}
    rows = dataset.map(
        job,
        batched=True,
        batch_size=ROWS,
        remove_columns=dataset.column_names,
        features=Features({**token_lists, "outcome": Value("int8"), "problem": Value("string")}),
        new_fingerprint=secrets.token_hex(8),  # later maps of datasets name their files by it
        num_proc=processes,
        desc="tokenizing",
    )
    outcomes, problems = (rows.data.column(name).to_pylist() for name in ("outcome", "problem"))
    problems = [problem for problem in problems if problem is not None]
    check_bad_rows(problems, len(dataset) - len(problems), skip_bad_rows)
    kept = [number for number, outcome in enumerate(outcomes) if outcome <= RowOutcome.CUT]
    if not kept:
        long_prompts, long_rows = (outcomes.count(one) for one in (RowOutcome.LONG_PROMPT, RowOutcome.LONG_ROW))
        raise ValueError(
            f"none of {len(dataset)} rows fits: {long_prompts} with a prompt of {job.max_length} tokens or more, "
            f"{long_rows} with a prompt and an answer that are longer together; raise max_length"
            + ", or give too_long='cut'"
            * (job.too_long != "cut")
        )
    rows = rows.select_columns(list(job.columns))
    return rows.select(kept) if len(kept) < len(rows) else rows, Counter(map(RowOutcome, outcomes))


def padded_batch(
    sequences: Sequence[Sequence[int]], pad: int, multiple: int = 1, side: str = "left"
) -> dict[str, torch.Tensor]:
    """Make a batch of sequences, padded to one length.

    Args:
        sequences: Token ids of each row.
        pad: The token id to pad with.
        multiple: The length of the batch is a multiple of this number.
        side: Where the padding is, "left" or "right".

    Returns:
        input_ids, attention_mask and position_ids, each [rows, longest] int64. Positions count from the first token
        of each row, so that they do not depend on the padding.

    Example:
        >>> from s2ft.text.encoding import padded_batch
        >>> batch = padded_batch([[5, 6, 7], [8]], pad=0)
        >>> batch["input_ids"].tolist()
        [[5, 6, 7], [0, 0, 8]]
        >>> batch["position_ids"].tolist()
        [[0, 1, 2], [0, 0, 0]]
    """
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
    ones = [torch.ones_like(row) for row in rows]
    more = -max(map(len, rows)) % multiple
    input_ids, attention_mask = (
        nn.functional.pad(
            nn.utils.rnn.pad_sequence(part, True, value, side), (more, 0) if side == "left" else (0, more), value=value
        )
        for part, value in ((rows, pad), (ones, 0))
    )
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


# ---- pairs of answers -----------------------------------------------------------------------------------


IDS = ("prompt_ids", "chosen_ids", "rejected_ids")  # the columns of TRL's DPOTrainer


class PairEncoder(RowEncoder):
    """Turns normalised pairs into pairs of token rows."""

    def texts(self, row: dict[str, Any]) -> list[Rendered]:
        """Return the prompt with each of the answers. Raises TemplateError if the row can't be used."""
        return [self.rendered({**row, "completion": row[answer]}) for answer in ("chosen", "rejected")]

    def fitted(self, row: dict[str, Any], texts: list[Rendered], encoded: list[Labelled]) -> Iterator[dict[str, Any]]:
        """Yield the pair, whose answers are cut or which is left out if it is too long."""
        starts, rows = [], []
        for ids, labels in encoded:
            trained = [place for place, label in enumerate(labels) if label != IGNORED]
            starts.append(trained[0] if trained else len(ids))
            rows.append(ids[: trained[-1] + 1] if trained else ids)
        start = min(*starts, in_common(*rows))
        is_long = max(map(len, rows)) > self.max_length
        chosen, rejected = (row[: self.max_length] for row in rows)
        same = chosen[start:] == rejected[start:]
        if is_long and (self.too_long != "cut" or same):
            yield {"outcome": RowOutcome.LONG_ROW}
        elif same:
            yield {"outcome": RowOutcome.BAD, "problem": f"{row['place']}: chosen and rejected have the same tokens"}
        else:
            pair = {"prompt_ids": chosen[:start], "chosen_ids": chosen[start:], "rejected_ids": rejected[start:]}
            yield {**pair, "outcome": RowOutcome.CUT if is_long else RowOutcome.KEPT}


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
        dataset: The rows, with the columns of :data:`s2ft.text.data.rows.PAIRS`.
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
        >>> from s2ft.text.encoding import encode_pairs
        >>> from s2ft.text.prompts import PromptFormat, pad_id
        >>> rows = Dataset.from_list([{"prompt": "2+3=", "chosen": "5", "rejected": "6", "tools": None, "place": "a"}])
        >>> encode_pairs(rows, ByT5Tokenizer(), PromptFormat("text"), max_length=20).dataset[0]
        {'prompt_ids': [53, 46, 54, 64], 'chosen_ids': [56, 1], 'rejected_ids': [57, 1]}
    """
    job = PairEncoder(tokenizer, prompt, max_length, too_long, columns=IDS)
    rows, outcomes = encoded_rows(dataset, job, skip_bad_rows, processes)
    summary = "{}: {} tokens of prompt, {} of the chosen answer and {} of the rejected one in the mean".format(
        f"{len(rows):,} pair{'s' * (len(rows) != 1)}",
        *(f"{sum(map(len, rows[name])) / len(rows):,.0f}" for name in IDS),
    )
    return Tokenized(rows, summary, outcomes)


def token_row(pair: Mapping[str, list[int]], answer: str) -> dict[str, list[int]]:
    """Return the prompt of a pair with one of its answers, "chosen_ids" or "rejected_ids", as a token row."""
    prompt, ids = pair["prompt_ids"], pair[answer]
    return {"input_ids": [*prompt, *ids], "labels": [IGNORED] * len(prompt) + list(ids)}
