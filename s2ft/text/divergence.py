"""Measure how far a model has moved from its base: the rise of its loss on other text, and KL(base‖model).

Both are means over the labelled positions of token rows. No measurement keeps the logits of a whole batch: the output
layer gets the labelled positions only, a few at a time.
"""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft.adapter.switch import disable_adapters
from s2ft.attached.hosts.compiled import unwrapped
from s2ft.attached.record import find_attachment
from s2ft.attached.reference import without_trainable
from s2ft.distributed import is_sharded, reshard_all
from s2ft.model.modes import evaluation_mode
from s2ft.selection.batches import IGNORED, is_encoder_decoder

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
    batches = _batches(rows, batch_size, _context_length(model))
    total = 0.0
    with _reading(model) as reader:
        for batch in batches:
            reader.start(batch)
            total += reader.loss(batch)
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
        head: A copy of the output layer, or None if the model's own stays as it is.

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

    def __init__(self, batches: list["_Batch"], hidden: list[Tensor], head: nn.Module | None) -> None:
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
        batches = _batches(rows, batch_size, _context_length(model))
        switch, hidden = base_switch(model), []
        with switch() if switch else contextlib.nullcontext():
            reshard_all(model)  # FSDP leaves the weights of the outermost module whole after a forward pass
            head = _copy_of_head(_causal_model(model).get_output_embeddings())
            with _reading(model) as reader:
                for batch in batches:
                    reader.start(batch)
                    hidden.append(reader.hidden(batch.index).cpu())
        head = None if head is not None and _is_unchanged(head, model) else head
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
                reader.start(batch)
                for part in reader.parts(len(hidden)):
                    tuned = reader.logits(batch.index[part]).log_softmax(-1)
                    base = reader.logits_of(hidden[part], self._head).log_softmax(-1).to(tuned.device)
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
    difference = (base - tuned).masked_fill(probabilities == 0, 0.0)  # 0 · log 0 is 0
    return (probabilities * difference).sum(-1).clamp(min=0)


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
    if hasattr(model, "peft_config") and hasattr(model, "disable_adapter"):  # a PeftModel
        return lambda: _trained_as_before(model, model.disable_adapter())
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers' own use of PEFT
        return lambda: _trained_as_before(model, _transformers_adapters_off(model))
    record = find_attachment(model)
    if record is None:
        return None
    return lambda: without_trainable(model) if record.trains else disable_adapters(model)


@contextlib.contextmanager
def _trained_as_before(model, adapters_off: AbstractContextManager) -> Iterator[None]:
    """Train the same parameters afterwards. PEFT trains all parameters of an adapter that it switches on again."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with adapters_off:
            yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def _transformers_adapters_off(model) -> Iterator[None]:
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


# ---- rows ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Rows of one forward pass, padded on the right."""

    input_ids: Tensor  # [rows, length] int64
    attention_mask: Tensor  # [rows, length] int64
    index: Tensor  # [n] int64: the flat positions that predict a label
    labels: Tensor  # [n] int64: the token that each of them predicts


def _batches(rows: Iterable[Row], batch_size: int, longest: int | None) -> list[_Batch]:
    """Make batches of rows of similar length. Raises ValueError for rows that can't be measured."""
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


def _checked(row: Row, number: int, longest: int | None) -> tuple[Tensor, Tensor]:
    """Return the token ids and the labels of a row."""
    if not isinstance(row, Mapping) or not {"input_ids", "labels"} <= row.keys():
        found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"row {number} must be a token row with input_ids and labels, got {found}")
    ids, labels = (torch.as_tensor(row[name], dtype=torch.int64) for name in ("input_ids", "labels"))
    if ids.dim() != 1 or ids.shape != labels.shape:
        raise ValueError(
            f"row {number} must have as many labels as input_ids, in one list each, got shapes {tuple(ids.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if longest is not None and len(ids) > longest:
        raise ValueError(f"row {number} has {len(ids)} tokens, but the model's context has {longest}: cut the row")
    return ids, labels


def _padded(rows: list[tuple[Tensor, Tensor]]) -> _Batch:
    ids, labels = (nn.utils.rnn.pad_sequence(part, True, value) for part, value in zip(zip(*rows), (0, IGNORED)))
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row, _ in rows], True)
    predicted = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    index = (predicted != IGNORED).nonzero().squeeze(1)
    return _Batch(ids, mask, index, predicted[index])


def _context_length(model) -> int | None:
    return getattr(getattr(_causal_model(model), "config", None), "max_position_embeddings", None)


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
    such as a cap, is done to them too. Each further part of a batch calls the model again, with the output of its body
    from the first call.
    """

    def __init__(self, model) -> None:
        self.model, inner = unwrapped(model), _causal_model(model)
        self.head: nn.Module = inner.get_output_embeddings()
        self.body: nn.Module | None = inner.base_model if inner.base_model is not inner else None
        self.device = inner.get_input_embeddings().weight.device
        self.device = inner.device if self.device.type == "meta" else self.device
        self._inputs: dict[str, Any] = {}
        self._body_output: Any = None
        self._index: Tensor | None = None  # flat positions for the head
        self._given: Tensor | None = None  # what the head gets in their place
        self._seen: Tensor | None = None

    def start(self, batch: _Batch) -> None:
        """Begin with another batch."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        self._inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        self._body_output = None

    def parts(self, count: int) -> Iterator[slice]:
        """Yield slices of `count` positions whose logits fit into LOGITS."""
        rows = max(1, LOGITS.get(self.device.type, LOGITS["cuda"]) // self.model.config.get_text_config().vocab_size)
        return (slice(start, min(start + rows, count)) for start in range(0, count, rows))

    def hidden(self, index: Tensor) -> Tensor:
        """Return the output layer's input at flat positions, shape [n, width]. The layer itself gets one position."""
        self.logits(index[:1])
        return self._seen.flatten(0, 1)[index.to(self._seen.device)]

    def loss(self, batch: _Batch) -> float:
        """Return the sum of the cross entropy over the labels of the batch."""
        total = 0.0
        for part in self.parts(len(batch.labels)):
            logits = self.logits(batch.index[part])
            losses = F.cross_entropy(logits, batch.labels[part].to(logits.device), reduction="none")
            total += float(losses.double().sum())
        return total

    def logits_of(self, hidden: Tensor, head: nn.Module | None) -> Tensor:
        """Return the logits of another input of the output layer, shape [n, vocabulary], float32.

        Args:
            hidden: The input, shape [n, width].
            head: The output layer to use, or None for the model's own.
        """
        self._given = hidden
        before = self.head.__dict__.get("forward")
        try:
            if head is not None:
                self.head.forward = head.forward
            return self.logits(torch.arange(len(hidden)))
        finally:
            self._given = None
            self.head.__dict__.pop("forward", None)
            if before is not None:
                self.head.forward = before

    def logits(self, index: Tensor) -> Tensor:
        """Return the logits at flat positions, shape [n, vocabulary], float32."""
        self._index = index
        logits = self.model(**self._inputs, use_cache=False).logits
        if logits.shape[:-1] != (1, len(index)):
            raise ValueError(
                f"{type(self.model).__name__} returned logits of shape {tuple(logits.shape)} for {len(index)} "
                "positions of its output layer: its loss and its divergence can't be measured"
            )
        return logits[0].float()

    def before_head(self, module: nn.Module, inputs: tuple) -> tuple:
        """Hook of the output layer: replace its input [rows, length, width] by [1, n, width]."""
        length = self._inputs["input_ids"].shape[1]
        self._seen = inputs[0][:, -length:]  # virtual tokens of a prompt that PEFT has learned stand before
        if self._given is not None:
            chosen = self._given.to(self._seen.device)
        else:
            chosen = self._seen.flatten(0, 1)[self._index.to(self._seen.device)]
        return (chosen[None], *inputs[1:])

    def once(self, forward: Callable) -> Callable:
        """Return a forward of the body that runs once for each batch."""

        def run(*args: Any, **options: Any) -> Any:
            if self._body_output is None:
                self._body_output = forward(*args, **options)
            return self._body_output

        return run


@contextlib.contextmanager
def _reading(model) -> Iterator[_Reader]:
    """Yield a reader of a model in evaluation mode without gradients. The model is restored afterwards."""
    reader = _Reader(model)
    hook = reader.head.register_forward_pre_hook(reader.before_head)
    body, before = reader.body, None if reader.body is None else reader.body.__dict__.get("forward")
    try:
        if body is not None:
            body.forward = reader.once(body.forward)
        with evaluation_mode(reader.model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield reader
    finally:
        hook.remove()
        if body is not None:
            body.__dict__.pop("forward", None)
        if before is not None:
            body.forward = before


# ---- the output layer of the base ----------------------------------------------------------------------

HOOKS = [name for name in nn.Module().__dict__ if name.endswith("_hooks")]


def _copy_of_head(head: nn.Module) -> nn.Module | None:
    """Return a copy of the output layer as it is now, or None for one that can't change."""
    weights, frozen = list(head.parameters()), _is_frozen(head)
    if frozen and (any(map(is_sharded, weights)) or not all(weight.is_floating_point() for weight in weights)):
        return None
    if any(map(is_sharded, weights)):
        raise ValueError(
            "the output layer is trained and its weight is spread over ranks, so no copy of the base's is kept: "
            "measure the divergence on one rank, or don't train the output layer"
        )
    with _without_hooks(head):
        return copy.deepcopy(head).requires_grad_(False)


@contextlib.contextmanager
def _without_hooks(head: nn.Module) -> Iterator[None]:
    """Take away hooks and replaced forwards inside the context. A copy would copy what they refer to as well."""
    before = [(module, dict(module.__dict__)) for module in head.modules()]
    try:
        for module, _ in before:
            module.__dict__.update({name: OrderedDict() for name in HOOKS})
            module.__dict__.pop("forward", None)
        yield
    finally:
        for module, attributes in before:
            module.__dict__.update(attributes)


def _is_unchanged(base: nn.Module, model) -> bool:
    """Whether the model's output layer, with adapters, is that of the base and will stay so."""
    head = _causal_model(model).get_output_embeddings()
    ours, theirs = base.state_dict(), head.state_dict()
    plain = _is_frozen(head) and type(head).__module__.startswith("torch.nn")
    return plain and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _is_frozen(head: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in head.parameters())
