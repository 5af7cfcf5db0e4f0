"""Make batches of token rows. A token row is a dict with input_ids and labels, see s2ft.text.encoding."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2ft.selection.batches import IGNORED
from s2ft.selection.metrics import METRICS
from s2ft.text.divergence import text_rows
from s2ft.text.encoding import padded_batch
from s2ft.text.prompts import pad_id


@dataclass(frozen=True)
class TokenCollator:
    """Pad token rows on one side, and request logits only from the first position that has a label.

    Logits of the prompt have no loss, and with a large vocabulary they are the most expensive part of a step. Rows that
    are padded on the left end at the last position, so that one number says for all of them which logits are needed.
    The first token of a row has no label, since no token of the row predicts it.

    Attributes:
        pad: The token id to pad with.
        keep_logits: Whether the model can be asked for the logits of the last positions only.
        multiple: The length of a batch is a multiple of this number.
        side: Where the padding is, "left", or "right" without `keep_logits`.

    Example:
        >>> from s2ft.text.collator import TokenCollator
        >>> rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
        >>> batch = TokenCollator(pad=0)(rows)
        >>> batch["input_ids"].tolist(), batch["labels"].tolist(), batch["logits_to_keep"]
        ([[5, 6, 7], [0, 8, 9]], [[-100, 7], [-100, 9]], 2)
        >>> model(**batch).loss
        tensor(4..., grad_fn=...)
    """

    pad: int
    keep_logits: bool = True
    multiple: int = 1
    side: str = "left"

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict:
        batch = padded_batch([row["input_ids"] for row in rows], self.pad, self.multiple, self.side)
        own = [[IGNORED, *row["labels"][1:]] for row in rows]
        labels = padded_batch(own, IGNORED, self.multiple, self.side)["input_ids"]
        if not self.keep_logits:
            return {**batch, "labels": labels, "use_cache": False}
        labelled = (labels != IGNORED).any(0)
        first = int(labelled.int().argmax()) if labelled.any() else labels.shape[1]
        keep = labels.shape[1] - max(first - 1, 0)  # the position before the first label predicts it
        return {**batch, "labels": labels[:, -keep:], "logits_to_keep": keep, "use_cache": False}


@dataclass(frozen=True)
class PackedCollator:
    """Make batches of rows that are packed, or pack the rows of a batch into one sequence.

    Positions begin at 0 with each row. There is no attention mask, since models find the rows by their positions. Where
    the model computes attention between all positions of a sequence, each pack stays a sequence of its own. Only
    positions that predict a label get logits if all packs are one sequence.

    Attributes:
        pad: The token id to pad with.
        flat: Whether all rows become one sequence without padding.
        chosen_logits: Whether the model can be asked for the logits of chosen positions.
        multiple: The length of a batch is a multiple of this number.

    Example:
        >>> from s2ft.text.collator import PackedCollator
        >>> row = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, -100, 9], "seq_lengths": [2, 3]}
        >>> batch = PackedCollator(pad=0)([row])
        >>> batch["position_ids"].tolist(), batch["logits_to_keep"].tolist(), batch["shift_labels"].tolist()
        ([[0, 1, 0, 1, 2]], [0, 3], [[6, 9]])
    """

    pad: int
    flat: bool = True
    chosen_logits: bool = True
    multiple: int = 1

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict:
        parts = [self._pack(row) for row in rows]
        if self.flat:
            parts = [tuple(torch.cat(column) for column in zip(*parts))]
        longest = -(-max(len(ids) for ids, _, _ in parts) // self.multiple) * self.multiple
        filled = zip((self.pad, IGNORED, 0), zip(*parts))
        input_ids, labels, position_ids = (
            torch.stack([nn.functional.pad(part, (0, longest - len(part)), value=value) for part in column])
            for value, column in filled
        )
        batch = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        if self.flat:
            batch |= _boundaries(position_ids[0])
        targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].contiguous()
        if self.chosen_logits and len(parts) == 1:
            chosen = (targets[0] != IGNORED).nonzero()[:, 0]
            chosen = chosen if len(chosen) else torch.tensor([0])
            targets = targets[:, chosen]
            batch["logits_to_keep"] = chosen
        return {**batch, "labels": targets, "shift_labels": targets}

    @staticmethod
    def _pack(row: Mapping[str, Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ids, the labels and the positions of a row, or of a pack with the lengths of its rows."""
        positions = torch.cat([torch.arange(length) for length in row.get("seq_lengths") or [len(row["input_ids"])]])
        labels = torch.tensor(row["labels"], dtype=torch.int64)
        labels[positions == 0] = IGNORED
        return torch.tensor(row["input_ids"], dtype=torch.int64), labels, positions


def _boundaries(positions: Tensor) -> dict[str, Tensor | int]:
    """Return where rows begin in one sequence, as flash attention and kernels of recurrent layers want it.

    Models would find it from the positions themselves, but in each layer, and on a GPU the host would wait each time.
    """
    starts = (positions == 0).nonzero()[:, 0]
    bounds = torch.cat([starts, torch.tensor([len(positions)])]).to(torch.int32)
    longest = int(bounds.diff().max())
    numbers = torch.repeat_interleave(torch.arange(len(starts), dtype=torch.int32), bounds.diff())
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": numbers[None],
    }


@dataclass(frozen=True)
class SplitCollator:
    """Make batches whose rows are divided among devices (context parallelism).

    Rows are padded on the right: the attention of such a batch has no mask but the causal one, under which no token
    sees the padding after it. Each position has its label beside it, because the next token may be on another device.
    The mask has no padding either, so that models make no mask of all pairs of positions, which would not be used.

    Attributes:
        pad: The token id to pad with.
        multiple: The length of a batch is a multiple of this number, so that each device gets the same share.

    Example:
        >>> from s2ft.text.collator import SplitCollator
        >>> batch = SplitCollator(pad=0, multiple=4)([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
        >>> batch["input_ids"].tolist(), batch["shift_labels"].tolist(), batch["position_ids"].tolist()
        ([[5, 6, 7, 0]], [[6, 7, -100, -100]], [[0, 1, 2, 0]])
    """

    pad: int
    multiple: int

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict:
        batch = PackedCollator(self.pad, flat=False, chosen_logits=False, multiple=self.multiple)(rows)
        # The devices' shares are cut from each tensor in place, so that no two may be one.
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"]), "labels": batch["labels"].clone()}


# ---- batches for a selection ----------------------------------------------------------------------------


SHARE = 0.01  # share of the rows that is drawn, as in the paper
LEAST = 16  # number of rows that is drawn from small data


def needs_calibration(config) -> bool:
    """Whether the selection of a config uses calibration data."""
    return config.units is None and METRICS[config.selection].calibrated


def calibration_for(
    config, tokenizer, rows, examples: int | None, batch_size: int, convert: Callable = dict
) -> Iterator[dict] | None:
    """Draw rows with the config's seed and collate them, padded on the right.

    Args:
        config: The S2FTConfig of the run.
        tokenizer: The model's tokenizer.
        rows: The rows of the training data.
        examples: Number of rows to draw. None draws 1 % of the rows, but at least 16.
        batch_size: Rows in a batch.
        convert: Makes a token row of a row.

    Returns:
        The batches, or None if the selection needs no calibration data.

    Raises:
        ValueError: `examples` is not from 1 to the number of rows, or the selection needs no calibration data.
    """
    if not needs_calibration(config):
        if examples is not None:
            raise ValueError(
                "calibration_examples has no effect here: "
                f"{'units' if config.units else f'selection={config.selection!r}'} needs no data"
            )
        return None
    if examples is None:
        examples = min(len(rows), max(LEAST, round(SHARE * len(rows))))
    if not 1 <= examples <= len(rows):
        raise ValueError(f"calibration_examples must be from 1 to the {len(rows)} rows there are, got {examples}")
    drawn = random.Random(config.seed).sample(range(len(rows)), examples)
    return batches_of([convert(rows[number]) for number in drawn], tokenizer, batch_size)


def batches_of(rows: Sequence, tokenizer, batch_size: int) -> Iterator[dict]:
    """Collate token rows a batch at a time. They are padded on the right, which every causal model ignores.

    Args:
        rows: Token rows.
        tokenizer: The model's tokenizer.
        batch_size: Rows in a batch.
    """
    collate = TokenCollator(pad_id(tokenizer), keep_logits=False, side="right")
    return (collate(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size))


def text_batches(rows, tokenizer, longest: int, most: int, seed: int, batch_size: int) -> Iterator[dict] | None:
    """Collate the text whose most important units are protected; None without any.

    Args:
        rows: The rows, as :func:`s2ft.text.divergence.read_texts` returns them, or None.
        tokenizer: The model's tokenizer.
        longest: Longest token row.
        most: Number of token rows to draw.
        seed: Seed of the draw.
        batch_size: Rows in a batch.
    """
    return None if rows is None else batches_of(text_rows(rows, tokenizer, longest, most, seed), tokenizer, batch_size)
