"""Draw calibration data for a selection from the training data."""

import random
from collections.abc import Iterator, Sequence

from s2ft.selection import METRICS
from s2ft.text.collator import TokenCollator
from s2ft.text.prompts import pad_id

SHARE = 0.01  # share of the rows that is drawn, as in the paper
LEAST = 16  # number of rows that is drawn from small data


def needs_calibration(config) -> bool:
    """Whether the selection of a config uses calibration data."""
    return config.units is None and METRICS[config.selection].calibrated


def calibration_for(config, tokenizer, rows, examples: int | None, batch_size: int) -> Iterator[dict] | None:
    """Draw rows with the config's seed and collate them as for training.

    Args:
        config: The S2FTConfig of the run.
        tokenizer: The model's tokenizer.
        rows: The token rows of the training data, see :func:`s2ft.text.encoding.tokenize_rows`.
        examples: Number of rows to draw. None draws 1 % of the rows, but at least 16.
        batch_size: Rows in a batch.

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
    return batches_of([rows[number] for number in drawn], tokenizer, batch_size)


def batches_of(rows: Sequence, tokenizer, batch_size: int) -> Iterator[dict]:
    """Collate token rows as for training, a batch at a time.

    Args:
        rows: Token rows.
        tokenizer: The model's tokenizer.
        batch_size: Rows in a batch.
    """
    collate = TokenCollator(pad_id(tokenizer))
    return (collate(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size))
