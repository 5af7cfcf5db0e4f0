"""The running batch: sequences that come and go, and their keys and values.

All rows end at the same column: a shorter one has padding on its left, masked. A row's positions count from its own
first token and are in its keys already, so that padding can be put before it, or taken away, without computing
anything again. This is why sequences can join a batch that runs.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from s2ft.text.encoding import left_pad
from s2ft.text.output_head import contiguous_head


class Row:
    """One sequence in the batch: its prompt, its adapter's name in the bank, and the tokens it got.

    `failed` says why it can't go on.
    """

    def __init__(self, prompt: Sequence[int], sampler, adapter: str | None = None) -> None:
        self.prompt, self.sampler, self.adapter = list(prompt), sampler, adapter
        self.tokens: list[int] = []
        self.failed: str | None = None


class RunningBatch:
    """Rows that advance together, a token at a time.

    Args:
        mixing: ``AdapterBank.batch`` or the like: a context in which every row of the model has the adapter named.
    """

    def __init__(self, model, mixing: Callable[[list], AbstractContextManager] | None = None) -> None:
        self.model, self.mixing = model, mixing or (lambda names: nullcontext())
        self.rows: list[Row] = []
        self._cache: DynamicCache | None = None
        self._mask: Tensor | None = None  # [rows, columns], 1 for a token
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._positions = "position_ids" in accepted
        self._cache_option = "cache" if "cache" in accepted else "past_key_values"  # the older name

    def __len__(self) -> int:
        return len(self.rows)

    def adapters_of(self, rows: Sequence[Row]) -> AbstractContextManager:
        return self.mixing([row.adapter for row in rows])

    @torch.inference_mode()
    def admit(self, rows: Sequence[Row]) -> None:
        """Run the prompts of new rows and choose the first token of each. After an error the batch is as it was."""
        padded = left_pad([row.prompt for row in rows], 0)
        given = {name: tensor.to(self.model.device) for name, tensor in padded.items()}
        cache = DynamicCache()  # without the config: layers with a window keep all, and the mask does the rest
        logits = self._forward(rows, cache, **given)
        self._join(cache, given["attention_mask"])
        self.rows += rows
        self._choose(rows, logits)

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for every row. After an error the batch has to be cleared."""
        last = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self.model.device)
        self._mask = pad(self._mask, (0, 1), value=1)
        positions = self._mask.sum(1, keepdim=True) - 1
        self._choose(self.rows, self._forward(self.rows, self._cache, last, self._mask, positions))

    @torch.inference_mode()
    def keep(self, rows: Sequence[Row]) -> None:
        """Let the other rows go, and the columns that were theirs alone."""
        if len(rows) == len(self.rows):
            return
        if not rows:
            return self.clear()
        kept = [number for number, row in enumerate(self.rows) if row in rows]
        self.rows = [self.rows[number] for number in kept]
        index = torch.tensor(kept, device=self._mask.device)
        self._mask = self._mask[index]
        first = int(self._mask.argmax(1).min())
        self._mask = self._mask[:, first:]
        for layer in _layers(self._cache):  # indexed after the cut, so that no more is copied than stays
            layer.keys, layer.values = layer.keys[:, :, first:][index], layer.values[:, :, first:][index]

    def clear(self) -> None:
        self.rows, self._cache, self._mask = [], None, None

    def _forward(
        self, rows: Sequence[Row], cache: DynamicCache, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor
    ) -> Tensor:
        """Logits of the last position, [rows, vocabulary]."""
        positions = {"position_ids": position_ids} if self._positions else {}
        with self.adapters_of(rows), contiguous_head(self.model):
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=True,
                **positions,
                **{self._cache_option: cache},
                **self._last_only,
            )
        return output.logits[:, -1].float()

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> None:
        best, likeliest = logits.max(1)
        for row, top, token, own in zip(rows, best.tolist(), likeliest.tolist(), logits):
            if not abs(top) < float("inf"):
                row.failed = "the model's output is not a finite number"
            else:
                row.tokens.append(token if row.sampler.greedy else row.sampler.choose(own))

    def _join(self, cache: DynamicCache, mask: Tensor) -> None:
        if not self.rows:
            self._cache, self._mask = cache, mask
            return
        columns = max(self._mask.shape[1], mask.shape[1])
        old, new = columns - self._mask.shape[1], columns - mask.shape[1]
        joined = [
            [
                torch.cat([pad(a, (0, 0, old, 0)), pad(b, (0, 0, new, 0))])
                for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values))
            ]
            for mine, theirs in zip(_layers(self._cache), _layers(cache))
        ]
        for layer, (keys, values) in zip(_layers(self._cache), joined):  # after all of them could be made
            layer.keys, layer.values = keys, values
        self._mask = torch.cat([pad(self._mask, (old, 0)), pad(mask, (new, 0))])


def _layers(cache: DynamicCache) -> list:
    """Those that hold something: layers that share keys with others have none."""
    return [layer for layer in cache.layers if layer.keys is not None]


def rows_interact(config) -> bool:
    """Whether a row's result depends on the longest of its batch: rotary embeddings that scale with the length."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]
    return any(kind.get("rope_type", kind.get("type")) in ("dynamic", "longrope") for kind in kinds)
