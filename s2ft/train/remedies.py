"""What to change after an out-of-memory error: the switches that help, with the memory that a step then takes.

The numbers are those of :func:`s2ft.estimate` for this model. They are counted when the error is there, on a copy of
the model without data, and take no memory of the device.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import s2ft
from s2ft.attached.hosts.compiled import unwrapped
from s2ft.attached.record import find_attachment
from s2ft.distributed import without_zero_init
from s2ft.estimation.memory import free_memory, resident
from s2ft.estimation.result import size
from s2ft.model.coupling import Coupling
from s2ft.train.kernels import plain_kernels
from s2ft.train.loss import chunked_loss
from s2ft.train.out_of_memory import OutOfMemory, first_line, is_out_of_memory

logger = logging.getLogger(__name__)
BITS = {"4bit": 4.5, "8bit": 8.1}  # of one weight in bitsandbytes' blocks, with their scales
SHORTEST = 64  # tokens; rows are not cut to less


@dataclass(frozen=True)
class Step:
    """What decides on the memory of a step.

    Attributes:
        batch: Rows of one forward pass on one device.
        length: Tokens of the longest row.
        accumulation: Forward passes of one update.
        gradient_checkpointing: Whether activations are computed again in the backward pass.
        chunked_loss: Whether the loss is computed without keeping the logits.
        optimizer: As for :func:`s2ft.estimate`.
        autocast: As for :func:`s2ft.estimate`.
        sequences: Sequences of one row: 2 for pairs of a chosen and a rejected answer.
        prompt: Tokens of the longest row that no option shortens.
        shortens: The option that shortens the rest.
        strategy: As for :func:`s2ft.estimate`.
        devices: As for :func:`s2ft.estimate`.
        memory: As for :func:`s2ft.estimate`.
    """

    batch: int
    length: int
    accumulation: int = 1
    gradient_checkpointing: bool = False
    chunked_loss: bool = True
    optimizer: Any = "adamw"
    autocast: torch.dtype | None = None
    sequences: int = 1
    prompt: int = 0
    shortens: str = "--max-length"
    strategy: Any = None
    devices: int | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Remedy:
    """A change of the options.

    Attributes:
        switches: The options to give.
        peak: Memory of a step with them, in bytes.
        price: What the change costs.
    """

    switches: str
    peak: int
    price: str


def step_of(arguments, length: int, chunked: bool, **more: Any) -> Step:
    """Return the step of a run.

    Args:
        arguments: The arguments of a Trainer.
        length: Tokens of the longest row.
        chunked: Whether the loss is computed without keeping the logits.
        more: Further fields of the step.
    """
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return Step(
        arguments.per_device_train_batch_size,
        length,
        arguments.gradient_accumulation_steps,
        bool(arguments.gradient_checkpointing or getattr(arguments, "activation_checkpointing", False)),
        chunked,
        partial(kind, **options),
        torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None,
        **more,
    )


@contextmanager
def explain_out_of_memory(model: nn.Module, step: Callable[[], Step], kept: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error inside the context into one that says which switch helps.

    Args:
        model: The model that is trained, with its adapter. On entry, its memory and what is free are noted.
        step: Returns the step that was tried.
        kept: Returns a sentence about what the run has kept.

    Raises:
        OutOfMemory: Memory was too small.
    """
    device = _device(model)
    room = _room(model, device)
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = f"out of memory on {device}: {first_line(error)}"
        left = f"{kept()}; --resume takes the options of the run, and others start it again with --overwrite"
        raise OutOfMemory(reason, _advice(model, step, room, device), left) from error


def _advice(model: nn.Module, step: Callable[[], Step], room: int | None, device: torch.device) -> list[str]:
    logger.info("out of memory: counting what other settings would take ...")
    try:
        tried = step()
        count = Count(model, device)
        return _lines(tried, count(tried), remedies(count, tried, room), room)
    except Exception as error:  # the advice must not hide the error
        logger.info("the memory of other settings was not estimated: %s", first_line(error))
        return ["lower --per-device-train-batch-size and --max-length, or add --gradient-checkpointing"]


def _device(model: nn.Module) -> torch.device:
    """The device of the training. A Trainer moves the model to the GPU if there is one."""
    device = next(unwrapped(model).parameters()).device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else device


def _room(model: nn.Module, device: torch.device) -> int | None:
    """The bytes of a device that the model and its training may use, or None if they are not known."""
    free = free_memory(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return None if free is None else free + cached + resident(unwrapped(model), device)


class Count:
    """Counts the memory of a step on a copy of a model without data.

    Args:
        model: The model, attached or not.
        device: The device of the training.
        config: What is trained; default: what the model's adapter trains.
    """

    def __init__(self, model: nn.Module, device: torch.device, config: s2ft.S2FTConfig | None = None) -> None:
        model = unwrapped(model)
        attached, self.couplings = _attached(model)
        self.config = config or attached
        self.dtype, self.device = model.dtype, device
        self.hollow, self.bits = _hollow(model)
        self._peaks: dict[Step, int] = {}

    def __call__(self, step: Step, bits: str | None = None) -> int:
        """Return the bytes of a step's peak.

        Args:
            step: The step.
            bits: "4bit" or "8bit" for a base that is quantized; default: as the model is.
        """
        if step not in self._peaks:
            self._peaks[step] = self.estimate(step).peak
        return self._peaks[step] - self.saved(bits or self.bits)

    def estimate(self, step: Step) -> s2ft.Estimate:
        """Return the estimate of a step on weights that are not quantized."""
        whole_logits = step.strategy is not None and step.strategy.shards_weights  # of a head that is gathered
        with plain_kernels():
            return s2ft.estimate(
                self.hollow,
                self.config,
                step.batch * step.sequences,
                step.length,
                optimizer=step.optimizer,
                gradient_checkpointing=step.gradient_checkpointing,
                autocast=step.autocast,
                dtype=self.dtype,
                device=self.device.type,
                accumulation=step.accumulation,
                use_cache=False,
                loss=loss_in_chunks if step.chunked_loss and not whole_logits else None,
                couplings=self.couplings,
                strategy=step.strategy,
                devices=step.devices,
                memory=step.memory,
            )

    def saved(self, bits: str | None) -> int:
        """Return the bytes that a quantized base saves. The largest weight is unpacked for its product."""
        weights = quantizable(self.hollow)
        if bits is None or not weights:
            return 0
        width = self.dtype.itemsize
        packed = sum(weights) * BITS[bits] / 8
        return max(0, int(sum(weights) * width - packed - max(weights) * width))


def loss_in_chunks(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Compute the loss of a batch without keeping the logits."""
    with chunked_loss(model):
        return model(**inputs).loss


def quantizable(model: nn.Module) -> list[int]:
    """Return the number of weights of each linear layer that bitsandbytes quantizes: all but the output layer."""
    head = model.get_output_embeddings()
    return [layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]


def _attached(model: nn.Module) -> tuple[s2ft.S2FTConfig | None, list[Coupling] | None]:
    """What the adapter of a model trains, and the couplings that are of no known family."""
    record = find_attachment(model)
    return (None, None) if record is None else (record.config, record.custom_couplings)


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a plain model of the same config and dtype on the meta device.

    Args:
        model: A model of transformers, attached or not. Its weights may be spread over devices.
    """
    return _hollow(model)[0].to(model.dtype)


def _hollow(model: nn.Module) -> tuple[nn.Module, str | None]:
    """A plain model of the same config without data, and how the given one is quantized."""
    config = copy.deepcopy(model.config)
    quantized = config.__dict__.pop("quantization_config", None)
    bits = None
    if getattr(quantized, "load_in_4bit", False):
        bits = "4bit"
    elif getattr(quantized, "load_in_8bit", False):
        bits = "8bit"
    with plain_kernels(), torch.device("meta"), without_zero_init():
        return type(model)._from_config(config), bits


# ---- remedies ------------------------------------------------------------------------------------------


def remedies(count: Count, step: Step, room: int | None) -> list[Remedy]:
    """Return the changes that lower the memory of a step: first those that fit, and of these the cheapest first.

    Args:
        count: Counts the memory of a step.
        step: The step that was tried.
        room: Bytes that the training may use, or None if they are not known.
    """
    found = [*_same_result(count, step, room), *_other_result(count, step, room)]
    if not any(_fits(remedy, room) for remedy in found):
        found.append(_everything(count, step))
    now = count(step)
    found = [remedy for remedy in found if remedy.peak < now]
    return sorted(found, key=lambda remedy: not _fits(remedy, room))  # a stable sort


def _fits(remedy: Remedy, room: int | None) -> bool:
    return room is not None and remedy.peak <= room


def _same_result(count: Count, step: Step, room: int | None) -> Iterator[Remedy]:
    """Changes after which the updates are the same."""
    if not step.chunked_loss:
        yield Remedy("without --no-chunked-loss", count(replace(step, chunked_loss=True)), "nothing")
    if step.batch > 1:
        batch = _largest_batch(count, step, room)
        smaller = _with_batch(step, batch)
        switches = f"--per-device-train-batch-size {batch} --gradient-accumulation-steps {smaller.accumulation}"
        yield Remedy(switches, count(smaller), "time")
    if not step.gradient_checkpointing:
        yield Remedy("--gradient-checkpointing", count(replace(step, gradient_checkpointing=True)), "time")


def _other_result(count: Count, step: Step, room: int | None) -> Iterator[Remedy]:
    """Changes after which the run is another one."""
    length = (step.length - step.prompt) // 2
    if length >= SHORTEST:
        peak = count(replace(step, length=step.prompt + length))
        if room is not None and peak > room and length // 2 >= SHORTEST:
            length //= 2
            peak = count(replace(step, length=step.prompt + length))
        yield Remedy(f"{step.shortens} {length}", peak, "longer rows are cut or left out")
    if count.bits is None and count.saved("4bit"):
        yield Remedy("--load-in-4bit", count(step, "4bit"), "a coarser base")


def _everything(count: Count, step: Step) -> Remedy:
    """The changes with the same updates at once."""
    least = replace(_with_batch(step, 1), gradient_checkpointing=True, chunked_loss=True)
    switches = ["--gradient-checkpointing"] * (not step.gradient_checkpointing)
    if step.batch > 1:
        switches.append(f"--per-device-train-batch-size 1 --gradient-accumulation-steps {least.accumulation}")
    if count.bits is None:
        switches.append("--load-in-4bit")
    return Remedy(" ".join(switches), count(least, "4bit" if count.bits is None else None), "time, a coarser base")


def _with_batch(step: Step, batch: int) -> Step:
    return replace(step, batch=batch, accumulation=step.accumulation * (step.batch // batch))


def _largest_batch(count: Count, step: Step, room: int | None) -> int:
    """The largest divisor of the batch that fits, by a line through the largest and the smallest; 1 if none does.

    The peak is the maximum of lines, so that it is never above this one.
    """
    if room is None:
        return max(1, step.batch // 2)
    most, least = count(step), count(_with_batch(step, 1))
    each = (most - least) / max(1, step.batch - 1)
    smaller = [batch for batch in range(step.batch - 1, 0, -1) if step.batch % batch == 0]
    return next((batch for batch in smaller if least + each * (batch - 1) <= room), 1)


def _lines(step: Step, now: int, found: list[Remedy], room: int | None) -> list[str]:
    shape = f"{step.batch} × {step.length:,} tokens" + (f" × {step.sequences}" if step.sequences > 1 else "")
    there = "" if room is None else f"; {size(room)} are there for the model and its training"
    lines = [f"a step of {shape} takes {size(now)} by s2ft's estimate{there}"]
    if room is not None and now <= room:
        lines.append("the estimate fits: other processes, or memory in pieces, took the rest")
    width = max((len(remedy.switches) for remedy in found), default=0)
    for remedy in found:
        verdict = "" if room is None else "fits" if _fits(remedy, room) else "does not fit"
        lines.append(f"  {remedy.switches:<{width}}  {size(remedy.peak):>10}  {verdict:<12}  costs {remedy.price}")
    return lines
