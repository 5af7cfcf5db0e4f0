"""Convert data to token rows and batches.

A chat that is too long is left out and counted. It is cut only if the user asks for it, since a model that is trained
on cut answers learns to stop early. A plain text that is too long is cut into several rows.
"""

import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from s2ft.selection.batches import IGNORED
from s2ft.text.data.loading import Problems
from s2ft.text.data.scratch import scratch_file
from s2ft.text.examples import Example
from s2ft.text.prompts import PromptFormat, encode_prompt
from s2ft.text.templates import Rendered, TemplateError, begin_ids, render_chat, template_of
from s2ft.text.tokens import encode_rendered

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LOSS_ON = {"assistant": "all answers of the assistant", "last": "the last answer", "all": "the whole text"}
TOO_LONG = ("leave_out", "cut")
ROWS = 200  # rows that are tokenized at once; more need more memory and are no faster


def context_length(model) -> int | None:
    """Return the longest sequence that the model's config allows, in tokens, or None if it has no such value."""
    return getattr(model.config, "max_position_embeddings", None)


@dataclass(frozen=True)
class Tokenized:
    """Token rows and what is known of them. Its text says on what share of the tokens the loss falls.

    Attributes:
        dataset: A datasets.Dataset or IterableDataset with the columns input_ids and labels, lists of whole numbers.
            A label is -100 where the token has no loss.
        rows: Number of token rows. This and the other numbers are None for a data set that is streamed.
        tokens: Number of tokens.
        supervised: Number of tokens with a loss. The first token of a row is never counted.
        loss_on: Where the loss falls: "assistant", "last" or "all".
        long_prompts: Rows left out because nothing with a loss fits into the longest row.
        long_rows: Rows left out because they are too long as a whole.
        cut: Rows that were cut.
        bad: Rows left out because the chat template cannot render them.
        other_prompts: Rows whose template writes another prompt when an answer follows it.

    Example:
        >>> from s2ft.text.encoding import Tokenized
        >>> print(Tokenized(None, rows=2, tokens=100, supervised=25, long_prompts=0, long_rows=1, cut=0, bad=0))
        2 token rows, 100 tokens; the loss falls on 25 of them (25.0%): all answers ...; 1 too long row left out
    """

    dataset: Any
    rows: int | None = None
    tokens: int | None = None
    supervised: int | None = None
    loss_on: str = "assistant"
    long_prompts: int | None = None
    long_rows: int | None = None
    cut: int | None = None
    bad: int | None = None
    other_prompts: int | None = None

    def __str__(self) -> str:
        if self.rows is None:
            return f"the rows are streamed; the loss falls on {LOSS_ON[self.loss_on]}"
        share = self.supervised / max(1, self.tokens)
        left_out = self.long_prompts + self.long_rows
        notes = [
            (left_out, "too long row{s} left out"),
            (self.cut, "too long row{s} cut"),
            (self.bad, "row{s} left out that the chat template can't render"),
        ]
        return "; ".join(
            [
                f"{self.rows:,} token row{'s' * (self.rows != 1)}, {self.tokens:,} tokens",
                f"the loss falls on {self.supervised:,} of them ({share:.1%}): {LOSS_ON[self.loss_on]}",
                *(f"{count:,} {text.format(s='s' * (count != 1))}" for count, text in notes if count),
            ]
        )


@dataclass(frozen=True)
class _Tokenize:
    """Turns normalised rows into token rows. The object is copied to other processes if there are several."""

    tokenizer: Any
    prompt: PromptFormat
    max_length: int
    too_long: str | None
    loss_on: str
    completion_only: bool

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
        rendered: list[Rendered | str] = [self._rendered(row) for row in rows]
        good = [one for one in rendered if isinstance(one, Rendered)]
        encoded = iter(encode_rendered(self.tokenizer, good))
        result: dict[str, list] = {"input_ids": [], "labels": [], "note": []}
        for row, one in zip(rows, rendered):
            if isinstance(one, str):
                pieces = [([], [], "bad " + one)]
            else:
                pieces = list(self._fitted(*next(encoded), row.get("text") is not None, one.other_prompt))
            for piece in pieces:
                for column, value in zip(result.values(), piece):
                    column.append(value)
        return result

    def _rendered(self, row: dict[str, Any]) -> Rendered | str:
        """Return the row's text and spans, or what is wrong with the row."""
        try:
            return self._text(row) if row.get("messages") is None else self._chat(row, row["messages"], 0)
        except TemplateError as error:
            return f"{row.get('place') or 'a row'}: {error}"

    def _text(self, row: dict[str, Any]) -> Rendered:
        prompt, answer = row.get("prompt"), row.get("completion")
        if row.get("text") is not None:
            prompt, answer = "", row["text"]
        elif not isinstance(prompt, str):
            return self._chat(row, [*prompt, *answer], len(prompt) if self.completion_only else 0)
        elif self.prompt.form == "chat":
            return self._chat(row, [_message("user", prompt), _message("assistant", answer)], 0)
        end = self.tokenizer.eos_token or ""
        text = prompt + answer + ("" if end and answer.endswith(end) else end)
        start = len(prompt) if self.completion_only else 0
        cuts = (len(prompt),) if prompt else ()
        return Rendered(text, cuts, ((start, len(text)),), tuple(begin_ids(self.tokenizer)))

    def _chat(self, row: dict[str, Any], messages: list, first: int) -> Rendered:
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

    def _fitted(
        self, ids: list[int], labels: list[int], is_text: bool, other_prompt: bool
    ) -> Iterator[tuple[list[int], list[int], str]]:
        """Yield the token rows of a row, each with a note. A row without tokens is left out later."""
        note = "other prompt" if other_prompt else ""
        longest = self.max_length
        if len(ids) <= longest:
            yield ids, labels, note
            return
        how = self.too_long or ("cut" if is_text else "leave_out")
        if not _has_loss(labels[:longest]):
            yield [], [], "long prompt"
        elif how == "leave_out":
            yield [], [], "long row"
        elif not is_text:
            yield ids[:longest], labels[:longest], "cut"
        else:
            for start in range(0, len(ids), longest):
                piece = ids[start : start + longest], labels[start : start + longest]
                if _has_loss(piece[1]):
                    yield *piece, "cut" if start == 0 else ""


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _has_loss(labels: Sequence[int]) -> bool:
    return any(label != IGNORED for label in labels[1:])


def tokenize_rows(
    dataset: "Dataset | IterableDataset",
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
        1 token row, 6 tokens; the loss falls on 2 of them (33.3%): all answers of the assistant
    """
    from datasets import IterableDataset

    for name, value, choices in (("loss_on", loss_on, LOSS_ON), ("too_long", too_long or "cut", TOO_LONG)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    job = _Tokenize(tokenizer, prompt, max_length, too_long, loss_on, completion_only)
    if isinstance(dataset, IterableDataset):
        return _stream(dataset, job, skip_bad_rows)
    rows = dataset.map(
        job,
        batched=True,
        batch_size=ROWS,
        remove_columns=dataset.column_names,
        features=_features(note=True),
        cache_file_name=scratch_file("tokens.arrow"),
        load_from_cache_file=False,
        new_fingerprint=secrets.token_hex(8),  # later maps of datasets name their files by it
        num_proc=processes,
        desc="tokenizing",
    )
    return _counted(rows, len(dataset), job, skip_bad_rows)


def _features(note: bool = False):
    from datasets import Features, List, Value

    columns = {"input_ids": List(Value("int32")), "labels": List(Value("int32"))}
    return Features(columns | ({"note": Value("string")} if note else {}))


def _counted(rows, of: int, job: _Tokenize, skip_bad_rows: bool) -> Tokenized:
    """Check the notes, and leave out the rows without tokens."""
    notes = rows.data.column("note").to_pylist()
    bad = check_notes(notes, of, skip_bad_rows)
    left_out = {"long prompt", "long row"}
    kept = [number for number, note in enumerate(notes) if note not in left_out and not note.startswith("bad ")]
    counts = {name: notes.count(note) for name, note in
              (("long_prompts", "long prompt"), ("long_rows", "long row"), ("cut", "cut"),
               ("other_prompts", "other prompt"))}  # fmt: skip
    if not kept:
        raise ValueError(_nothing_left(of, job.max_length, counts, bad))
    if counts["other_prompts"]:
        logger.warning(
            "the chat template writes another prompt when an answer follows it, in %d of %d rows: the model is trained "
            "on a context that differs from the one of generation",
            counts["other_prompts"],
            of,
        )
    rows = rows.remove_columns("note")
    if len(kept) < len(notes):
        rows = rows.select(kept)
    tokens, supervised = _token_counts(rows)
    return Tokenized(rows, len(rows), tokens, supervised, job.loss_on, bad=bad, **counts)


def check_notes(notes: Sequence[str], of: int, skip_bad_rows: bool) -> int:
    """Report the rows whose note says that they are bad.

    Args:
        notes: What was noted of the rows. A bad row has "bad " and the problem.
        of: Number of rows.
        skip_bad_rows: Whether bad rows are left out.

    Returns:
        The number of bad rows.

    Raises:
        ValueError: There are bad rows that must not be left out, or all rows are bad.
    """
    problems = Problems(skip_bad_rows)
    for note in notes:
        if note.startswith("bad "):
            problems.add(note.removeprefix("bad "))
    problems.check(of - problems.count)
    return problems.count


def _token_counts(rows) -> tuple[int, int]:
    """Number of tokens, and of tokens with a loss. The first token of a row has none, since nothing predicts it."""
    tokens = supervised = 0
    for batch in rows.with_format("numpy").iter(ROWS):
        for labels in batch["labels"]:
            tokens += len(labels)
            supervised += int((labels[1:] != IGNORED).sum())
    return tokens, supervised


def _nothing_left(of: int, max_length: int, counts: dict[str, int], bad: int) -> str:
    reasons = [
        (counts["long_prompts"], f"with a prompt of {max_length} tokens or more"),
        (counts["long_rows"], "with a prompt and an answer that are longer together"),
        (bad, "that the chat template can't render"),
    ]
    text = ", ".join(f"{count} {reason}" for count, reason in reasons if count) or "all are empty"
    return f"none of {of} rows fits: {text}; raise max_length, shorten the data, or give too_long='cut'"


def _stream(dataset, job: _Tokenize, skip_bad_rows: bool) -> Tokenized:
    """Tokenize rows as they are read. Bad rows raise when they come."""

    problems = Problems(skip_bad_rows, at_once=True)

    def convert(batch: Mapping[str, list]) -> dict[str, list]:
        converted = job(batch)
        for note in converted["note"]:
            if note.startswith("bad "):
                problems.add(note.removeprefix("bad "))
        kept = [number for number, ids in enumerate(converted["input_ids"]) if ids]
        return {name: [converted[name][number] for number in kept] for name in ("input_ids", "labels")}

    columns = dataset.column_names or list(next(iter(dataset)))
    rows = dataset.map(convert, batched=True, batch_size=ROWS // 10, remove_columns=columns, features=_features())
    return Tokenized(rows, loss_on=job.loss_on)


def encode_prompts(
    tokenizer, examples: Sequence[Example], room: int, prompt: PromptFormat | None = None
) -> list[list[int] | None]:
    """Encode the prompts of examples, and log a warning with the number of prompts that are too long.

    Args:
        tokenizer: The model's tokenizer.
        examples: The examples whose prompts are encoded.
        room: Longest prompt in tokens.
        prompt: The format of prompts. None uses the tokenizer's chat template.

    Returns:
        Token ids for each example, or None if its prompt is too long.

    Raises:
        ValueError: No prompt fits.
    """
    form = prompt or PromptFormat()
    prompts = [encode_prompt(tokenizer, example.prompt_for(form), example.tools) for example in examples]
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
