"""The running batch: sequences that are generated together, with their keys and values.

All rows end at the same column. A shorter row has masked padding on its left. The positions of a row count from its
first token, and its keys contain them already. Padding can therefore be added or removed without computing anything
again, and sequences can join or leave between two steps.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from s2ft.text.encoding import left_pad
from s2ft.text.output_head import contiguous_head


class Row:
    """One sequence of a batch.

    Attributes:
        prompt: Token ids of the prompt.
        sampler: The :class:`~s2ft.text.sampling.Sampler` that chooses the tokens.
        adapter: Name of the adapter in the bank. None is the base.
        tokens: The generated tokens.
        failed: Why the sequence cannot continue, or None.
    """

    def __init__(self, prompt: Sequence[int], sampler, adapter: str | None = None) -> None:
        self.prompt, self.sampler, self.adapter = list(prompt), sampler, adapter
        self.tokens: list[int] = []
        self.failed: str | None = None


R = TypeVar("R", bound=Row)


class RunningBatch(Generic[R]):
    """Rows that are generated together, one token a step.

    Args:
        model: A causal language model of transformers.
        mixing: A function such as ``AdapterBank.batch``. It gets the adapter names of the rows and returns a context
            in which each row runs with its adapter. None runs all rows with the model as it is.

    Example:
        >>> from s2ft.text.running_batch import Row, RunningBatch
        >>> from s2ft.text.sampling import Sampler
        >>> batch, row = RunningBatch(model.eval()), Row([5, 6, 7], Sampler())
        >>> batch.admit([row])
        >>> batch.step()
        >>> len(row.tokens)
        2
    """

    def __init__(self, model, mixing: Callable[[list], AbstractContextManager] | None = None) -> None:
        self.model, self.mixing = model, mixing or (lambda names: nullcontext())
        self.rows: list[R] = []
        self._cache: DynamicCache | None = None
        self._mask: Tensor | None = None  # [rows, columns], 1 for a token, 0 for padding
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._positions = "position_ids" in accepted
        self._cache_option = "cache" if "cache" in accepted else "past_key_values"  # the name in older models

    def __len__(self) -> int:
        return len(self.rows)

    def adapters_of(self, rows: Sequence[R]) -> AbstractContextManager:
        """Return the context in which each row runs with its adapter."""
        return self.mixing([row.adapter for row in rows])

    @torch.inference_mode()
    def admit(self, rows: Sequence[R]) -> None:
        """Run the prompts of new rows, choose the first token of each, and add the rows to the batch.

        An error leaves the batch unchanged.

        Args:
            rows: The new rows. Their prompts are run in one pass.
        """
        padded = left_pad([row.prompt for row in rows], 0)
        inputs = {name: tensor.to(self.model.device) for name, tensor in padded.items()}
        # Without the config, layers with a sliding window keep all keys, and the mask limits them.
        cache = DynamicCache()
        logits = self._forward(rows, cache, **inputs)
        self._join(cache, inputs["attention_mask"])
        self.rows += rows
        self._choose(rows, logits)

    @torch.inference_mode()
    def replace(self, row: R) -> None:
        """Run the prompt of a new row in place of the only row, and choose its first token.

        The keys and values of the beginning that both sequences share are used again. The new row must run with the
        weights and the adapter of the earlier one. After an error the batch must be cleared.

        Args:
            row: The new row. The batch has one row, or none.

        Example:
            >>> from s2ft.text.running_batch import Row, RunningBatch
            >>> from s2ft.text.sampling import Sampler
            >>> batch, first = RunningBatch(model.eval()), Row([5, 6, 7], Sampler())
            >>> batch.replace(first)
            >>> batch.replace(Row([5, 6, 7, *first.tokens, 8], Sampler()))  # the model runs two tokens
        """
        if len(self.rows) > 1:
            raise ValueError(f"the batch must have at most one row, it has {len(self.rows)}")
        same = self._shared_with(row) if self.rows and not rows_interact(self.model.config) else 0
        if not same:
            self.clear()
            return self.admit([row])
        for layer in _layers(self._cache):
            layer.keys, layer.values = layer.keys[:, :, :same], layer.values[:, :, :same]
        rest = torch.tensor([row.prompt[same:]], device=self.model.device)
        self._mask = torch.ones(1, len(row.prompt), dtype=torch.long, device=self.model.device)
        positions = torch.arange(same, len(row.prompt), device=self.model.device)[None]
        self.rows = [row]
        self._choose(self.rows, self._forward(self.rows, self._cache, rest, self._mask, positions))

    def _shared_with(self, row: R) -> int:
        """The number of tokens at the beginning of a row whose keys and values the batch has; at least one is run."""
        if not bool(self._mask.all()):
            return 0  # columns of padding, from a row that has left the batch
        earlier = [*self.rows[0].prompt, *self.rows[0].tokens][: self._mask.shape[1]]
        pairs = zip(earlier, row.prompt[:-1])
        return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(earlier), len(row.prompt) - 1))

    @torch.inference_mode()
    def step(self) -> None:
        """Generate one more token for each row. After an error the batch must be cleared."""
        last = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self.model.device)
        self._mask = pad(self._mask, (0, 1), value=1)
        positions = self._mask.sum(1, keepdim=True) - 1
        self._choose(self.rows, self._forward(self.rows, self._cache, last, self._mask, positions))

    @torch.inference_mode()
    def keep(self, rows: Sequence[R]) -> None:
        """Remove all other rows, and the columns that only they used.

        Args:
            rows: Rows of the batch that stay.
        """
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
        for layer in _layers(self._cache):  # cut before indexing, so that only what stays is copied
            layer.keys, layer.values = layer.keys[:, :, first:][index], layer.values[:, :, first:][index]

    def clear(self) -> None:
        """Remove all rows."""
        self.rows, self._cache, self._mask = [], None, None

    def _forward(
        self, rows: Sequence[R], cache: DynamicCache, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor
    ) -> Tensor:
        """Return the logits of the last position, [rows, vocabulary] float32."""
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

    def _choose(self, rows: Sequence[R], logits: Tensor) -> None:
        best, likeliest = logits.max(1)
        for row, top, token, row_logits in zip(rows, best.tolist(), likeliest.tolist(), logits):
            if not abs(top) < float("inf"):
                row.failed = "the model's output is not a finite number"
                continue
            if not (row.sampler.greedy and row.sampler.plain):
                token = row.sampler.choose(row_logits, row.tokens, row.prompt)
            row.tokens.append(token)

    def _join(self, cache: DynamicCache, mask: Tensor) -> None:
        if not self.rows:
            self._cache, self._mask = cache, mask
            return
        columns = max(self._mask.shape[1], mask.shape[1])
        old, new = columns - self._mask.shape[1], columns - mask.shape[1]
        joined = [
            [
                torch.cat([pad(a, (0, 0, old, 0)), pad(b, (0, 0, new, 0))])
                for a, b in ((running.keys, joining.keys), (running.values, joining.values))
            ]
            for running, joining in zip(_layers(self._cache), _layers(cache))
        ]
        # Assigned only after all were made, so that an error changes nothing.
        for layer, (keys, values) in zip(_layers(self._cache), joined):
            layer.keys, layer.values = keys, values
        self._mask = torch.cat([pad(self._mask, (old, 0)), pad(mask, (new, 0))])


def _layers(cache: DynamicCache) -> list:
    """Return the layers of a cache that have keys. Layers that share the keys of another layer have none."""
    return [layer for layer in cache.layers if layer.keys is not None]


def rows_interact(config) -> bool:
    """Whether the result of a row depends on the longest row of its batch.

    This is so for rotary position embeddings that scale with the length of the input.

    Args:
        config: The model's config.

    Example:
        >>> s2ft.text.running_batch.rows_interact(model.config)
        False
    """
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]
    return any(kind.get("rope_type", kind.get("type")) in ("dynamic", "longrope") for kind in kinds)
