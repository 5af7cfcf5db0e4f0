"""The data that a training run is evaluated on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from s2ft.text.examples import Example


@dataclass(frozen=True)
class HeldOut:
    """Rows for the evaluation loss and, with a task, examples for the accuracy.

    Attributes:
        rows: Token rows whose loss is computed, a Dataset with the columns input_ids and labels.
        examples: The same data as examples. They are answered only if `task` is set.
        task: "arithmetic", "commonsense", or None for the loss alone.
        batch_size: Number of prompts that are generated at once.
        max_new_tokens: Longest answer in tokens.
    """

    rows: Any
    examples: Sequence[Example] = ()
    task: str | None = None
    batch_size: int = 32
    max_new_tokens: int = 256
