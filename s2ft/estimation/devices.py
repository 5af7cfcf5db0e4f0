"""What an estimate says, and what several devices share of it.

On several devices, weights, gradients and states are divided. What a device gathers and holds for communication is one
term each, in place of a re-enactment of the engines. Against measured ranks (`bench/estimate_ranks.py`) a peak is
within 10 %.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from torch import nn

from s2ft.config import STRATEGIES, check_whole, refuse
from s2ft.files.plain_text import table

# ---- the result -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPart:
    """The memory of a layer or another part of the model, in bytes except for `trained`.

    Attributes:
        name: Name of the part.
        parameters: Frozen weights and deltas. A tied weight counts in the first part that has it.
        buffers: Buffers.
        trained: Number of trained parameters, not bytes.
        gradients: Gradients.
        optimizer: State of the optimizer.
        kept: Tensors that autograd saves in the forward for the backward.
    """

    name: str
    parameters: int
    buffers: int
    trained: int
    gradients: int
    optimizer: int
    kept: int


@dataclass(frozen=True)
class Estimate:
    """The memory of training, in bytes. :func:`s2ft.estimate` makes it. It prints as a table.

    The table has a line per part. Consecutive layers with the same numbers share a line.

    Attributes:
        parts: Memory of the model's parts, in the model's order.
        batch: Number of sequences, images or recordings in one forward.
        length: Number of tokens of each, or None if the inputs are not tokens.
        device: Device of the training.
        peak: Largest memory in use at one time during a step.
        peak_in: Phase of the peak: "forward", "backward" or "optimizer".
        resident: Part of the peak that is on the device already: the weights of a loaded model.
        free: Free memory of the device, or None if it is not known.
        notes: Assumptions of the numbers.
        strategy: How the training is spread over devices, or None for one device. With a strategy the numbers are those
            of one device.
        devices: Number of devices.
        host: Memory of the host that one device uses for what is offloaded.
        communication: Part of the peak that is held for communication during the whole step: DDP's buckets, ZeRO's
            reduction buffers.

    Example:
        >>> estimate = s2ft.estimate(model, s2ft.S2FTConfig(d_ratio=0.1), batch=2, length=8)
        >>> estimate.peak_in, estimate.parts[1].name, estimate.parts[1].trained
        ('backward', 'model.layers.0', 832)
    """

    parts: list[MemoryPart]
    batch: int
    length: int | None
    device: str
    peak: int
    peak_in: str
    resident: int
    free: int | None
    notes: tuple[str, ...]
    strategy: str | None = None
    devices: int = 1
    host: int = 0
    communication: int = 0

    @property
    def parameters(self) -> int:
        """Bytes of all parameters: frozen weights and deltas."""
        return sum(part.parameters for part in self.parts)

    @property
    def buffers(self) -> int:
        """Bytes of all buffers."""
        return sum(part.buffers for part in self.parts)

    @property
    def trained(self) -> int:
        """Number of trained parameters, not bytes."""
        return sum(part.trained for part in self.parts)

    @property
    def gradients(self) -> int:
        """Bytes of all gradients."""
        return sum(part.gradients for part in self.parts)

    @property
    def optimizer(self) -> int:
        """Bytes of the optimizer's state."""
        return sum(part.optimizer for part in self.parts)

    @property
    def kept(self) -> int:
        """Bytes that autograd saves in one forward for the backward, without parameters and buffers."""
        return sum(part.kept for part in self.parts)

    @property
    def fits(self) -> bool | None:
        """True if the memory that is still needed is free on the device. None if the free memory is not known."""
        return None if self.free is None else self.peak - self.resident <= self.free

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate for JSON.

        Returns:
            All attributes, and the sums over the parts.

        Example:
            >>> estimate = s2ft.estimate(model, s2ft.S2FTConfig(d_ratio=0.1), batch=2, length=8)
            >>> estimate.to_dict()["trained"]
            1664
        """
        sums = ("parameters", "buffers", "trained", "gradients", "optimizer", "kept", "fits")
        return {**asdict(self), "notes": list(self.notes), **{name: getattr(self, name) for name in sums}}

    def summary(self) -> str:
        """Return a paragraph with the needed memory, its kinds, and whether it fits.

        Returns:
            The text, without line breaks.

        Example:
            >>> s2ft.estimate(model, s2ft.S2FTConfig(d_ratio=0.1), batch=2, length=8).summary()
            'Training takes ... KiB at most: 343.8 KiB of parameters, 6.5 KiB of gradients, ...'
        """
        about = "" if self.strategy is None else "about "  # by formulas, see s2ft.estimation.devices
        inputs = f"{self.batch}" if self.length is None else f"{self.batch} × {self.length} tokens"
        return (
            f"Training takes {about}{size(self.peak)} at most: {size(self.parameters + self.buffers)} of parameters, "
            f"{size(self.gradients)} of gradients, {size(self.optimizer)} of optimizer state, "
            f"{size(self.kept)} kept for backward (batch of {inputs}), and the temporary memory of the {self.peak_in}. "
            f"{self._verdict()}"
        )

    def _verdict(self) -> str:
        more = f" in addition to the {size(self.resident)} that are loaded" if self.resident else ""
        if self.free is None:
            return f"The free memory of {self.device} is not known."
        if self.fits:
            return f"{size(self.free)} are free on {self.device}: it fits."
        return (
            f"It will not fit: {size(self.peak - self.resident)} are needed{more}, and {size(self.free)} are free on "
            f"{self.device}. A smaller batch, shorter rows, gradient checkpointing, or weights in a smaller dtype need "
            "less."
        )

    def __str__(self) -> str:
        head = ("part", "parameters", "trained", "gradients", "optimizer", "kept for backward")
        rows = [(name, *_columns(part)) for name, part in _folded(self.parts)]
        text = table([head, *rows, ("total", *_columns(self))], right=range(1, len(head)))
        return "\n".join([text, self.summary(), *(f"note: {note}" for note in self.notes)])


def _columns(part: MemoryPart | Estimate) -> tuple[str, ...]:
    return (
        size(part.parameters + part.buffers),
        f"{part.trained:,}",
        size(part.gradients),
        size(part.optimizer),
        size(part.kept),
    )


def _folded(parts: list[MemoryPart]) -> Iterator[tuple[str, MemoryPart]]:
    """Yield a name and a part for each line. Consecutive parts whose lines differ only in a number share one line."""
    for _, run in groupby(parts, lambda part: (re.sub(r"\d+", "#", part.name), *_columns(part))):
        first, *others = run
        last = re.findall(r"\d+", others[-1].name)[-1] if others else None
        yield first.name if last is None else f"{first.name} to {last}, each", first


def size(number: int) -> str:
    """Format a number of bytes, such as 1.5 MiB."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 2**power:
            return f"{number / 2**power:,.{2 if power == 30 else 1}f} {unit}"
    return f"{number} B"


POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def size_of(value: int | str | None, name: str) -> int | None:
    """Return the bytes of a size such as 24GB or 80 GiB. Both are powers of 1,024, as makers of GPUs use GB.

    Args:
        value: Bytes, a text, or None.
        name: Name of the argument, for the error.

    Raises:
        ValueError: It is no size above 0.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    text = value.strip() if isinstance(value, str) else ""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise ValueError(f"{name} must be a size above 0, such as 24GB, got {value!r}")
    return int(float(found[1]) * 1024 ** POWERS[found[2].upper()])


# ---- several devices ------------------------------------------------------------------------------------------------


OFFLOADS: dict[str, tuple[str, ...]] = {
    "fsdp2": ("all",),
    "tp+fsdp2": ("all",),
    "zero1": ("optimizer",),
    "zero2": ("optimizer",),
    "zero3": ("optimizer", "all"),
}


@dataclass(frozen=True)
class Strategy:
    """How training is spread over devices, for :func:`s2ft.estimate`.

    Attributes:
        name: "ddp", "fsdp2", "zero1", "zero2", "zero3", "tp" or "tp+fsdp2".
        offload: What is kept in the memory of the host: "optimizer" (states, with the gradients that the optimizer
            reads; ZeRO only), "all" (also the weights between uses; FSDP2 and ZeRO-3), or None.
        tp_size: Number of devices over which a weight is split by tensor parallelism, for "tp+fsdp2". For "tp" it is
            the number of devices.
        reshard_after_forward: FSDP2: whether a block's gathered weights are freed after its forward pass.
        reduce_bucket_size: ZeRO: number of elements of a reduction buffer. The default is DeepSpeed's.

    Raises:
        TypeError: A field has a wrong type. The message names it.
        ValueError: A value is unknown, or the strategy does not have it.

    Example:
        >>> strategy = s2ft.Strategy("fsdp2", reshard_after_forward=False)
        >>> s2ft.estimate(model, s2ft.S2FTConfig(d_ratio=0.1), 2, 8, strategy=strategy, devices=4).devices
        4
    """

    name: str
    offload: str | None = None
    tp_size: int | None = None
    reshard_after_forward: bool = True
    reduce_bucket_size: int = 500_000_000

    def __post_init__(self) -> None:
        allowed = OFFLOADS.get(self.name, ())
        choices = " or ".join(map(repr, allowed)) or "None: it has no offload"
        refuse(
            (self.name not in STRATEGIES, f"strategy must be one of {', '.join(STRATEGIES)}, got {self.name!r}"),
            (
                self.offload is not None and self.offload not in allowed,
                f"offload of {self.name} must be {choices}, got {self.offload!r}",
            ),
            (
                (self.name == "tp+fsdp2") != (self.tp_size is not None),
                f"tp_size must be given for tp+fsdp2 and for no other strategy, got {self.tp_size} for {self.name}",
            ),
        )
        if not isinstance(self.reshard_after_forward, bool):
            raise TypeError(f"reshard_after_forward must be True or False, got {self.reshard_after_forward!r}")
        check_whole("reduce_bucket_size", self.reduce_bucket_size)
        if self.tp_size is not None:
            check_whole("tp_size", self.tp_size, 2)

    @property
    def is_tensor_parallel(self) -> bool:
        """Whether weights are split by tensor parallelism."""
        return self.name.startswith("tp")

    @property
    def shards_weights(self) -> bool:
        """Whether a device holds only a part of each weight."""
        return self.name not in ("ddp", "zero1", "zero2")


def check_devices(strategy: Strategy | None, devices: int | None) -> None:
    """Check that a strategy can use this number of devices.

    Raises:
        ValueError: It can't.
    """
    if devices is None:
        return
    check_whole("devices", devices)
    size = 1 if strategy is None else strategy.tp_size or 1
    refuse(
        (strategy is None and devices > 1, f"devices={devices} needs a strategy: one of {', '.join(STRATEGIES)}"),
        (devices % size, f"devices must be a multiple of tp_size, {size}, got {devices}"),
    )


# ---- by formulas ----------------------------------------------------------------------------------------------

MOST = 1024  # devices that are tried
FLOAT = 4  # bytes of a float32, in which ZeRO's optimizer works
LIVE = 1_000_000_000  # gathered elements that ZeRO-3 keeps by default
DIVIDES = ("colwise", "packed_colwise", "rowwise", "packed_rowwise")  # styles whose layers have parts of activations
GATHERS = (
    *("colwise_gather_output", "colwise_rep", "rowwise_rep", "rowwise_split_input"),
    *("embedding_rowwise", "embedding_colwise"),
)
WHOLE = ("replicated_with_grad_allreduce", "replicate", None)


def on_devices(
    one: Estimate, divided: Mapping[str, int], model: nn.Module, strategy: Strategy, devices: int
) -> Estimate:
    """Return the estimate of one of several devices.

    Args:
        one: The estimate of one device.
        divided: The kept bytes of each part that tensor parallelism divides.
        model: The model that was estimated.
        strategy: The strategy.
        devices: Number of devices.

    Raises:
        ValueError: Tensor parallelism can't share the heads among so many devices.
    """
    tensor = (strategy.tp_size or devices) if strategy.is_tensor_parallel else 1
    _check_heads(model, tensor)
    shards = devices // tensor
    whole = _whole_bytes(model, [part.name for part in one.parts])
    split = [_split(part, whole[part.name], divided[part.name], tensor) for part in one.parts]
    note = f"{strategy.name} is counted by formulas, the peak within about 10 %"
    parts = [_shard(part, strategy, shards) for part in split]
    found = replace(one, parts=parts, strategy=strategy.name, devices=devices, notes=(*one.notes, note))
    states = found.gradients + found.optimizer
    host = {None: 0, "optimizer": states, "all": states + found.parameters}[strategy.offload]
    buffers = _buffers(one, strategy)
    gathered = _gathered(split, model, strategy, shards)
    temporary = max(0, one.peak - one.parameters - one.buffers - one.gradients - one.optimizer - one.kept)
    peak = found.parameters + found.buffers + states - host + found.kept + temporary + gathered + buffers
    return replace(found, peak=peak, host=host, communication=buffers)


def _whole_bytes(model: nn.Module, parts: list[str]) -> dict[str, int]:
    """Return the bytes of each part's frozen weights that transformers' plan leaves whole: norms, experts."""
    whole = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        if parameter.requires_grad or _style(model, module) in (*DIVIDES, *GATHERS):
            continue
        inside = [part for part in parts if module == part or module.startswith(part + ".")]
        if inside:
            whole[max(inside, key=len)] += parameter.nbytes
    return whole


def _split(part: MemoryPart, whole: int, divided: int, tensor: int) -> MemoryPart:
    """Divide a part by tensor parallelism. Every device has the whole of s2, with its gradient and state.

    Args:
        part: The part on one device.
        whole: Bytes of its frozen weights that every device has.
        divided: Bytes of what it keeps for the backward that the devices share.
        tensor: Number of devices that share a weight.
    """
    shared = part.parameters - part.gradients - whole
    weights = part.gradients + whole + shared // tensor
    return replace(part, parameters=weights, kept=part.kept - divided + divided // tensor)


def _shard(part: MemoryPart, strategy: Strategy, shards: int) -> MemoryPart:
    """Divide the weights of a part, or only its gradients and states."""
    shards = 1 if strategy.name == "ddp" else shards
    gradients, states = part.gradients, part.optimizer
    if strategy.name.startswith("zero") and part.trained:
        width = part.gradients // part.trained or 1  # nothing uses the part in this step
        updates_in_place = strategy.name == "zero3" and width == FLOAT  # else the optimizer has a copy
        states = states * FLOAT // width + (0 if updates_in_place else FLOAT * part.trained)
        gradients = FLOAT * part.trained if strategy.name == "zero3" else gradients
    weights = part.parameters // shards if strategy.shards_weights else part.parameters
    return replace(part, parameters=weights, gradients=gradients // shards, optimizer=states // shards)


def _gathered(parts: list[MemoryPart], model: nn.Module, strategy: Strategy, shards: int) -> int:
    """Return the bytes of whole weights: with FSDP2 the largest group and the block that is gathered ahead."""
    weights = [part.parameters for part in parts]
    if strategy.name.endswith("fsdp2"):
        two = max(weights) + max([part.parameters for part in parts if re.search(r"\.\d+$", part.name)], default=0)
        return min(two, sum(weights)) if strategy.reshard_after_forward else sum(weights)
    if strategy.name == "zero3" and (shards > 1 or strategy.offload == "all"):
        return min(sum(weights), LIVE * next(model.parameters()).itemsize)
    return 0


def _buffers(one: Estimate, strategy: Strategy) -> int:
    """Return the bytes that are held for communication: DDP's buckets, ZeRO's reduction buffer."""
    if strategy.name.startswith("zero"):
        return strategy.reduce_bucket_size * max(part.gradients // part.trained for part in one.parts if part.trained)
    return one.gradients if strategy.name == "ddp" else 0


def smallest(count: Callable[[int], Estimate], strategy: Strategy) -> Estimate:
    """Return the estimate of the smallest number of devices on which a step fits.

    Args:
        count: Returns the estimate of a number of devices.
        strategy: The strategy.

    Returns:
        The estimate. If no number fits, that of the largest number that was tried, with a note.
    """
    unit = strategy.tp_size or 1
    found = count(unit)
    for devices in range(2 * unit, MOST + 1, unit):
        if found.fits is not False:
            return found
        with suppress(ValueError):  # tensor parallelism: so many devices can't share the heads
            found = count(devices)
    note = f"no number of devices up to {MOST:,} has enough memory with {strategy.name}"
    return found if found.fits else replace(found, notes=(*found.notes, note))


# ---- tensor parallelism ------------------------------------------------------------------------------------


def check_plan(model: nn.Module) -> None:
    """Check that transformers can divide the layers of a model.

    Raises:
        ValueError: The model has no plan, or one that divides something that can't be counted.
    """
    if not getattr(model, "tp_plan", None):
        raise ValueError(f"{type(model).__name__} has no plan for tensor parallelism in transformers")
    for name, _ in model.named_modules():
        style = _style(model, name)
        if style not in (*DIVIDES, *GATHERS, *WHOLE):
            raise ValueError(f"{name} is split by {style!r} in transformers' plan, which s2ft can't count")
    for name, _ in model.named_parameters():  # a plan names weights where several lie in one module, such as experts
        style = _style(model, name)
        if style not in WHOLE:
            raise ValueError(f"{name} is split by {style!r} in transformers' plan, which s2ft can't count")


def with_parts(model: nn.Module) -> set[str]:
    """Return the names of modules inside which a tensor-parallel device has a part of the activations."""
    return {name.rpartition(".")[0] for name, _ in model.named_modules() if _style(model, name) in DIVIDES}


def _style(model: nn.Module, name: str) -> str | None:
    """Return how transformers' plan divides a module."""
    return (getattr(model, "tp_plan", None) or {}).get(re.sub(r"\.\d+(?=\.|$)", ".*", name))


def _check_heads(model: Any, size: int) -> None:
    config = model.config.get_text_config() if size > 1 else None
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % size:
            raise ValueError(f"{type(model).__name__} has {name}={heads}, which {size} devices can't share")
