"""Train any method by the same trainer, on the same batches and with the same loss."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import s2ft
from bench.experiments.selections import choose
from s2ft.selection import Selection
from s2ft.train.arguments import SFTArguments
from s2ft.train.trainers import RunMethods
from s2ft.train.tuners import Prepared, TrainedRun, prepare, train_rows


def arguments_of(settings: dict[str, Any], folder: str | Path) -> SFTArguments:
    """Return the arguments of the trainer: `training` of the settings has their names and values.

    Full fine-tuning keeps float32 weights and computes in the model's dtype: updates of bfloat16 weights would be lost
    by rounding.
    """
    full = settings["method"] == "full" and settings["dtype"] == "bfloat16"
    return SFTArguments(
        output_dir=str(folder),
        learning_rate=settings["rate"],
        seed=settings["seed"],
        save_steps=0,
        bf16=full,
        **settings["training"],
    )


def train(
    prepared: Prepared, tokenizer: Any, rows: Any, arguments: SFTArguments, *, held_out: Any = None, best: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainedRun:  # fmt: skip
    """Train a prepared model by :func:`s2ft.train.tuners.train_rows`.

    Args:
        prepared: The model, as :func:`s2ft.train.tuners.prepare` returns it.
        tokenizer: The model's tokenizer.
        rows: The token rows, a Dataset with the columns input_ids and labels.
        arguments: The arguments of the run.
        held_out: Token rows to evaluate on, or None.
        best: Whether the model ends with the parameters of its best evaluation.
        callbacks: More callbacks of the Trainer.

    Returns:
        Times and losses.

    Raises:
        ValueError: The arguments do not fit the data or the model.
    """
    keeper = KeepBest(prepared.model)
    callbacks = [*([keeper] if best else []), *callbacks]
    run = train_rows(prepared, tokenizer, rows, arguments, held_out=held_out, callbacks=callbacks)
    if not best:
        return run
    keeper.restore()
    return replace(run, best_step=keeper.step)


class KeepBest(TrainerCallback):
    """Keeps a copy of the trained parameters at the evaluation with the smallest loss, in the memory of the CPU.

    Checkpoints of the Trainer would hold the optimizer too, and methods differ in what they write into one.

    Args:
        model: The model whose trainable parameters are kept.

    Attributes:
        step: The step of that evaluation, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.step, self._loss = model, None, float("inf")
        self._kept: dict[str, Tensor] = {}

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        loss = (metrics or {}).get("eval_loss", float("nan"))
        if loss < self._loss:  # never for nan
            self._loss, self.step = loss, state.global_step
            trained = [(name, one) for name, one in self.model.named_parameters() if one.requires_grad]
            self._kept = {name: one.detach().to("cpu", copy=True) for name, one in trained}

    @torch.no_grad()
    def restore(self) -> None:
        """Put the kept values into the model, bit for bit."""
        for name, parameter in self.model.named_parameters():
            if name in self._kept:
                parameter.copy_(self._kept[name])


# ---- units chosen anew while training --------------------------------------------------------------------


def train_in_phases(
    model: nn.Module, tokenizer: Any, rows: Any, arguments: SFTArguments, config: s2ft.S2FTConfig, phases: int,
    recent: int,
) -> tuple[Prepared, TrainedRun]:  # fmt: skip
    """Train in phases, and choose the units with the largest gradients on the last rows anew for each.

    Source: LoSiA (arXiv 2507.04487) and LIFT (arXiv 2506.00772). The slice of a phase is merged into the weights, bit
    for bit, and the next one attaches to the merged model. The optimizer starts anew, because its state belongs to the
    old units; the schedule goes on. Rows are used in their order, and again from the start if there are too few.

    Args:
        model: The base, which then has the trained weights.
        tokenizer: Its tokenizer.
        rows: The token rows.
        arguments: The arguments of the whole run, with `max_steps`.
        config: What each phase trains.
        phases: Number of phases.
        recent: Number of rows by which the units are chosen: the first ones, then the last ones of the phase before.

    Returns:
        The model with the number of parameters that any phase trained, and the measurements of the whole run.
    """
    each, total = arguments.per_device_train_batch_size, arguments.max_steps
    steps = [total // phases + (number < total % phases) for number in range(phases)]
    known, done, parts, union = rows.select(range(min(recent, len(rows)))), 0, [], {}
    rate = _schedule(arguments)
    for count in steps:
        batches = [{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")} for row in known]
        units = choose(model, "gradient", config, batches)
        for name, chosen in units.units.items():
            union.setdefault(name, set()).update(chosen.tolist())
        prepared = prepare(model, "s2ft", {"d_ratio": 0.0, "units": units.to_dict()})
        part = rows.select([number % len(rows) for number in range(done * each, (done + count) * each)])
        one = copy.deepcopy(arguments)
        one.max_steps, one.warmup_steps = count, 0  # the whole run's schedule replaces its own
        parts.append(train(prepared, tokenizer, part, one, callbacks=[_ContinuedSchedule(rate, done)]))
        s2ft.merge(model)
        known, done = part.select(range(max(0, len(part) - recent), len(part))), done + count
    every = Selection({name: torch.tensor(sorted(chosen)) for name, chosen in union.items()})
    size = s2ft.plan(model, s2ft.S2FTConfig(units=every)).trainable
    seconds = sum(part.seconds for part in parts)
    return Prepared(model, model, "s2ft", dict(config.ratios), size), TrainedRun(
        [loss for part in parts for loss in part.losses],
        seconds,
        median(part.seconds_per_step for part in parts),
        sum(part.tokens_per_second * part.seconds for part in parts) / seconds,
        total,
    )


def _schedule(arguments: SFTArguments) -> Callable[[int], float]:
    """Return the factor of the learning rate at each update of the whole run."""
    trainer = object.__new__(RunMethods)  # its schedule alone is used
    trainer.args, trainer.lr_scheduler = arguments, None
    trainer.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return trainer.create_scheduler(arguments.max_steps).lr_lambdas[0]


class _ContinuedSchedule(TrainerCallback):
    """Lets a phase go on in the whole run's schedule, after so many updates."""

    def __init__(self, rate: Callable[[int], float], done: int) -> None:
        self.rate, self.done = rate, done

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        inner = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate wraps it
        inner.lr_lambdas = [lambda step: self.rate(self.done + step)] * len(inner.base_lrs)
        for group, first in zip(inner.optimizer.param_groups, inner.base_lrs):
            group["lr"] = first * self.rate(self.done)
        inner._last_lr = [group["lr"] for group in inner.optimizer.param_groups]


@contextmanager
def evaluating(prepared: Prepared) -> Iterator[nn.Module]:
    """The trained model in evaluation mode. DoRA computes the norms of all weights for each token, or keeps them."""
    model = prepared.model.eval()
    if prepared.method != "dora":
        yield model
        return
    from peft.helpers import DoraCaching

    with DoraCaching():
        yield model


def merged(prepared: Prepared) -> nn.Module:
    """The base with what was trained in its weights."""
    if prepared.method == "full":
        return prepared.model
    return s2ft.merge(prepared.model) if prepared.method == "s2ft" else prepared.model.merge_and_unload()
