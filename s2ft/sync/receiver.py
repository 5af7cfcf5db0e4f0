"""The receiving side of slice sync in one process of an engine: who sends, what was there, what is written.

A receiver is bound to one sender at a time, or has the base. All checks of a message are made on
all ranks before the first number is written, and either all ranks write or none does.
"""

import base64
import itertools
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from s2ft.sync.places import Loader, Place, check_base, parts_of, places
from s2ft.sync.wire import DTYPES, SliceSpec, from_message

RELEASE = 'release it with {"base": true, "sender": "%s"} in an update, or set take_over'
TRANSPORTS = ("http", "file", "direct")


class Ranks(Protocol):
    """The processes that hold the engine's weights together."""

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks. Every rank must call this."""


class OneRank:
    """An engine with one process."""

    def gather(self, value: Any) -> list[Any]:
        """Return the value as a list."""
        return [value]


@dataclass
class _Bound:
    """What is written over the base, and by whom."""

    sender: str
    dtype: torch.dtype
    specs: list[SliceSpec]
    places: list[Place]
    transport: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    expected: Tensor | None = None  # the lines of all places after the last write

    def __post_init__(self) -> None:
        self.originals = _joined(place.original_line for place in self.places)

    @property
    def numel(self) -> int:
        return sum(spec.numel for spec in self.specs)


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
        ranks: Ranks | None = None,
        check: Callable[[Sequence[Place], Sequence[SliceSpec]], None] | None = None,
    ) -> None:
        """Make a receiver. Nothing is read yet.

        Args:
            model: The engine's model in this process.
            load: Its loader, which takes pairs of a name in the checkpoint and a tensor. Default: `model.load_weights`.
            ranks: The processes that hold the weights together. Default: this one alone.
            check: Raises ValueError for places that the engine does not compute with, for instance because it has
                packed the weights.
        """
        self.model = model
        self.load = model.load_weights if load is None else load
        self.ranks = OneRank() if ranks is None else ranks
        self.check = check
        self._bound: _Bound | None = None

    # ---- what is on --------------------------------------------------------------------------------------

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

    # ---- the beginning of a run --------------------------------------------------------------------------

    def bind(self, message: Mapping[str, Any]) -> None:
        """Bind to a sender: find the places of its slices, and compare the base. All ranks must call this.

        Args:
            message: `sender`, its name; `dtype` of the numbers; `slices`, see :func:`s2ft.sync.wire.to_message`;
                `transport`, a mapping with `kind`; `take_over`, whether another sender is removed;
                `idle`, False if requests are running, which matters if the weights have to be changed.

        Raises:
            ValueError: The message is not valid, the base is another one, or a slice has no place.
            RuntimeError: The engine is bound to another sender, or is not idle. In each case the weights are as before,
                and the engine is bound as before.
        """
        request = self._together(lambda: self._bind_request(message))
        with _Undo(self._bound) as undo:
            self._together(self._take_off)
            bound = self._together(lambda: self._find(request))
            self._compare(bound)
            bound.expected = _lines(bound)
            undo.forget()
        self._bound = bound

    def _bind_request(self, message: Mapping[str, Any]) -> dict[str, Any]:
        sender, dtype = message.get("sender"), message.get("dtype")
        if not isinstance(sender, str) or not sender:
            raise ValueError(f"sender must be the trainer's name, a text that is not empty, not {sender!r}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        transport = message.get("transport") or {"kind": "direct" if "transport" not in message else "http"}
        if not isinstance(transport, Mapping) or transport.get("kind") not in TRANSPORTS:
            raise ValueError(f"transport must have a kind, one of {', '.join(TRANSPORTS)}, not {transport!r}")
        take_over = message.get("take_over", False)
        if self._bound is not None and self._bound.sender != sender and not take_over:
            raise RuntimeError(
                f"this engine has {self.serving}, so sender {sender!r} is refused: {RELEASE % self._bound.sender}"
            )
        if self._bound is not None:
            _check_idle(message)
        specs = _described(message.get("slices"))
        return {"sender": sender, "dtype": DTYPES[dtype], "specs": specs, "transport": transport}

    def _find(self, request: Mapping[str, Any]) -> _Bound:
        specs, dtype = request["specs"], request["dtype"]
        found = places(self.load, self.model, specs, dtype)
        if self.check is not None:
            self.check(found, specs)
        return _Bound(request["sender"], dtype, specs, found, dict(request["transport"]))

    def _compare(self, bound: _Bound) -> None:
        mine = parts_of(bound.places, bound.specs)
        parts = [part for of_rank in self.ranks.gather(mine) for part in of_rank]
        self._together(lambda: check_base(parts, bound.specs))

    # ---- one update --------------------------------------------------------------------------------------

    def update(self, message: Mapping[str, Any]) -> None:
        """Write new numbers or the base. All ranks must call this.

        Args:
            message: `sender`, `step` and one of `values` (base64), `file` (a path), `tensor` (in this process); or
                `base`, True for the base's numbers, with a `sender` that is released. `idle` is False if requests are
                running.

        Raises:
            ValueError: The message is not valid. The weights are as before.
            RuntimeError: The engine is bound to another sender or to none, or it is not idle, or its weights were
                changed by others. The weights are as before.
            OSError: The file can't be read. The weights are as before.
        """
        has_base = self._together(lambda: _has_base(message))
        self._together(lambda: _check_idle(message))
        (self._base if has_base else self._numbers)(message)

    def _numbers(self, message: Mapping[str, Any]) -> None:
        bound = self._together(lambda: self._expected_update(message))
        flat = self._together(lambda: self._content(bound, message))
        self._write(bound, lambda: _write_numbers(bound, flat))
        bound.step = message["step"]

    def _expected_update(self, message: Mapping[str, Any]) -> _Bound:
        bound, sender, step = self._bound, message.get("sender"), message.get("step")
        if bound is None:
            raise RuntimeError(
                f"an update of sender {sender!r} before init: this engine has {self.serving}. Init first"
            )
        if sender != bound.sender:
            raise RuntimeError(
                f"this engine has {self.serving}, so an update of {sender!r} is refused: {RELEASE % bound.sender}"
            )
        if isinstance(step, bool) or not isinstance(step, int):
            raise ValueError(f"step must be a whole number, not {step!r}")
        if bound.step is not None and step < bound.step:
            raise ValueError(f"step {step} of sender {sender!r} is older than step {bound.step}, which is written")
        _check_untouched(self.model, bound)
        return bound

    def _content(self, bound: _Bound, message: Mapping[str, Any]) -> Tensor:
        """The numbers of an update, checked, on this rank's device."""
        given = [name for name in ("values", "file", "tensor") if message.get(name) is not None]
        if len(given) != 1:
            raise ValueError(f"an update has one of values, file and tensor, not {' and '.join(given) or 'none'}")
        flat = _READERS[given[0]](bound, message[given[0]])
        if flat.numel() != bound.numel or flat.dtype != bound.dtype:
            raise ValueError(
                f"{flat.numel():,} numbers of {flat.dtype} came, and the slices have {bound.numel:,} of {bound.dtype}"
            )
        flat = flat.detach().reshape(-1).to(self._device(bound))
        _check_numbers(bound, flat)
        return flat

    def _device(self, bound: _Bound) -> torch.device:
        return bound.places[0].view.device if bound.places else torch.device("cpu")

    def _write(self, bound: _Bound, work: Callable[[], None]) -> None:
        """Write on all ranks; if one of them fails, all have the base's numbers again."""
        try:
            self._together(work)
        except BaseException as error:
            for place in bound.places:
                place.restore()
            bound.step, bound.expected = None, _lines(bound)
            raise RuntimeError(f"writing failed, and the base has been restored: {_words(error)}") from error
        bound.expected = _lines(bound)

    # ---- the base --------------------------------------------------------------------------

    def _base(self, message: Mapping[str, Any]) -> None:
        def check() -> None:
            sender = message.get("sender")
            if (
                sender is not None
                and self.sender is not None
                and sender != self.sender
                and not message.get("take_over")
            ):
                raise RuntimeError(f"this engine has {self.serving}, so {sender!r} can't release it: set take_over")

        self._together(check)
        bound = self._bound
        if bound is None:
            return
        for place in bound.places:
            place.restore()
        bound.step, bound.expected = None, _lines(bound)
        if message.get("sender") is not None:
            self._bound = None

    # ---- taking off --------------------------------------------------------------------------------------

    def close(self) -> None:
        """Restore the base and forget the sender, on this rank alone; for the end of the engine."""
        if self._bound is not None:
            for place in self._bound.places:
                place.restore()
            self._bound = None

    def _take_off(self) -> None:
        if self._bound is not None:
            for place in self._bound.places:
                place.restore()

    def _together(self, work: Callable[[], Any]) -> Any:
        """Do something on all ranks, and raise on all of them if one raises."""
        result, problem = None, None
        try:
            result = work()
        except Exception as error:
            problem = error
        problems = self.ranks.gather(None if problem is None else _words(problem))
        if problem is not None:
            raise problem
        for rank, words in enumerate(problems):
            if words is not None:
                raise RuntimeError(f"rank {rank}: {words}")
        return result


class _Undo:
    """If a change fails, the numbers that were there before it are written again."""

    def __init__(self, bound: _Bound | None) -> None:
        self._bound = bound

    def __enter__(self) -> "_Undo":
        self._before = [place.read() for place in self._bound.places] if self._bound is not None else []
        return self

    def forget(self) -> None:
        """The change has succeeded."""
        self._before = None

    def __exit__(self, *error) -> None:
        if self._before:
            for place, numbers in zip(self._bound.places, self._before):
                place.put(numbers)


# ---- messages --------------------------------------------------------------------------------------------


def _has_base(message: Mapping[str, Any]) -> bool:
    """Whether an update asks for the base."""
    if message.get("base") is not None and message["base"] is not True:
        raise ValueError(f"base must be true, not {message['base']!r}")
    if message.get("base") and any(message.get(name) is not None for name in ("values", "file", "tensor")):
        raise ValueError("an update has numbers or base, not both")
    return bool(message.get("base"))


def _described(slices: Any) -> list[SliceSpec]:
    try:
        specs = from_message(slices) if slices else []
    except (KeyError, TypeError) as error:
        raise ValueError(f"slices is no description of slices: {type(error).__name__}: {error}") from error
    if not specs:
        raise ValueError("slices describes none")
    return specs


def _check_idle(message: Mapping[str, Any]) -> None:
    if message.get("idle") is False:
        raise RuntimeError(
            "requests are running, so the weights are not changed: pause the engine first (POST /pause?mode=keep) and "
            "resume it afterwards (POST /resume)"
        )


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {error}"


def _from_values(bound: _Bound, text: Any) -> Tensor:
    if not isinstance(text, str):
        raise ValueError(f"values must be a base64 text, not {type(text).__name__}")
    try:
        raw = bytearray(base64.b64decode(text, validate=True))  # a tensor needs memory that can be written
    except ValueError as error:
        raise ValueError(f"values is no base64 text: {error}") from error
    return _numbers_in(bound, raw, "values has")


def _from_file(bound: _Bound, path: Any) -> Tensor:
    """Read a file. It must lie in the folder that the sender named, if it named one, and have the right size."""
    if not isinstance(path, str):
        raise ValueError(f"file must be a path, not {path!r}")
    folder = bound.transport.get("folder")
    if folder is not None and Path(path).resolve().parent != Path(folder).resolve():
        raise ValueError(f"file {path} is not in {folder}, the folder that the sender has named")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not block the engine
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"file {path} is no plain file")
        _check_bytes(bound, status.st_size, f"{path} has")
        raw = bytearray(status.st_size)
        if file.readinto(raw) != status.st_size:
            raise ValueError(f"file {path} has become shorter while it was read")
    return _numbers_in(bound, raw, f"{path} has")


def _from_tensor(bound: _Bound, tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"tensor must be a torch.Tensor in this process, not {type(tensor).__name__}")
    return tensor


_READERS = {"values": _from_values, "file": _from_file, "tensor": _from_tensor}


def _numbers_in(bound: _Bound, raw: bytearray, what: str) -> Tensor:
    _check_bytes(bound, len(raw), what)
    return torch.from_numpy(np.frombuffer(raw, np.uint8)).view(bound.dtype)


def _check_bytes(bound: _Bound, size: int, what: str) -> None:
    expected = bound.numel * bound.dtype.itemsize
    if size != expected:
        raise ValueError(f"{what} {size:,} bytes, and the slices have {expected:,} ({bound.numel:,} of {bound.dtype})")


# ---- numbers ---------------------------------------------------------------------------------------------


def _check_numbers(bound: _Bound, flat: Tensor) -> None:
    if not all(bool(torch.isfinite(one)) for one in torch.aminmax(flat)):  # the quickest way: both are nan with a nan
        for spec, values in zip(bound.specs, flat.split([spec.numel for spec in bound.specs])):
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"{spec.name}: the numbers are not finite, so nothing is written")


@torch.no_grad()
def _write_numbers(bound: _Bound, flat: Tensor) -> None:
    values = flat.split([spec.numel for spec in bound.specs])
    for place in bound.places:
        place.write(values[place.slice_number].view(bound.specs[place.slice_number].values_shape))


def _joined(lines: Iterable[Tensor]) -> Tensor:
    found = list(lines)
    return torch.cat(found) if found else torch.empty(0)


def _lines(bound: _Bound) -> Tensor:
    return _joined(place.line for place in bound.places)


def _check_untouched(model: nn.Module, bound: _Bound) -> None:
    """Raise if the weights are neither what was written last nor the base, as after sleep mode dropped them."""
    live = {tensor.untyped_storage().data_ptr() for tensor in itertools.chain(model.parameters(), model.buffers())}
    lost = [place for place in bound.places if place.line.untyped_storage().data_ptr() not in live]
    now = _lines(bound)
    if not lost and (torch.equal(now, bound.expected) or torch.equal(now, bound.originals)):
        return
    sizes = [place.line.numel() for place in bound.places]
    for place, one, expected in zip(bound.places, now.split(sizes), bound.expected.split(sizes)):
        if not torch.equal(one, expected):
            lost.append(place)
    raise RuntimeError(
        f"{bound.specs[lost[0].slice_number].name} was changed by others since the last update. After sleep mode of "
        "level 2, or another update of the weights, load the base again (reload_weights) and init again"
    )
