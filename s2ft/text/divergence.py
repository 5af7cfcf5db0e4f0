"""Measure how far a model has moved from its base: the rise of its loss on other text, and KL(base‖model).

Both are means over the labelled positions of token rows. No measurement keeps the logits of a whole batch: the output
layer gets the labelled positions only, a few at a time.
"""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft.attached.active import without_trainable
from s2ft.attached.loading import disable_adapters
from s2ft.attached.record import find_record, unwrapped
from s2ft.config import refuse
from s2ft.distributed import is_spread, reshard_all
from s2ft.foreign import read
from s2ft.model.checkpoint import is_of_transformers
from s2ft.model.running import evaluation_mode, replaced
from s2ft.selection.batches import IGNORED, is_encoder_decoder
from s2ft.text.data import DataOptions, load_rows
from s2ft.text.encoding import context_length, tokenize_rows
from s2ft.text.generation import answer_ids, contiguous_head
from s2ft.text.prompts import end_ids, prompt_for_rows

LOGITS = {"cpu": 2**23, "cuda": 2**26}  # number of logits that exist at once: 32 and 256 MiB in float32

Row = Mapping[str, Sequence[int]]  # a token row, with input_ids and labels


def mean_loss(model: Any, rows: Iterable[Row], batch_size: int = 8) -> float:
    """Return the mean cross entropy over the labelled tokens of token rows.

    Rows are padded on the right, so that padding changes nothing in any causal model. The result does not depend on
    `batch_size`, except by rounding. It is computed in evaluation mode and without gradients. The logits have the
    model's dtype; what is computed from them is float32, and the sum over tokens is float64.

    Args:
        model: A causal language model: plain, attached by s2ft, or of PEFT.
        rows: Token rows: dicts, or a Dataset with the columns input_ids and labels. A label is -100 where a token does
            not count. The first token of a row never counts, since nothing predicts it.
        batch_size: Rows of a forward pass.

    Returns:
        The loss in nats a token.

    Raises:
        ValueError: No token has a label, a row is not a token row or does not fit into the context, or the model is not
            a causal language model.

    Example:
        >>> from s2ft.text.divergence import mean_loss
        >>> rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in input_ids]
        >>> loss = mean_loss(model, rows)
        >>> abs(loss - model(input_ids, labels=input_ids).loss.item()) < 1e-5
        True
    """
    batches, total = _batches(model, rows, batch_size), 0.0
    with _reading(model) as reader:
        for batch in batches:
            hidden = reader.hidden(batch)
            for part in reader.parts(len(hidden)):
                logits = reader.logits(hidden[part])
                losses = F.cross_entropy(logits, batch.labels[part].to(logits.device), reduction="none")
                total += float(losses.double().sum())
    return total / sum(len(batch.labels) for batch in batches)


class BaseDistributions:
    """The next-token distributions of a base model at the labelled positions of token rows.

    What is kept is the input of the output layer at these positions, in the model's dtype and on the CPU, and a copy of
    the output layer if training or an adapter changes it. The distributions are computed from them again for each
    measurement. This takes `vocabulary / width` times less memory than the distributions (85 times for a model with 576
    dimensions and 49,152 tokens) and no second forward pass, and the base's logits are the same bits as before.

    Make it by :meth:`of`.

    Args:
        batches: The rows, collated.
        hidden: Input of the output layer at the labelled positions of each batch, shape [positions, width].
        head: Forward of the base's output layer, or None if the model's own stays as it is.

    Attributes:
        positions: Number of positions.

    Example:
        >>> from s2ft.text.divergence import BaseDistributions
        >>> rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in input_ids]
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> base = BaseDistributions.of(model, rows)
        >>> base.positions, base.kl(model)
        (14, 0.0)
    """

    def __init__(self, batches: list["_Batch"], hidden: list[Tensor], head: Callable | None) -> None:
        self._batches, self._hidden, self._head = batches, hidden, head
        self.positions = sum(map(len, hidden))

    @classmethod
    def of(cls, model: Any, rows: Iterable[Row], batch_size: int = 8) -> "BaseDistributions":
        """Measure the base of a model.

        Adapters of s2ft and of PEFT are switched off for this and switched on again: a trainable adapter of s2ft alone,
        or else all adapters. A model without adapters is its own base: call this before it is trained.

        Args:
            model: A causal language model, as in :func:`mean_loss`.
            rows: Token rows, as in :func:`mean_loss`.
            batch_size: Rows of a forward pass, here and in :meth:`kl`.

        Returns:
            The distributions.

        Raises:
            ValueError: As :func:`mean_loss`; or the output layer is trained and its weight is spread over ranks.
        """
        batches, switch = _batches(model, rows, batch_size), base_switch(model) or contextlib.nullcontext
        with switch():
            reshard_all(model)  # FSDP leaves the weights of the outermost module whole after a forward pass
            head = _copy_of_head(_causal_model(model).get_output_embeddings())
            with _reading(model) as reader:
                hidden = [reader.hidden(batch).cpu() for batch in batches]
        now = _causal_model(model).get_output_embeddings()
        stays = head is not None and _is_frozen(now) and type(now).__module__.startswith("torch.nn")
        if stays and torch.equal(now.weight, head.keywords["weight"]):  # no adapter changes it
            head = None
        return cls(batches, hidden, head)

    def kl(self, model: Any) -> float:
        """Return the mean of KL(base‖model) over the positions.

        The logits have the model's dtype. Each divergence is computed in float32, and their sum in float64. The
        rounding of float32 is about 1e-6 nats.

        Args:
            model: The model, with the adapters that are to be measured.

        Returns:
            The divergence in nats a position. It is 0.0 for the base itself.

        Raises:
            ValueError: The model has another vocabulary or width than the base.
        """
        total = 0.0
        with _reading(model) as reader:
            for batch, hidden in zip(self._batches, self._hidden):
                ours = reader.hidden(batch)
                for part in reader.parts(len(hidden)):
                    tuned = reader.logits(ours[part]).log_softmax(-1)
                    base = reader.logits(hidden[part], self._head).log_softmax(-1).to(tuned.device)
                    total += float(divergences(base, tuned).double().sum())
        return total / self.positions


def divergences(base: Tensor, tuned: Tensor) -> Tensor:
    """Return KL(base‖tuned) of each position.

    Args:
        base: Log-probabilities, shape [n, vocabulary].
        tuned: Log-probabilities, shape [n, vocabulary].

    Returns:
        Divergences in nats, shape [n], not negative. A token that the base never writes adds nothing.

    Example:
        >>> from s2ft.text.divergence import divergences
        >>> base, tuned = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
        >>> divergences(base, tuned)
        tensor([0.6931])
    """
    probabilities = base.exp()
    return (probabilities * (base - tuned).masked_fill(probabilities == 0, 0.0)).sum(-1).clamp(min=0)  # 0 · log 0 is 0


def base_switch(model: Any) -> Callable[[], AbstractContextManager] | None:
    """Return a function whose context makes a model its base.

    Args:
        model: Any model.

    Returns:
        The function: s2ft's, which leaves the trainable adapter out, or without one switches all adapters off; or
        PEFT's. None for a model without adapters.

    Example:
        >>> from s2ft.text.divergence import base_switch
        >>> base_switch(model) is None
        True
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> with base_switch(model)():
        ...     logits = model(input_ids).logits
    """
    model = unwrapped(model)
    if _is_peft_model(model) or _has_peft_of_transformers(model):
        return lambda: _without_peft(model)
    record = find_record(model)
    if record is None:
        return None
    return lambda: without_trainable(model) if record.trains else disable_adapters(model)


def _has_peft_of_transformers(model) -> bool:
    if not is_of_transformers(model):
        return False
    return read(model, "_hf_peft_config_loaded", "transformers", "adapters that it has added to a model")


def _is_peft_model(model) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


@contextlib.contextmanager
def _without_peft(model) -> Iterator[None]:
    """Switch PEFT's adapters off. PEFT trains all parameters of an adapter on again, so the same are trained after."""
    with contextlib.ExitStack() as stack:
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
        if _is_peft_model(model):
            stack.enter_context(model.disable_adapter())
        else:
            model.disable_adapters()
            stack.callback(model.enable_adapters)
        yield


# ---- rows ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Rows of one forward pass, padded on the right."""

    input_ids: Tensor  # [rows, length] int64
    attention_mask: Tensor  # [rows, length] int64
    index: Tensor  # [n] int64: the flat positions that predict a label
    labels: Tensor  # [n] int64: the token that each of them predicts


def _batches(model, rows: Iterable[Row], batch_size: int) -> list[_Batch]:
    """Make batches of rows of similar length. Raises ValueError for rows that can't be measured."""
    longest = context_length(_causal_model(model))
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    checked = [_checked(row, number, longest) for number, row in enumerate(rows)]
    kept = [(ids, labels) for ids, labels in checked if bool((labels[1:] != IGNORED).any())]
    if not kept:
        raise ValueError(
            f"none of the {len(checked)} rows has a token with a label after its first token, so there is no position "
            "to measure: give longer texts"
        )
    kept.sort(key=lambda row: -len(row[0]))  # a batch that does not fit into memory fails at the start
    return [_padded(kept[start : start + batch_size]) for start in range(0, len(kept), batch_size)]


def _checked(row: Row, number: int, longest: int) -> tuple[Tensor, Tensor]:
    """Return the token ids and the labels of a row."""
    if not isinstance(row, Mapping) or not {"input_ids", "labels"} <= row.keys():
        found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"row {number} must be a token row with input_ids and labels, got {found}")
    ids, labels = (torch.as_tensor(row[name], dtype=torch.int64) for name in ("input_ids", "labels"))
    refuse(
        (
            ids.dim() != 1 or ids.shape != labels.shape,
            f"row {number} must have as many labels as input_ids, in one list each, got shapes {tuple(ids.shape)} and "
            f"{tuple(labels.shape)}",
        ),
        (
            ids.numel() > longest,
            f"row {number} has {ids.numel()} tokens, but the model's context has {longest}: cut the row",
        ),
    )
    return ids, labels


def _padded(rows: list[tuple[Tensor, Tensor]]) -> _Batch:
    ids, labels = (nn.utils.rnn.pad_sequence(part, True, value) for part, value in zip(zip(*rows), (0, IGNORED)))
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row, _ in rows], True)
    predicted = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    index = (predicted != IGNORED).nonzero().squeeze(1)
    return _Batch(ids, mask, index, predicted[index])


# ---- logits of some positions --------------------------------------------------------------------------


def _causal_model(model) -> nn.Module:
    """Return the causal language model of transformers inside wrappers of torch.compile and PEFT."""
    inner = unwrapped(model)
    inner = unwrapped(inner.get_base_model()) if hasattr(inner, "get_base_model") else inner
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None or is_encoder_decoder(inner):
        raise ValueError(
            f"loss and divergence need a causal language model of transformers, got {type(inner).__name__}"
        )
    return inner


class _Reader:
    """Computes logits of chosen positions of a batch, a few at a time, with one run of the layers below the head.

    A hook gives the output layer the chosen positions in place of all. What the model does to its logits afterwards,
    such as a cap, is done to them too. Each part of a batch calls the model again, with the output of its body from the
    first call.
    """

    def __init__(self, model) -> None:
        self.model, inner = unwrapped(model), _causal_model(model)
        self.head: nn.Module = inner.get_output_embeddings()
        self.body: nn.Module | None = inner.base_model if inner.base_model is not inner else None
        self.device = inner.get_input_embeddings().weight.device
        self.device = inner.device if self.device.type == "meta" else self.device
        self._body_forward = inner.base_model.forward

    def hidden(self, batch: _Batch) -> Tensor:
        """Run the body on a batch, and return the output layer's input at the labelled positions, [n, width]."""
        self._inputs = {
            "input_ids": batch.input_ids.to(self.device),
            "attention_mask": batch.attention_mask.to(self.device),
        }
        self._body_output = self._given = None  # `_given` is what the head gets in place of its input
        self._run()
        return self._seen.flatten(0, 1)[batch.index.to(self._seen.device)]

    def parts(self, count: int) -> Iterator[slice]:
        """Yield slices of `count` positions whose logits fit into LOGITS."""
        rows = max(1, LOGITS.get(self.device.type, LOGITS["cuda"]) // self.model.config.get_text_config().vocab_size)
        return (slice(start, min(start + rows, count)) for start in range(0, count, rows))

    def logits(self, hidden: Tensor, head: Callable | None = None) -> Tensor:
        """Return the logits of an input of the output layer, shape [n, vocabulary], float32.

        Args:
            hidden: The input, shape [n, width].
            head: Forward of the output layer to use, or None for the model's own.
        """
        self._given = hidden
        with replaced(self.head, forward=head) if head else contextlib.nullcontext():
            logits = self._run()
        if logits.shape[:-1] != (1, len(hidden)):
            raise ValueError(
                f"{type(self.model).__name__} returned logits of shape {tuple(logits.shape)} for {len(hidden)} "
                "positions of its output layer: its loss and its divergence can't be measured"
            )
        return logits[0].float()

    def _run(self) -> Tensor:
        return self.model(**self._inputs, use_cache=False).logits

    def before_head(self, module: nn.Module, inputs: tuple) -> tuple:
        """Hook of the output layer: replace its input [rows, length, width] by [1, n, width]."""
        # virtual tokens of a prompt that PEFT has learned stand before
        self._seen = inputs[0][:, -self._inputs["input_ids"].shape[1] :]
        return ((self._seen[0, :1] if self._given is None else self._given.to(self._seen.device))[None], *inputs[1:])

    def once(self, *args: Any, **options: Any) -> Any:
        """Forward of the body, which runs once for each batch."""
        if self._body_output is None:
            self._body_output = self._body_forward(*args, **options)
        return self._body_output


@contextlib.contextmanager
def _reading(model) -> Iterator[_Reader]:
    """Yield a reader of a model in evaluation mode without gradients. The model is restored afterwards."""
    reader = _Reader(model)
    once = contextlib.nullcontext() if reader.body is None else replaced(reader.body, forward=reader.once)
    hook = reader.head.register_forward_pre_hook(reader.before_head)  # removed at the end of the context
    with hook, once, evaluation_mode(reader.model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield reader


def _copy_of_head(head: nn.Module) -> partial | None:
    """Return the forward of the output layer with copies of its weights, or None for one that can't change."""
    weights = list(head.parameters())
    if _is_frozen(head) and any(is_spread(weight) or not weight.is_floating_point() for weight in weights):
        return None
    if any(map(is_spread, weights)):
        raise ValueError(
            "the output layer is trained and its weight is spread over ranks, so no copy of the base's is kept: "
            "measure the divergence on one rank, or don't train the output layer"
        )
    bias = getattr(head, "bias", None)
    return partial(F.linear, weight=head.weight.detach().clone(), bias=None if bias is None else bias.detach().clone())


def _is_frozen(head: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in head.parameters())


# ---- one measurement, and its rows ----------------------------------------------------------------------


ROWS = 64  # rows of a measurement, if the user names no number


@dataclass(frozen=True)
class Drift:
    """One measurement.

    Attributes:
        forgetting: Rise of the loss on other text over that of the base, in nats a token; None if it is not measured.
        other_loss: The loss on other text, in nats a token.
        base_kl: KL(base‖model) on the task's prompts, in nats a position; None if it is not measured.
    """

    forgetting: float | None = None
    other_loss: float | None = None
    base_kl: float | None = None

    def to_dict(self) -> dict[str, float]:
        """What was measured, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        words = []
        if self.forgetting is not None:
            words.append(f"forgetting {self.forgetting:+.4f} (loss {self.other_loss:.4f} on other text)")
        if self.base_kl is not None:
            words.append(f"KL from the base {self.base_kl:.4f}")
        return ", ".join(words)


class DriftMeter:
    """Measures a model against its base.

    The base is measured when the object is made. Adapters are switched off for that; a model without adapters is its
    own base, so make the object before it is trained.

    Args:
        model: A causal language model, as in :func:`s2ft.text.divergence.mean_loss`.
        other: Token rows of other text, for the forgetting, or None.
        prompts: Token rows whose labels are the positions of the divergence, see :func:`prompt_rows`, or None.
        batch_size: Rows of a forward pass.

    Attributes:
        base_loss: The loss of the base on the other text, or None.
        distributions: The base's distributions on the prompts, or None.

    Raises:
        ValueError: Rows can't be measured.

    Example:
        >>> from s2ft.text.divergence import DriftMeter
        >>> rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in input_ids]
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> meter = DriftMeter(model, other=rows, prompts=rows)
        >>> meter.measure(model)
        Drift(forgetting=0.0, other_loss=4..., base_kl=0.0)
    """

    def __init__(self, model: Any, *, other: Any = None, prompts: Any = None, batch_size: int = 8) -> None:
        self._other, self._batch_size = other, batch_size
        with (base_switch(model) or contextlib.nullcontext)():
            self.base_loss = None if other is None else mean_loss(model, other, batch_size)
        self.distributions = None if prompts is None else BaseDistributions.of(model, prompts, batch_size)

    def measure(self, model: Any) -> Drift:
        """Measure the model as it is now, with its active adapters.

        Args:
            model: The model.

        Returns:
            What was measured.
        """
        loss = None if self._other is None else mean_loss(model, self._other, self._batch_size)
        rise = None if loss is None else loss - self.base_loss
        return Drift(rise, loss, None if self.distributions is None else self.distributions.kl(model))


# ---- rows ----------------------------------------------------------------------------------------------


def read_texts(options: DataOptions, most: int = ROWS, seed: int = 0) -> Any:
    """Read data and draw rows.

    Args:
        options: Which data is read, and how.
        most: Number of rows to draw.
        seed: Seed of the draw.

    Returns:
        A Dataset, as :func:`s2ft.text.data.load_rows` returns it.

    Raises:
        ValueError: The data can't be read.
    """
    rows = load_rows(options)
    return rows.select(some(range(len(rows)), most, seed))


def longest_other_row(model) -> int:
    """Return the tokens of the longest row of other text: the context, but at most 1024, as in training."""
    return min(context_length(model), 1024)


def text_rows(rows: Any, tokenizer, longest: int, most: int = ROWS, seed: int = 0) -> list[dict[str, Any]]:
    """Make token rows whose labels are all of their tokens.

    Plain texts are taken as they are, and chats and answers in the tokenizer's chat template. A longer plain text is
    cut into several rows, another one at its end.

    Args:
        rows: The rows, as :func:`read_texts` returns them.
        tokenizer: The model's tokenizer.
        longest: Longest token row.
        most: Number of token rows to draw.
        seed: Seed of the draw.

    Returns:
        Token rows.

    Raises:
        ValueError: No row has text.

    Example:
        >>> from pathlib import Path
        >>> from transformers import ByT5Tokenizer
        >>> from s2ft.text.data import DataOptions
        >>> from s2ft.text.divergence import read_texts, text_rows
        >>> _ = Path("texts.jsonl").write_text('{"text": "ab"}')
        >>> text_rows(read_texts(DataOptions(data=["texts.jsonl"])), ByT5Tokenizer(), longest=100)
        [{'input_ids': [100, 101, 1], 'labels': [100, 101, 1]}]
    """
    prompt = prompt_for_rows(tokenizer, rows, DataOptions())
    how = {"max_length": longest, "too_long": "cut", "loss_on": "all", "completion_only": False, "skip_bad_rows": True}
    return some(tokenize_rows(rows, tokenizer, prompt, **how).dataset, most, seed)


def some(rows: Any, most: int = ROWS, seed: int = 0) -> list:
    """Draw rows, in their order.

    Args:
        rows: The rows.
        most: Number of rows to draw. If there are fewer, all are taken.
        seed: Seed of the draw.
    """
    return [rows[number] for number in sorted(random.Random(seed).sample(range(len(rows)), min(len(rows), most)))]


def prompt_rows(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Make rows that measure the divergence on the prompts of token rows.

    Args:
        rows: Token rows. The prompt of a row ends before its first label. A row without a prompt, such as plain text,
            is measured as a whole.

    Returns:
        Token rows whose labels are the tokens of the prompt and the first one of the answer.

    Example:
        >>> from s2ft.text.divergence import prompt_rows
        >>> prompt_rows([{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}])
        [{'input_ids': [5, 6, 7], 'labels': [-100, 6, 7]}]
    """
    found = []
    for row in rows:
        first = _first_label(row)
        ids = list(row["input_ids"])[: first + 1 if first > 1 else None]
        found.append({"input_ids": ids, "labels": [IGNORED, *ids[1:]]})
    return found


def prompts_of(rows: Iterable[Row]) -> list[list[int]]:
    """Return the prompts of token rows, for :func:`answer_rows`. Rows without a prompt are left out.

    Args:
        rows: Token rows.

    Raises:
        ValueError: No row has a prompt.
    """
    found = [list(row["input_ids"])[: _first_label(row)] for row in rows if _first_label(row) > 1]
    if not found:
        raise ValueError("no row has a prompt that the base could answer: measure the divergence on the prompts' rows")
    return found


def _first_label(row) -> int:
    """The first token with a label. Nothing stands before it if it is the second token, since the first has none."""
    labels = list(row["labels"])
    return next((place for place, label in enumerate(labels) if place and label != IGNORED), len(labels))


def row_of_prompt(prompt: Sequence[int]) -> dict[str, Any]:
    """Make a token row of a prompt that has no answer, for :func:`prompt_rows` and :func:`prompts_of`.

    Args:
        prompt: Token ids.

    Returns:
        The row. Its last token stands for the answer. It only marks the position that predicts it and is never read.

    Example:
        >>> from s2ft.text.divergence import row_of_prompt
        >>> row_of_prompt([5, 6])
        {'input_ids': [5, 6, 6], 'labels': [-100, -100, 6]}
    """
    return {"input_ids": [*prompt, prompt[-1]], "labels": [IGNORED] * len(prompt) + [prompt[-1]]}


def answer_rows(
    model, tokenizer, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64, batch_size: int = 8
) -> list[dict[str, Any]]:
    """Let the base answer prompts greedily, and make rows whose labels are these answers.

    On them, KL(base‖model) is the divergence of the two policies where the base goes, as RL's Razor measures it.

    Args:
        model: A causal language model. Its adapters are switched off.
        tokenizer: The model's tokenizer.
        prompts: Token ids of each prompt.
        max_new_tokens: Longest answer in tokens.
        batch_size: Prompts that are answered at once.

    Returns:
        Token rows, in the order of the prompts.
    """
    switch, ends = base_switch(model) or contextlib.nullcontext, end_ids(tokenizer, model.generation_config)
    room = context_length(_causal_model(model)) - max_new_tokens
    prompts = [prompt for prompt in prompts if len(prompt) <= room]
    with switch(), evaluation_mode(model), torch.no_grad(), contiguous_head(model):
        answers = answer_ids(model, tokenizer, prompts, batch_size, max_new_tokens)
    rows = []
    for prompt, answer in zip(prompts, answers):  # what follows the end token is padding
        length = next((place + 1 for place, token in enumerate(answer) if token in ends), len(answer))
        rows.append({"input_ids": [*prompt, *answer[:length]], "labels": [IGNORED] * len(prompt) + answer[:length]})
    return rows
