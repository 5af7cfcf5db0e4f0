"""Adaptive selection: train in phases, and choose the units anew for each phase.

Source: LoSiA (arXiv 2507.04487), which localizes a sub-network again while it trains, and LIFT (arXiv 2506.00772),
which renews its mask. Here the slice of a phase is merged into the weights, bit for bit, and the next phase attaches to
the merged model with new units. The optimizer's state starts anew, because it belongs to the old units. The schedule of
the learning rate goes on.

The result is one ordinary adapter: its units are all that any phase trained, its delta is trained minus base. It is
larger than the slice of a phase, and both sizes are reported.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

import s2ft
from bench.evidence.selections import choose
from s2ft.adapter.adapter import Adapter, model_info
from s2ft.attached.record import find_attachment
from s2ft.model.coupling import Projection, projections_of
from s2ft.model.delta import Delta
from s2ft.model.fingerprint import fingerprint
from s2ft.model.registry import Found, find_couplings
from s2ft.model.weights import weight_at
from s2ft.ops._effective import effective_units
from s2ft.reproduce.methods import prepare
from s2ft.reproduce.training import Trained, train
from s2ft.selection import Selection
from s2ft.train.held_out import HeldOut
from s2ft.train.output import RunFolder
from s2ft.train.run_trainer import RunMethods


@dataclass(frozen=True)
class Phase:
    """One phase of an adaptive run.

    Attributes:
        steps: Number of updates.
        seconds: Time of the training, with its evaluations.
        choosing: Time of the selection, in seconds.
        trained: Parameters of its slice.
        new: Units that no phase before has trained.
        again: Units that a phase before has trained too.
    """

    steps: int
    seconds: float
    choosing: float
    trained: int
    new: int
    again: int


@dataclass(frozen=True)
class AdaptiveResult:
    """What an adaptive run has trained. The adapter is also active in the model.

    Attributes:
        adapter: One adapter with the units of all phases.
        slice_parameters: The largest number of parameters that were trained at a time. It sets the memory of training.
        union_parameters: Number of parameters of the adapter. It sets the size of the file.
        phases: The phases in order.
        trained: Times, losses and log of the whole run. Its time contains the selections.
    """

    adapter: Adapter
    slice_parameters: int
    union_parameters: int
    phases: list[Phase]
    trained: Trained


def train_adaptively(
    model: nn.Module,
    tokenizer: Any,
    rows: Any,
    arguments: Any,
    config: s2ft.S2FTConfig,
    folder: RunFolder,
    *,
    phases: int = 4,
    selection: str = "gradient",
    recent: int = 16,
    protect: Iterable[Any] | None = None,
    held_out: HeldOut | None = None,
    callbacks: Sequence[Any] = (),
    name: str = "default",
) -> AdaptiveResult:
    """Train a model in phases, each with units of its own choice.

    The rows are trained on in the order given, phase after phase, and from the start again if there are too few. Within
    a phase the trainer orders them. With one phase this is an ordinary run with a calibrated selection.

    Args:
        model: A causal language model of transformers, without adapters, whose weights can be written.
        tokenizer: The model's tokenizer.
        rows: The token rows, a Dataset with the columns input_ids and labels.
        arguments: The SFTArguments of the whole run. Rows are not packed.
        config: What each phase trains, see :func:`bench.evidence.selections.choose`. Its `seed` changes by one from
            phase to phase, so that "random" draws other units.
        folder: Folder of the run; phase p writes its log to phase-p in it.
        phases: Number of phases, at most the number of updates.
        selection: Name of a candidate or a metric that chooses the units.
        recent: Number of rows for it: the last ones of the phase before; for the first phase, the first ones of all.
        protect: Batches for candidates that read protected data. They are read in every phase.
        held_out: Data to evaluate on, or None.
        callbacks: More callbacks of the Trainer.
        name: Name of the adapter.

    Returns:
        The adapter, the sizes and the times.

    Raises:
        ValueError: A phase would have no update, no rows to choose by, or no schedule to continue; or a value does not
            fit the model. The model is unchanged.
        RuntimeError: The adapter would not give the trained weights. The model is unchanged.

    Example:
        >>> found = train_adaptively(model, tokenizer, rows, arguments, s2ft.S2FTConfig(d_ratio=0.01), folder)
        >>> s2ft.save_adapter(model, "my-adapter")
    """
    steps = _steps_by_phase(arguments, len(rows), phases, recent)
    rate = _schedule(arguments, sum(steps))
    protect = None if protect is None else list(protect)
    base = _Base(model, find_couplings(model, config=config))
    ran: list[Phase] = []
    parts: list[Trained] = []
    known = rows.select(range(min(recent, len(rows))))
    with base.restored_on_error():
        for number, part in enumerate(_rows_by_phase(rows, steps, rows_per_update(arguments))):
            start = time.perf_counter()
            units = choose(model, selection, replace(config, seed=config.seed + number), batches_of(known), protect)
            choosing = time.perf_counter() - start
            new = base.keep(units)
            prepared = prepare(model, "s2ft", _options(config, units))
            done = sum(steps[:number])
            one = train(
                prepared,
                tokenizer,
                part,
                _for_phase(arguments, steps[number]),
                RunFolder(folder.path / f"phase-{number}"),
                held_out=held_out,
                callbacks=[_continued(rate, done), *callbacks],
            )
            s2ft.merge(model)
            again = _count(units) - new
            ran.append(Phase(one.steps, one.seconds, choosing, prepared.trainable, new, again))
            parts.append(one)
            known = part.select(range(max(0, len(part) - recent), len(part)))
        adapter = base.adapter(name, config, {"selection": selection, "phases": [asdict(phase) for phase in ran]})
    largest = max(phase.trained for phase in ran)
    return AdaptiveResult(adapter, largest, adapter.parameters, ran, _joined(parts, ran))


# ---- the base --------------------------------------------------------------------------------------------


class _Base:
    """The base values of all units that were trained so far.

    A unit is kept before its first training, when the model still has its base value. So no copy of the model is made.
    """

    def __init__(self, model: nn.Module, found: Found) -> None:
        self.model, self.found = model, found
        self.projections = {projection.name: projection for projection in projections_of(found.couplings)}
        self.fingerprint = fingerprint(model, found.couplings)
        self.units: dict[str, Tensor] = {}  # in ascending order
        self.values: dict[str, Tensor] = {}  # of these units' elements

    def keep(self, selection: Selection) -> int:
        """Keep the base values of units that are not kept yet, and return their number."""
        count = 0
        for name, units in selection.units.items():
            projection = self.projections[name]
            handle = weight_at(self.model, projection)
            if handle.read_only:
                raise ValueError(
                    f"an adaptive run writes into the weights, and {name} can't be written: {handle.read_only}"
                )
            before = self.units.get(name, units[:0])
            both = torch.cat([before, units]).unique()  # ascending
            count += both.numel() - before.numel()
            values = self._read(projection, both)
            if before.numel():  # those may have been trained since
                places = torch.searchsorted(both, before)
                values.index_copy_(projection.dim, _elements(projection, places), self.values[name])
            self.units[name], self.values[name] = both, values
        return count

    def adapter(self, name: str, config: s2ft.S2FTConfig, info: dict[str, Any]) -> Adapter:
        """Put the base back, load an adapter that is trained minus base, and check that it gives the trained weights.

        Raises:
            RuntimeError: A weight differs from the trained one.
        """
        trained = {path: self._read(self.projections[path], units) for path, units in self.units.items()}
        deltas = {path: self._delta(path, values) for path, values in trained.items()}
        selection = Selection(dict(self.units))
        wide = any(delta.values.dtype is torch.float64 for delta in deltas.values())
        of_all = replace(
            s2ft.S2FTConfig(units=selection),
            layout=config.layout,
            delta_dtype="float64" if wide else config.delta_dtype,
            ffn_kernel=config.ffn_kernel,
        )
        couplings = self.found.couplings if self.found.is_custom else None
        info = {**model_info(self.model), "adaptive": info}
        adapter = Adapter(name, of_all, selection, self.fingerprint, deltas, info, couplings)
        self.restore()
        s2ft.load_adapter(self.model, adapter)
        for path, values in trained.items():
            if not torch.equal(self._read(self.projections[path], self.units[path]), values):
                s2ft.detach(self.model)
                raise RuntimeError(f"the adapter does not give the trained weights of {path} bit for bit")
        return s2ft.get_adapter(self.model, name)

    def _delta(self, path: str, trained: Tensor) -> Delta:
        """Return trained minus base, in float64 where base + delta in float32 would not be the trained weight."""
        projection, base = self.projections[path], self.values[path]
        narrow = torch.promote_types(base.dtype, torch.float32)
        values = trained.to(narrow) - base.to(narrow)
        if not torch.equal(effective_units(base, values), trained):
            values = trained.double() - base.double()
        return Delta(projection.dim, projection.elements(self.units[path]), values)

    def restore(self) -> None:
        """Write the base values back."""
        for name, units in self.units.items():
            projection = self.projections[name]
            matrix = weight_at(self.model, projection).matrix
            matrix.index_copy_(projection.dim, projection.elements(units).to(matrix.device), self.values[name])

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Make the model plain again, with the base in its weights, if the body fails."""
        try:
            yield
        except BaseException:
            if find_attachment(self.model) is not None:
                s2ft.detach(self.model)
            self.restore()
            raise

    def _read(self, projection: Projection, units: Tensor) -> Tensor:
        matrix = weight_at(self.model, projection).matrix
        return matrix.index_select(projection.dim, projection.elements(units).to(matrix.device))


def _elements(projection: Projection, units: Tensor) -> Tensor:
    """Return the places of units in a tensor that has nothing but units."""
    return replace(projection, start=0, stride=None, size=None).elements(units)


def _count(selection: Selection) -> int:
    return sum(units.numel() for units in selection.units.values())


def _options(config: s2ft.S2FTConfig, units: Selection) -> dict[str, Any]:
    """Return the options of a phase: the units, and what does not choose units."""
    kept = {name: getattr(config, name) for name in ("layout", "delta_dtype", "ffn_kernel")}
    return {"d_ratio": 0.0, "units": units.to_dict(), **kept}


# ---- phases ----------------------------------------------------------------------------------------------


def rows_per_update(arguments: Any) -> int:
    """Return the number of rows in an update of one process."""
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps


def _steps_by_phase(arguments: Any, count: int, phases: int, recent: int) -> list[int]:
    """Return the number of updates of each phase. The first phases get those that are left over."""
    if arguments.packing:
        raise ValueError("an adaptive run can't say which rows an update has if they are packed: leave packing out")
    for name, value in (("phases", phases), ("recent", recent)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    total = arguments.max_steps
    if total <= 0:
        total = math.ceil(count * arguments.num_train_epochs / rows_per_update(arguments))
    if total < phases:
        raise ValueError(f"the run has {total} updates, so phases must be at most {total}, got {phases}")
    return [total // phases + (number < total % phases) for number in range(phases)]


def _rows_by_phase(rows: Any, steps: list[int], each: int) -> Iterator[Any]:
    """Yield the rows of each phase. They are used in their order, and again from the start if there are too few."""
    if not len(rows):
        raise ValueError("rows is empty: give at least one row")
    numbers = cycle(range(len(rows)))
    for count in steps:
        yield rows.select(list(islice(numbers, count * each)))


def _for_phase(arguments: Any, steps: int) -> Any:
    """Return a copy of the arguments with this number of updates."""
    arguments = copy.deepcopy(arguments)
    arguments.max_steps = steps
    return arguments


def batches_of(rows: Any) -> list[dict[str, Tensor]]:
    """Return token rows as batches of one row, for a calibrated selection."""
    return [{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")} for row in rows]


# ---- the learning rate -----------------------------------------------------------------------------------


def _schedule(arguments: Any, total: int) -> Callable[[int], float]:
    """Return the factor of the learning rate at each update of the whole run.

    Raises:
        ValueError: The schedule is not a function of the update.
    """
    of_the_trainer = RunMethods()
    of_the_trainer.args, of_the_trainer.lr_scheduler = arguments, None
    of_the_trainer.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    whole = of_the_trainer.create_scheduler(total)
    if not isinstance(whole, torch.optim.lr_scheduler.LambdaLR):
        raise ValueError(
            f"lr_scheduler_type {arguments.lr_scheduler_type!r} depends on more than the number of updates, so it "
            "can't go on in a new phase: use linear, cosine, constant, ..."
        )
    return whole.lr_lambdas[0]


def _continued(rate: Callable[[int], float], done: int):
    """Make a callback that lets a phase go on in the whole run's schedule, after `done` updates."""
    from transformers import TrainerCallback

    class ContinuedSchedule(TrainerCallback):
        def on_train_begin(self, args, state, control, lr_scheduler=None, **others):
            inner = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate wraps it
            inner.lr_lambdas = [lambda step: rate(done + step)] * len(inner.base_lrs)
            for group, first in zip(inner.optimizer.param_groups, inner.base_lrs):
                group["lr"] = first * rate(done)
            inner._last_lr = [group["lr"] for group in inner.optimizer.param_groups]

    return ContinuedSchedule()


def _joined(parts: list[Trained], phases: list[Phase]) -> Trained:
    """Return the measurements of all phases as those of one run."""
    seconds = sum(phase.seconds + phase.choosing for phase in phases)
    tokens = sum(part.tokens_per_second * part.seconds for part in parts)
    log, done = [], 0
    for part in parts:
        log += [{**line, "step": line["step"] + done} if "step" in line else line for line in part.log]
        done += part.steps
    return Trained(
        done,
        seconds,
        statistics.median(part.seconds_per_step for part in parts),
        tokens / seconds,
        [loss for part in parts for loss in part.losses],
        log,
    )
