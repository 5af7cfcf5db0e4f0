"""Trains a model on the rows of MetaMathQA, by the protocol of PEFT's comparison. A run can stop and go on."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from comparison.clock import Clock, OutOfTime
from comparison.memory import Memory
from comparison.settings import TrainingParams

BUCKET = 20  # batches whose rows are sorted by length together
EMPTY_CACHE_STEPS = 10
WARM_UP = 0.1  # of the steps
SMALL = 2 * 2**30  # bytes of a checkpoint that is also saved after validations
DISK = 200 * 2**20  # bytes a second that a disk writes at least


@dataclass
class Progress:
    """What a run has done so far. It is part of the checkpoints.

    Attributes:
        step: Number of steps.
        losses: Loss of each step, in nats a token.
        durations: Seconds of each step.
        tokens: Tokens of each step, padding left out and one end token a row counted.
        metrics: One dictionary for each validation, with the keys of PEFT's results.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)


def encoded(tokenizer, pairs: list[tuple[str, str]], params: TrainingParams) -> list[list[int]]:
    """Return the token ids of prompts with their answers, cut at `max_seq_length`."""
    texts = [params.query_template.format(query=question) + answer for question, answer in pairs]
    return [ids[: params.max_seq_length] for ids in tokenizer(texts)["input_ids"]]


def batches(rows: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    """Divide rows into batches. The rows of 20 batches are sorted by length, the longest first.

    Args:
        rows: Token ids of each row.
        size: Number of rows of a batch.

    Yields:
        The rows of each batch.
    """
    for first in range(0, len(rows), size * BUCKET):
        bucket = rows[first : first + size * BUCKET]
        lengths = torch.tensor([len(row) for row in bucket])
        order = lengths.argsort(descending=True).tolist()
        for start in range(0, len(order), size):
            yield [bucket[number] for number in order[start : start + size]]


def tensors(rows: list[list[int]], end: int, device: torch.device) -> dict[str, Tensor]:
    """Pad rows on the right with the end token, and label all tokens and the first end token of each row.

    The longest row of a batch has no end token, as in PEFT's comparison.

    Args:
        rows: Token ids of each row.
        end: Id of the end token.
        device: Device of the tensors.

    Returns:
        `input_ids`, `attention_mask` and `labels`, int64 [rows, longest row]. The labels of padding are -100.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([row + [end] * (longest - len(row)) for row in rows])
    position, lengths = torch.arange(longest), torch.tensor([[len(row)] for row in rows])
    batch = {
        "input_ids": ids,
        "attention_mask": (position < lengths).long(),
        "labels": ids.masked_fill(position > lengths, -100),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


class Trainer:
    """One training, with what is needed to stop and to go on.

    Args:
        model: The model. The parameters that require gradients are trained.
        rows: Token ids of at least `max_steps` × `batch_size` rows.
        end: Id of the end token.
        params: How to train.
        memory: Reads the memory after each step.

    Attributes:
        progress: What is done so far.
    """

    def __init__(self, model, rows: list[list[int]], end: int, params: TrainingParams, memory: Memory) -> None:
        self.model, self.end, self.params, self.memory = model, end, params, memory
        self.batches = list(batches(rows, params.batch_size))[: params.max_steps]
        self.trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), **params.optimizer_kwargs)
        self.schedule = None
        if params.lr_scheduler == "cosine":
            self.schedule = get_cosine_schedule_with_warmup(
                self.optimizer, int(WARM_UP * params.max_steps), params.max_steps
            )
        self.progress = Progress()

    def run(self, clock: Clock, validate: Callable[[Clock], float], save: Callable[[], None] = lambda: None) -> None:
        """Train to the last step.

        Args:
            clock: Measures the time, and has the limit.
            validate: Returns the accuracy on the validation set. It is called every `eval_steps` steps.
            save: Saves a checkpoint. It is called before the time limit, and after each validation if a checkpoint is
                small.

        Raises:
            OutOfTime: The time limit is near; a checkpoint is saved.
        """
        progress = self.progress
        self.model.train()
        try:
            while True:
                if self._is_due():
                    self._validate(clock, validate)
                    if self.is_small:
                        save()
                if progress.step >= self.params.max_steps:
                    return
                clock.check(self._reserve())
                with clock.part("training"):
                    self.step(self.batches[progress.step])
        except OutOfTime:
            save()
            raise

    def _is_due(self) -> bool:
        """Whether a validation comes next."""
        step, done = self.progress.step, self.progress.metrics
        return step > 0 and step % self.params.eval_steps == 0 and not (done and done[-1]["step"] == step)

    def _reserve(self) -> float:
        """Seconds that the next step and a checkpoint may take."""
        return 2 * max(self.progress.durations[-100:], default=0.0) + self.saving

    @property
    def is_small(self) -> bool:
        """Whether a checkpoint takes so little time that it is saved more often than needed."""
        return self.bytes_of_checkpoint < SMALL

    @property
    def saving(self) -> float:
        """Seconds that a checkpoint takes at most."""
        return 2 + self.bytes_of_checkpoint / DISK

    @property
    def bytes_of_checkpoint(self) -> int:
        """Size of a checkpoint: the trained weights, and AdamW's two numbers for each."""
        return 3 * sum(each.numel() * each.element_size() for each in self.trained.values())

    def step(self, rows: list[list[int]]) -> None:
        """Make one training step."""
        start, progress, params = time.perf_counter(), self.progress, self.params
        batch = tensors(rows, self.end, self.model.device)
        self.optimizer.zero_grad()
        loss = self.model(**batch, num_items_in_batch=batch["attention_mask"].sum().item()).loss
        number = loss.item()
        if not math.isfinite(number):
            raise FloatingPointError(f"the loss of step {progress.step + 1} is {number}: lower the learning rate")
        loss.backward()
        if params.grad_norm_clip:
            torch.nn.utils.clip_grad_norm_(self.trained.values(), params.grad_norm_clip)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        progress.losses.append(number)
        progress.tokens.append(sum(map(len, rows)) + len(rows))
        progress.durations.append(time.perf_counter() - start)
        progress.step += 1
        self.memory.note()
        if self.memory.is_cuda and progress.step % EMPTY_CACHE_STEPS == 0:
            torch.cuda.empty_cache()

    def _validate(self, clock: Clock, validate: Callable[[Clock], float]) -> None:
        progress, last, start = self.progress, self.params.eval_steps, time.perf_counter()
        accuracy = validate(clock)
        self.model.train()
        seconds = sum(progress.durations[-last:])
        progress.metrics.append(
            {
                "step": progress.step,
                "valid accuracy": accuracy,
                "train loss": self.mean_loss(),
                "train samples": self.samples,
                "train time": seconds,
                "eval time": time.perf_counter() - start,
                "tokens / sec": sum(progress.tokens[-last:]) / seconds,
                "mem reserved avg": sum(self.memory.log[-last:]) / last,
            }
        )

    def mean_loss(self) -> float:
        """Mean of the losses of the last `eval_steps` steps."""
        last = self.progress.losses[-self.params.eval_steps :]
        return sum(last) / len(last)

    @property
    def samples(self) -> int:
        """Number of rows that were trained on."""
        return sum(map(len, self.batches[: self.progress.step]))

    def state(self) -> dict[str, Any]:
        """The checkpoint: trained weights, optimizer, schedule, random numbers and progress."""
        return {
            "trained": {name: each.detach() for name, each in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule and self.schedule.state_dict(),
            "random": [torch.get_rng_state(), torch.cuda.get_rng_state_all() if self.memory.is_cuda else []],
            "progress": vars(self.progress),
            "memory": self.memory.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, whose tensors are on the CPU. AdamW keeps its number of steps there.

        Raises:
            ValueError: The checkpoint trains other parameters.
        """
        if state["trained"].keys() != self.trained.keys():
            raise ValueError("the checkpoint has other trained parameters: delete the run's folder to start again")
        with torch.no_grad():
            for name, each in self.trained.items():
                each.copy_(state["trained"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"][0])
        if self.memory.is_cuda:
            torch.cuda.set_rng_state_all(state["random"][1])
        self.progress = Progress(**state["progress"])
        self.memory.restore(state["memory"])
