"""Calibration data for a selection: rows of the training data."""

import random
from collections.abc import Iterator, Sequence

from s2ft.selection import METRICS
from s2ft.text.encoding import AnswerCollator, TokenRow
from s2ft.text.prompts import pad_id

SHARE = 0.01  # of the data, as in the paper
LEAST = 16  # rows, where the data is small


def needs_calibration(config) -> bool:
    return config.units is None and METRICS[config.selection].calibrated


def calibration_for(
    config, tokenizer, rows: Sequence[TokenRow], examples: int | None, batch_size: int
) -> Iterator[dict] | None:
    """Batches as in training, of rows drawn with the config's seed; None where the selection needs none.

    Args:
        examples: rows to draw; None for 1 % of them, but at least 16.
    Raises: ValueError for a number of rows that can't be drawn, or one that would have no use.
    """
    if not needs_calibration(config):
        if examples is not None:
            raise ValueError(
                "calibration_examples has no use here: "
                f"{'units' if config.units else f'selection={config.selection!r}'} needs no data"
            )
        return None
    if examples is None:
        examples = min(len(rows), max(LEAST, round(SHARE * len(rows))))
    if not 1 <= examples <= len(rows):
        raise ValueError(f"calibration_examples must be from 1 to the {len(rows)} rows there are, got {examples}")
    drawn = random.Random(config.seed).sample(list(rows), examples)
    collate = AnswerCollator(pad_id(tokenizer))
    return (collate(drawn[start : start + batch_size]) for start in range(0, examples, batch_size))
