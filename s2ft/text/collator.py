"""Make batches of token rows. A token row is a dict with input_ids and labels, see s2ft.text.encoding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2ft.selection.batches import IGNORED
from s2ft.text.encoding import left_pad


@dataclass(frozen=True)
class TokenCollator:
    """Pad token rows on the left, and request logits only from the first position that has a label.

    Logits of the prompt have no loss, and with a large vocabulary they are the most expensive part of a step. Rows that
    are padded on the left end at the last position, so that one number says for all of them which logits are needed.
    The first token of a row has no label, since no token of the row predicts it.

    Attributes:
        pad: The token id to pad with.
        keep_logits: Whether the model can be asked for the logits of the last positions only.
        multiple: The length of a batch is a multiple of this number.

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

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict:
        batch = left_pad([row["input_ids"] for row in rows], self.pad, self.multiple)
        labels = self._labels(rows, batch["input_ids"].shape[1])
        if not self.keep_logits:
            return {**batch, "labels": labels, "use_cache": False}
        labelled = (labels != IGNORED).any(0)
        first = int(labelled.int().argmax()) if labelled.any() else labels.shape[1]
        keep = labels.shape[1] - max(first - 1, 0)  # the position before the first label predicts it
        return {**batch, "labels": labels[:, -keep:], "logits_to_keep": keep, "use_cache": False}

    @staticmethod
    def _labels(rows: Sequence[Mapping[str, Sequence[int]]], length: int) -> Tensor:
        labels = torch.full((len(rows), length), IGNORED)
        for number, row in enumerate(rows):
            own = torch.tensor(row["labels"], dtype=torch.int64)
            own[:1] = IGNORED
            labels[number, length - len(own) :] = own
        return labels
