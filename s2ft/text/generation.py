"""Generation: greedy or by beam search in batches, and token by token in a batch that sequences join and leave."""

import contextlib
import inspect
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import takewhile
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    GenerationConfig,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    cache_utils,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from s2ft.model.running import evaluation_mode
from s2ft.text.encoding import padded_batch
from s2ft.text.prompts import end_ids, pad_id
from s2ft.text.templates import in_common

# The generation_config of some checkpoints has other values for chats. They would hold for every value left open here.
PLAIN = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "min_length": 0,
    "num_return_sequences": 1,
}


def generate(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
    title: str = "generating",
    num_beams: int = 1,
) -> list[str]:
    """Answer prompts greedily or by beam search. Nothing is drawn, so that a call can be repeated.

    Penalties in the checkpoint's generation_config are not applied; its end tokens are.

    The longest prompts are answered first. The prompts of a batch then have similar lengths, and a batch that does
    not fit into memory fails at the start.

    Args:
        model: A causal language model, with or without an attached adapter.
        tokenizer: The model's tokenizer.
        prompts: Token ids of each prompt.
        batch_size: Number of prompts that are generated at once. One, where padding changes what the model computes.
        max_new_tokens: Longest answer in tokens. A longer one is cut.
        title: The label of the progress bar, which is shown only in a terminal.
        num_beams: Number of beams. 1 is greedy. More beams keep so many beginnings of each answer, and the answer
            with the highest mean log-probability of a token is returned, as in transformers' beam search.

    Returns:
        The answers in the order of the prompts, without special tokens and outer white space.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from s2ft.text.generation import generate
        >>> texts = generate(model, ByT5Tokenizer(), [[5, 6, 7], [8]], batch_size=2, max_new_tokens=4)
        >>> len(texts)
        2
    """
    from tqdm.auto import tqdm

    with generation_mode(model), tqdm(total=len(prompts), desc=title, dynamic_ncols=True, disable=None) as bar:
        answers = answer_ids(model, tokenizer, prompts, batch_size, max_new_tokens, num_beams, bar.update)
    ends = end_ids(tokenizer, model.generation_config)  # of which a tokenizer need not call all special
    return [
        tokenizer.decode(list(takewhile(lambda token: token not in ends, answer)), skip_special_tokens=True).strip()
        for answer in answers
    ]


def answer_ids(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    on_batch: Callable[[int], Any] = int,
) -> list[list[int]]:
    """Return the token ids of answers, in the order of the prompts, with the end token and the padding after it.

    Args:
        model: As in :func:`generate`. Its modes are the caller's.
        tokenizer: As in :func:`generate`.
        prompts: As in :func:`generate`.
        batch_size: As in :func:`generate`.
        max_new_tokens: As in :func:`generate`.
        num_beams: As in :func:`generate`.
        on_batch: Called with the number of prompts of each batch, when they are answered.
    """
    config = GenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        **PLAIN,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=end_ids(tokenizer, model.generation_config),
    )
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    answers: dict[int, list[int]] = {}
    if batch_size > 1 and (scales_with_length(model.config) or not takes_left_padding(model)):
        batch_size = 1
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        batch = padded_batch([prompts[number] for number in numbers], pad_id(tokenizer))
        # model.generate computes the positions from the mask
        batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        output = model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :]
        answers.update(zip(numbers, output.tolist()))
        on_batch(len(numbers))
    return [answers[number] for number in range(len(prompts))]


@contextlib.contextmanager
def generation_mode(model) -> Iterator[None]:
    """Evaluation mode without gradients. Afterwards the modes of all modules are restored."""
    with evaluation_mode(model), torch.inference_mode(), contiguous_head(model):
        yield


@contextlib.contextmanager
def contiguous_head(model) -> Iterator[None]:
    """Make the input of the model's output layer contiguous inside the context.

    Models pass the positions whose logits are requested as a view with gaps. If the weight is frozen, torch computes
    such a view as a batched product and copies the weight once for each row of the batch: 5.4 GiB for 104 rows of a
    model with 135M parameters.

    Args:
        model: A language model of transformers.

    Example:
        >>> with s2ft.text.generation.contiguous_head(model):
        ...     model(input_ids, logits_to_keep=1).logits.shape
        torch.Size([2, 1, 96])
    """
    with model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: (inputs[0].contiguous(), *inputs[1:])
    ):
        yield


# ---- the running batch: sequences that are generated together, with their keys and values ------------
#
# All rows end at the same column. A shorter row has masked padding on its left. The positions of a row count from its
# first token, and its keys contain them already. Padding can therefore be added or removed without computing anything
# again, and sequences can join or leave between two steps.


class AnswerRow:
    """One sequence of a batch.

    Attributes:
        prompt: Token ids of the prompt.
        sampler: The :class:`~s2ft.text.generation.Sampler` that chooses the tokens.
        adapter: Name of the adapter in the bank. None is the base.
        tokens: The generated tokens.
        failed: Why the sequence cannot continue, or None.
    """

    def __init__(self, prompt: Sequence[int], sampler, adapter: str | None = None) -> None:
        self.prompt, self.sampler, self.adapter = list(prompt), sampler, adapter
        self.tokens: list[int] = []
        self.failed: str | None = None


R = TypeVar("R", bound=AnswerRow)


class RunningBatch(Generic[R]):
    """Rows that are generated together, one token a step.

    Args:
        model: A causal language model of transformers.
        mixing: A function such as ``AdapterBank.batch``. It gets the adapter names of the rows and returns a context
            in which each row runs with its adapter. None runs all rows with the model as it is.

    Example:
        >>> from s2ft.text.generation import AnswerRow, RunningBatch
        >>> from s2ft.text.generation import Sampler
        >>> batch, row = RunningBatch(model.eval()), AnswerRow([5, 6, 7], Sampler())
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
        self._accepted = inspect.signature(model.forward).parameters
        self._has_states = keeps_states(model.config)

    @torch.inference_mode()
    def admit(self, rows: Sequence[R]) -> None:
        """Run the prompts of new rows, choose the first token of each, and add the rows to the batch.

        An error leaves the batch unchanged.

        Args:
            rows: The new rows. Their prompts are run in one pass.
        """
        if len(rows) + len(self.rows) > 1 and self._has_states:
            raise ValueError("a model whose layers keep states runs one row at a time")
        padded = padded_batch([row.prompt for row in rows], 0)
        inputs = {name: tensor.to(self.model.device) for name, tensor in padded.items()}
        # Without the config, layers with a sliding window keep all keys, and the mask limits them.
        cache = DynamicCache(config=self.model.config if self._has_states else None)
        self._choose(rows, self._forward(rows, cache, **inputs))
        self._join(cache, inputs["attention_mask"])
        self.rows += rows

    @torch.inference_mode()
    def replace(self, row: R) -> None:
        """Run the prompt of a new row in place of the only row, and choose its first token.

        The keys and values of the beginning that both sequences share are used again. The new row must run with the
        weights and the adapter of the earlier one. After an error the batch must be cleared.

        Args:
            row: The new row. The batch has one row, or none.

        Example:
            >>> from s2ft.text.generation import AnswerRow, RunningBatch
            >>> from s2ft.text.generation import Sampler
            >>> batch, first = RunningBatch(model.eval()), AnswerRow([5, 6, 7], Sampler())
            >>> batch.replace(first)
            >>> batch.replace(AnswerRow([5, 6, 7, *first.tokens, 8], Sampler()))  # the model runs two tokens
        """
        earlier = [token for one in self.rows for token in (*one.prompt, *one.tokens[:-1])]  # the last has no keys
        same = 0 if rows_interact(self.model.config) else in_common(earlier, row.prompt[:-1])  # at least one is run
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
        # Older models and Mamba have names of their own.
        name = next((name for name in ("cache", "cache_params") if name in self._accepted), "past_key_values")
        options = {"position_ids": position_ids, "logits_to_keep": 1}  # some models take only one of them, or none
        with self.mixing([row.adapter for row in rows]), contiguous_head(self.model):
            output = self.model(
                input_ids=input_ids,
                attention_mask=None if self._has_states else attention_mask,  # Mamba would multiply a step by all of it
                use_cache=True,
                **{name: cache},
                **{name: value for name, value in options.items() if name in self._accepted},
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


def takes_left_padding(model) -> bool:
    """Whether padding on the left leaves a causal model's logits as they are, by a trial on twelve tokens.

    It does not where the model ignores its mask (RWKV), or makes blocks of tokens from the first one on (DeepSeek-V4).

    Args:
        model: The model. Its modes are restored.

    Example:
        >>> s2ft.text.generation.takes_left_padding(model)
        True
    """
    device, count = model.get_input_embeddings().weight.device, model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(1, count // 2, 12).long().tolist()  # placeholders of images have higher ones

    def logits(*rows: list[int]) -> Tensor:
        batch = {name: tensor.to(device) for name, tensor in padded_batch(rows, 0).items()}
        return model(**batch, use_cache=False).logits[0, -len(ids) :].float()

    with evaluation_mode(model), torch.no_grad():
        try:
            alone, beside = logits(ids), logits(ids, ids * 2)
        except Exception:  # of the model's code
            return False
    return float((beside - alone).abs().mean()) <= (1e-3 if model.dtype == torch.float32 else 1e-1) * float(alone.std())


def rows_interact(config) -> bool:
    """Whether a row must run alone, since its result depends on the longest row of its batch, or it has states.

    Args:
        config: The model's config.

    Example:
        >>> s2ft.text.generation.rows_interact(model.config)
        False
    """
    return scales_with_length(config) or keeps_states(config)


def scales_with_length(config) -> bool:
    """Whether rotary position embeddings depend on the length of the longest row of a batch."""
    config = config.get_text_config()
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]
    return any(kind.get("rope_type", kind.get("type")) in ("dynamic", "longrope") for kind in kinds)


def keeps_states(config) -> bool:
    """Whether layers keep more than keys and values, such as the state of linear attention and of Mamba."""
    with contextlib.suppress(AttributeError, KeyError):  # transformers can't make a cache of each config
        plain = (DynamicLayer, DynamicSlidingWindowLayer, getattr(cache_utils, "DummyLayer", None))  # shares keys
        return any(type(layer) not in plain for layer in DynamicCache(config=config).layers)
    return False


# ---- tokens to text -------------------------------------------------------------------------------------


BROKEN = "\N{REPLACEMENT CHARACTER}"
WINDOW = 16  # approximate number of tokens that are decoded again for each new token
CONTEXT = 4  # tokens kept before a new one, since some tokenizers omit the space of a first token


class TextStream:
    """Decodes a growing sequence of tokens, up to the first stop string.

    A character of several tokens is returned when it is complete, and text that may become part of a stop string is
    held back.

    Args:
        tokenizer: The model's tokenizer.
        stop: Strings that end the text. They are not returned.
        before: Tokens of a text that this one continues, with its first space.

    Attributes:
        stopped: Whether a stop string was found.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._window, self._held = list(before), ""  # tokens, of which `push` leaves the last; text that is held back
        # characters of the window's text that were passed on
        self._sent = len(self._decode(self._window).rstrip(BROKEN))
        self._open = 0  # tokens since the text was whole characters
        self.stopped = False

    def push(self, token: int) -> str:
        """Return the text that can be shown after a token."""
        self._window.append(token)
        text = self._decode(self._window)
        # The next token may complete a character. Until then SentencePiece's bytes before it are not decoded either.
        self._open = self._open + 1 if text.endswith(BROKEN) else 0
        complete = max(len(text.rstrip(BROKEN)), len(text) - 3 if self._open > 3 else 0)
        new = text[self._sent : complete]
        self._sent = max(self._sent, complete)
        if complete == len(text) and len(self._window) > WINDOW:
            tail = self._decode(self._window[-CONTEXT:])
            if text.endswith(tail):  # else it begins within a character
                self._window, self._sent = self._window[-CONTEXT:], len(tail)
        return self._pass_on(new)

    def flush(self) -> str:
        """Return the rest of the text after the last token, with a replacement character for an incomplete one."""
        text = "" if self.stopped else self._pass_on(self._decode(self._window)[self._sent :])
        return text if self.stopped else text + self._held

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _pass_on(self, text: str) -> str:
        text = self._held + text
        found = [place for place in map(text.find, self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        starts = (stop[:length] for stop in self._stop for length in range(1, len(stop)))
        hold = max((len(start) for start in starts if text.endswith(start)), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


# ---- the next token -------------------------------------------------------------------------------------


GREEDY = 1e-5  # a lower temperature would overflow and choose the likeliest token anyway


class Sampler:
    """Draws the tokens of one sequence with its own generator, so that a seed gives the same tokens in any batch.

    The logits are changed by the repetition penalty, then by the temperature. Then `top_k`, `top_p` and `min_p` leave
    out tokens, in this order.

    Args:
        temperature: Divisor of the logits. 0 always chooses the likeliest token.
        top_p: Draw among the likeliest tokens whose probabilities sum up to this value, from 0 to 1.
        seed: Seed of the generator. None draws a new seed.
        top_k: Draw among so many likeliest tokens. 0 is all.
        min_p: Leave out tokens whose probability is below this share of the likeliest token's, from 0 to 1.
        repetition_penalty: Logits of tokens in the prompt or the answer are divided by this value if they are
            positive, and multiplied by it otherwise. 1 changes nothing.

    Attributes:
        greedy: Whether the likeliest token is chosen.
        plain: Whether the logits are used as they are.

    Example:
        >>> logits = model(input_ids).logits[0, -1]
        >>> from s2ft.text.generation import Sampler
        >>> Sampler().choose(logits) == int(logits.argmax())
        True
        >>> Sampler(1.0, seed=3).choose(logits) == Sampler(1.0, seed=3).choose(logits)
        True
        >>> best = int(logits.argmax())
        >>> Sampler(repetition_penalty=100.0).choose(logits, tokens=[best]) == best
        False
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> None:
        self.greedy, self.plain = temperature < GREEDY, repetition_penalty == 1
        self._changes: list = [] if self.plain else [RepetitionPenaltyLogitsProcessor(float(repetition_penalty))]
        if not self.greedy:
            self._generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
            self._changes += [
                TemperatureLogitsWarper(float(temperature)),
                *([TopKLogitsWarper(top_k)] if top_k > 0 else []),
                *([TopPLogitsWarper(float(top_p))] if top_p < 1 else []),
                *([MinPLogitsWarper(min_p)] if min_p > 0 else []),
            ]

    def choose(self, logits: Tensor, tokens: Sequence[int] = (), prompt: Sequence[int] = ()) -> int:
        """Choose a token.

        The token is found by inverting the distribution function with one random number. Logits that differ only by
        rounding give the same token, unless the number is next to a border between two tokens.

        Args:
            logits: Logits of the next token, shape [vocabulary].
            tokens: The tokens of the answer so far, for the repetition penalty.
            prompt: The tokens of the prompt, for it too.

        Returns:
            The token id.
        """
        scores = logits.detach().cpu().double()[None]
        seen = torch.tensor([[] if self.plain else [*prompt, *tokens]], dtype=torch.int64)  # which only a penalty reads
        for change in self._changes:
            scores = change(seen, scores)
        if self.greedy:
            return int(scores.argmax())
        up_to = scores[0].softmax(0).cumsum(0)
        drawn = torch.rand((), generator=self._generator, dtype=torch.float64) * up_to[-1]
        # at most the last token that was not left out
        return min(int(torch.searchsorted(up_to, drawn, right=True)), int(torch.searchsorted(up_to, up_to[-1])))
