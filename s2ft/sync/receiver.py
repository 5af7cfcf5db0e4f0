"""The receiving side of slice sync in one process of an engine: who sends, what was there, what is written.

A receiver is bound to one sender at a time, or has the base. All checks of a message are made on all ranks before the
first number is written, and either all ranks write or none does.
"""

import base64
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.config import refuse
from s2ft.sync.places import Loader, Place, check_base, parts_of, places
from s2ft.sync.wire import DTYPES, SliceSpec, from_message


@dataclass
class _Bound:
    """What is written over the base, and by whom."""

    sender: str
    dtype: torch.dtype
    specs: list[SliceSpec]
    places: list[Place]
    step: int | None = None

    def __post_init__(self) -> None:
        self.originals = self.expected = self.lines()  # of the base, and after the last write

    def lines(self) -> Tensor:
        """Some numbers of each place as they are now."""
        return torch.cat([place.line for place in self.places]) if self.places else torch.empty(0)

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        values = flat.split([spec.numel for spec in self.specs])
        for place in self.places:
            place.write(values[place.slice_number].view(self.specs[place.slice_number].values_shape))

    def restore(self) -> None:
        for place in self.places:
            place.restore()
        self.step, self.expected = None, self.originals


class Receiver:
    """Writes slices into the weights of one process of an engine, and restores them.

    Example:
        >>> from s2ft.sync.receiver import Receiver
        >>> from s2ft.sync.wire import SliceSpec, hashes_of, to_message
        >>> engine = torch.nn.Linear(4, 4, bias=False)
        >>> base = engine.weight.detach().clone()
        >>> receiver = Receiver(engine, lambda tensors: [engine.weight.data.copy_(tensor) for _, tensor in tensors])
        >>> index = torch.tensor([1, 3])
        >>> spec = SliceSpec("weight", (4, 4), 1, index, hashes_of(base[:, index], 1))
        >>> receiver.bind({"sender": "a", "dtype": "float32", "slices": to_message([spec])})
        >>> receiver.update({"sender": "a", "step": 1, "tensor": torch.ones(8)})
        >>> engine.weight[:, index].sum().item()
        8.0
        >>> receiver.update({"base": True, "sender": "a"})
        >>> torch.equal(engine.weight, base)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        load: Loader | None = None,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
        check: Callable[[Sequence[Place], Sequence[SliceSpec]], None] = lambda places, specs: None,
    ) -> None:
        """Make a receiver. Nothing is read yet.

        Args:
            model: The engine's model in this process.
            load: Its loader, which takes pairs of a name in the checkpoint and a tensor. Default: `model.load_weights`.
            gather: Returns the values of all processes that hold the weights together. Every one of them calls it.
            check: Raises ValueError for places that the engine does not compute with, for instance because it has
                packed the weights.
        """
        self.model, self.gather, self.check = model, gather, check
        self.load = model.load_weights if load is None else load
        self._bound: _Bound | None = None

    @property
    def sender(self) -> str | None:
        """The sender that this engine is bound to, or None."""
        return None if self._bound is None else self._bound.sender

    @property
    def serving(self) -> str:
        """What the weights are, in words."""
        if self._bound is None:
            return "the base"
        step = "no step yet" if self._bound.step is None else f"step {self._bound.step}"
        return f"slices of sender {self._bound.sender!r}, {step}"

    def bind(self, message: Mapping[str, Any]) -> None:
        """Bind to a sender: find the places of its slices, and compare the base. All ranks must call this.

        An engine that is bound has its base again first, and keeps it if this fails.

        Args:
            message: `sender`, its name; `dtype` of the numbers; `slices`, see :func:`s2ft.sync.wire.to_message`;
                `take_over`, whether another sender is removed; `idle`, False if requests are running, which matters if
                the weights have to be changed.

        Raises:
            ValueError: The message is not valid, the base is another one, or a slice has no place.
            RuntimeError: The engine is bound to another sender, or is not idle. It stays bound.
        """
        sender, dtype, specs = self._together(lambda: self._bind_request(message))
        self.close()
        found = self._together(lambda: places(self.load, self.model, specs, dtype))
        self._together(lambda: self.check(found, specs))
        parts = [part for of_rank in self.gather(parts_of(found, specs)) for part in of_rank]
        self._together(lambda: check_base(parts, specs))
        self._bound = _Bound(sender, dtype, specs, found)

    def _bind_request(self, message: Mapping[str, Any]) -> tuple[str, torch.dtype, list[SliceSpec]]:
        sender, dtype = message.get("sender"), message.get("dtype")
        refuse(
            (
                not isinstance(sender, str) or not sender,
                f"sender must be the trainer's name, a text that is not empty, not {sender!r}",
            ),
            (dtype not in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}"),
        )
        if self._bound is not None:
            if not message.get("take_over"):
                self._check_sender(sender)
            _check_idle(message)
        try:
            specs = from_message(message["slices"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"slices is no description of slices: {type(error).__name__}: {error}") from error
        return sender, DTYPES[dtype], specs

    def _check_sender(self, sender: Any) -> None:
        if sender != self.sender:
            raise RuntimeError(
                f"this engine has {self.serving}, so sender {sender!r} is refused: release it with "
                f'{{"base": true, "sender": "{self.sender}"}} in an update, or set take_over'
            )

    def update(self, message: Mapping[str, Any]) -> None:
        """Write new numbers or the base. All ranks must call this.

        Args:
            message: `sender`, `step` and one of `values` (base64) and `tensor` (in this process); or `sender` and
                `base`, True for the base's numbers, which releases the sender. `idle` is False if requests are running.

        Raises:
            ValueError: The message is not valid. The weights are as before.
            RuntimeError: The engine is bound to another sender or to none, or it is not idle, or its weights were
                changed by others. The weights are as before.
        """
        flat = self._together(lambda: self._content(message))
        bound = self._bound
        if flat is None:
            return self.close()
        try:
            self._together(lambda: bound.write(flat))
        except BaseException as error:
            bound.restore()
            raise RuntimeError(f"writing failed, and the base has been restored: {_words(error)}") from error
        bound.step, bound.expected = message["step"], bound.lines()

    def _content(self, message: Mapping[str, Any]) -> Tensor | None:
        """The numbers of an update, checked, on this rank's device; None for the base."""
        given = [name for name in ("values", "tensor", "base") if message.get(name) is not None]
        refuse((len(given) != 1, f"an update has one of values, tensor and base, not {' and '.join(given) or 'none'}"))
        content, bound, step = message[given[0]], self._bound, message.get("step")
        is_base = given == ["base"]
        _check_idle(message)
        refuse((is_base and content is not True, f"base must be true, not {content!r}"))
        if bound is not None:
            self._check_sender(message.get("sender"))
        if is_base:
            return None
        if bound is None:
            raise RuntimeError(f"an update of sender {message.get('sender')!r} before init: this engine has the base")
        if type(step) is not int:
            raise ValueError(f"step must be a whole number, not {step!r}")
        if bound.step is not None and step < bound.step:
            raise ValueError(f"step {step} of {bound.sender!r} is older than step {bound.step}, which is written")
        _check_untouched(self.model, bound)
        flat = _decoded(content, bound.dtype) if given == ["values"] else content
        refuse((not isinstance(flat, Tensor), f"tensor must be a torch.Tensor here, not {type(flat).__name__}"))
        expected = sum(spec.numel for spec in bound.specs)
        refuse(
            (
                flat.numel() != expected or flat.dtype != bound.dtype,
                f"{flat.numel():,} numbers of {flat.dtype} came, and the slices have {expected:,} of {bound.dtype}",
            )
        )
        flat = flat.detach().reshape(-1).to(bound.places[0].view.device if bound.places else "cpu")
        if not all(bool(torch.isfinite(one)) for one in torch.aminmax(flat)):  # both are nan with a nan
            raise ValueError("the numbers are not finite, so nothing is written")
        return flat

    def close(self) -> None:
        """Restore the base and forget the sender, on this rank alone."""
        if self._bound is not None:
            self._bound.restore()
            self._bound = None

    def _together(self, work: Callable[[], Any]) -> Any:
        """Do something on all ranks, and raise on all of them if one raises."""
        result, problem = None, None
        try:
            result = work()
        except Exception as error:
            problem = error
        problems = self.gather(None if problem is None else _words(problem))
        if problem is not None:
            raise problem
        for rank, words in enumerate(problems):
            if words is not None:
                raise RuntimeError(f"rank {rank}: {words}")
        return result


def _check_idle(message: Mapping[str, Any]) -> None:
    if message.get("idle") is False:
        raise RuntimeError(
            "requests are running, so the weights are not changed: pause the engine first (POST /pause?mode=keep) and "
            "resume it afterwards (POST /resume)"
        )


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {error}"


def _decoded(text: Any, dtype: torch.dtype) -> Tensor:
    if not isinstance(text, str):
        raise ValueError(f"values must be a base64 text, not {type(text).__name__}")
    try:
        raw = bytearray(base64.b64decode(text, validate=True))  # a tensor needs memory that can be written
        return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"values is no base64 text of {dtype} numbers: {error}") from error


def _check_untouched(model: nn.Module, bound: _Bound) -> None:
    """Raise if the weights are neither what was written last nor the base, as after sleep mode dropped them."""
    live = {tensor.untyped_storage().data_ptr() for tensor in itertools.chain(model.parameters(), model.buffers())}
    lost = [place for place in bound.places if place.line.untyped_storage().data_ptr() not in live]
    now = bound.lines()
    if not lost and (torch.equal(now, bound.expected) or torch.equal(now, bound.originals)):
        return
    sizes = [place.line.numel() for place in bound.places]
    changed = zip(bound.places, now.split(sizes), bound.expected.split(sizes))
    lost += [place for place, one, expected in changed if not torch.equal(one, expected)]
    raise RuntimeError(
        f"{bound.specs[lost[0].slice_number].name} was changed by others since the last update. After sleep mode of "
        "level 2, or another update of the weights, load the base again (reload_weights) and init again"
    )
