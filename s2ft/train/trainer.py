"""A Trainer of transformers whose checkpoints are safe against interrupts.

The Trainers of transformers and TRL can save and resume attached models, see s2ft/attached/saving.py.
:class:`AdapterCheckpoints` adds three things: a checkpoint is written to a temporary folder and renamed, its files are
checked before a run resumes from it, and a damaged checkpoint is skipped in favour of the newest valid one.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from s2ft.packages import check_packages

# ruff: noqa: E402 - the packages are checked before they are imported
check_packages("s2ft.train.trainer")  # Python's own error would not name the package to install


import torch
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from s2ft.attached.loading import restore_adapter
from s2ft.attached.mounting import set_rounding
from s2ft.attached.record import check_sentence_model, find_record, record_of, unwrapped
from s2ft.attached.saving import gather_trained
from s2ft.distributed import all_ranks, run_on_ranks, wait_for_ranks
from s2ft.model.running import replaced
from s2ft.sync.trl_trainers import check_sends_slices
from s2ft.train import optimizer_state
from s2ft.train.output import UNFINISHED, best_checkpoint, damage, move_into_place, newest_valid, ranks_of

logger = logging.getLogger(__name__)


class AdapterCheckpoints:
    """Mixin for Trainers whose checkpoints contain the adapter instead of the model, and survive interrupts.

    Put it before the Trainer class: ``class Trainer(AdapterCheckpoints, SFTTrainer): pass``. The Trainer saves the
    optimizer, the schedule and the random states as usual. Checkpoints are written to a temporary folder, checksummed
    and renamed.

    Args:
        *args: The arguments of the Trainer. The model must have a trainable adapter.
        **options: The keyword arguments of the Trainer.

    Raises:
        ValueError: No adapter of the model is trainable.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> from s2ft.train.trainer import AdapterCheckpoints
        >>> class MyTrainer(AdapterCheckpoints, Trainer): ...
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> rows = [{"input_ids": ids, "labels": ids} for ids in input_ids]
        >>> options = dict(max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
        >>> output = MyTrainer(model, TrainingArguments("run", **options), train_dataset=rows).train()
        {'train_runtime': ...}
        >>> output.global_step
        1
    """

    _temporary: Path | None = None  # the folder in which a checkpoint is being written

    def __init__(self, *args: Any, **options: Any) -> None:
        check_sends_slices(type(self), args, options)
        with _optimizer_of_split_model(*args, **options) as only_model:
            super().__init__(*args, **options)
        self.args.save_only_model = only_model  # a trainer may have made a copy of the arguments
        model = self.accelerator.unwrap_model(self.model)
        if record_of(unwrapped(model)).trainable is None:
            raise ValueError(
                "no adapter of this model is trainable: call s2ft.attach, or s2ft.load_adapter with trainable=True"
            )
        check_sentence_model(model)
        if any(mount.layer.rounding is not None for mount in record_of(unwrapped(model)).mounts.values()):
            self.add_callback(GradualRounding(model))
        if self.is_deepspeed_enabled:  # its checkpoints omit the base, and it would raise for missing keys
            model.register_load_state_dict_post_hook(_ignore_missing_base)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> TrainOutput:
        """Train the adapter.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the newest valid one in `args.output_dir`. A
                damaged checkpoint is reported and skipped.
            *args: Further arguments of the Trainer's method.
            **options: Further keyword arguments of the Trainer's method.

        Returns:
            The TrainOutput of the Trainer.

        Raises:
            ValueError: There is no valid checkpoint, or the given one is damaged.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_valid(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"there is no valid checkpoint in {self.args.output_dir} to resume from")
        elif resume_from_checkpoint:
            wrong = damage(Path(resume_from_checkpoint))
            if wrong:
                raise ValueError(f"checkpoint {resume_from_checkpoint} is damaged: {wrong}")
        if resume_from_checkpoint and self.is_deepspeed_enabled:  # it loads its own checkpoint without our checks
            self._load_from_checkpoint(resume_from_checkpoint)
        if self.args.should_save:  # an interrupted run may have left it; no rank writes before the first step
            shutil.rmtree(Path(self.args.output_dir) / UNFINISHED, ignore_errors=True)
        try:
            return super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None, *args, **options)
        finally:
            model = self.accelerator.unwrap_model(self.model)
            if find_record(unwrapped(model)) is not None:  # it may have been merged
                set_rounding(model, 1.0)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Evaluate what the base's files can hold, whatever the training computes with at this moment.

        Args:
            *args: The arguments of the Trainer's method.
            **options: Its keyword arguments.

        Returns:
            The metrics of the Trainer.
        """
        with fully_rounded(self.accelerator.unwrap_model(self.model)):
            return super().evaluate(*args, **options)

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._temporary is None else str(self._temporary)

    def _determine_best_metric(self, metrics, trial):
        """Whether a checkpoint is written with save_strategy best: also if the run stops here.

        An evaluation that failed has no metrics.
        """
        return bool(metrics) and super()._determine_best_metric(metrics, trial) or self.control.should_save

    def _push_from_checkpoint(self, checkpoint_folder):
        """Upload nothing before the end: the Trainer would take a part of the adapter from an unfinished folder."""

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial))
        self._temporary = folder / UNFINISHED
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._temporary = None
        written = folder / UNFINISHED / f"checkpoint-{self.state.global_step}"
        if self.state.best_model_checkpoint == str(written):  # the temporary folder's name
            self.state.best_model_checkpoint = str(folder / written.name)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        ranks = all_ranks()
        wait_for_ranks("writing a checkpoint", ranks)  # until each rank has written its random state
        keep, best = self.args.save_total_limit or 0, best_checkpoint(self.state, folder)
        move = partial(move_into_place, written, folder, keep, best)
        run_on_ranks("moving a checkpoint into place", ranks, self.args.should_save, move)

    def _init_training_state(self, *args, **options):
        """Find the best checkpoint again if the run's folder was moved since, or is spelled in another way."""
        found = super()._init_training_state(*args, **options)
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_metric is not None and self.state.best_model_checkpoint is None and best.is_dir():
            self.state.best_model_checkpoint = str(best)
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Load the adapter with the checks of s2ft.load_adapter, including that of the base model."""
        restore_adapter(self.accelerator.unwrap_model(self.model if model is None else model), resume_from_checkpoint)

    # ---- the same files for any number of ranks -----------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir):
        """Save the schedule and the complete state of the optimizer, which any number of ranks can load."""
        engine = self.model_wrapped if self.is_deepspeed_enabled else None
        if engine is None:
            state = optimizer_state.gather_state(self.optimizer, self.model)
        elif hasattr(Trainer, "_prepare_for_training") and optimizer_state.is_zero(engine):  # without DeepSpeed's own
            state = optimizer_state.gather_zero_state(engine)
        else:
            state = None
            engine.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            if state is not None:
                torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint):
        state = _saved_state(checkpoint)
        if state is None:  # of a plain Trainer
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        order = (
            optimizer_state.load_zero_state(self.model_wrapped, state)
            if self.is_deepspeed_enabled
            else optimizer_state.load_state(self.optimizer, self.model, state)
        )
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        optimizer_state.load_schedule(self.lr_scheduler, schedule, order)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Prepare as the Trainer does, but let no DeepSpeed look for its own checkpoint where there is none."""
        own = self.is_deepspeed_enabled and resume_from_checkpoint and _saved_state(resume_from_checkpoint) is not None
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None if own else resume_from_checkpoint)
        if own:
            self._load_from_checkpoint(resume_from_checkpoint)  # again, into the exact copies of the optimizer
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_rng_state(self, checkpoint):
        """Load this rank's random states. A checkpoint of another number of ranks has none for this one."""
        if checkpoint is None or ranks_of(Path(checkpoint)) in (0, self.args.world_size):
            super()._load_rng_state(checkpoint)
            return
        if self.args.should_log:
            logger.warning(
                "%s was written by %d ranks and is continued on %d: the updates are the same within rounding if batch "
                "size times accumulation times ranks is; random numbers, such as those of dropout, are new ones",
                checkpoint,
                ranks_of(Path(checkpoint)),
                self.args.world_size,
            )
        set_seed(self.args.seed + self.state.global_step * self.args.world_size + self.args.process_index)

    # ---- FSDP2 and DeepSpeed: here Trainer would also gather and write the base ---------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter. Each rank must call this method.

        Args:
            output_dir: The folder. None is `args.output_dir`.
        """
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled or _loaded_in_parts(self.model)):
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=gather_trained(self.accelerator.unwrap_model(self.model)))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_best_model(self):
        self._load_from_checkpoint(best_checkpoint(self.state, self.args.output_dir))


def _loaded_in_parts(model: Any) -> bool:
    """Whether transformers has split the weights over ranks while it loaded them (DistributedConfig)."""
    return getattr(model, "is_distributed_loading_by_transformers", False)


class GradualRounding(TrainerCallback):
    """Lets a model with a codec begin with base + delta and end with what the base's file can hold.

    SmolLM2 in Q4_1 learns so as much as without rounding (`python bench/quantized.py`, docs/benchmarks.md).
    """

    FIRST, LAST = 0.3, 0.7  # shares of the updates between which the rounding grows

    def __init__(self, model: Any) -> None:
        """Set the rounding of this model."""
        self.model = model

    def on_train_begin(self, args, state, control, **kwargs):
        self._set(state.global_step / max(1, state.max_steps))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):  # the step writes the weights of the next forward
        self._set((state.global_step + 1) / state.max_steps)

    def _set(self, done: float) -> None:
        set_rounding(self.model, min(max((done - self.FIRST) / (self.LAST - self.FIRST), 0.0), 1.0))


@contextmanager
def fully_rounded(model: Any) -> Iterator[None]:
    """Inside, a model with a codec computes with what the base's file can hold."""
    record = find_record(unwrapped(model))  # None: it was merged
    mounts = [] if record is None else record.mounts.values()
    share = next((mount.layer.rounding.share for mount in mounts if mount.layer.rounding is not None), 1.0)
    if share == 1:
        yield
        return
    set_rounding(model, 1.0)
    try:
        yield
    finally:
        set_rounding(model, share)


@contextmanager
def _optimizer_of_split_model(model: Any = None, args: Any = None, *_: Any, **options: Any) -> Iterator[bool]:
    """Inside, a Trainer of a split model can be made although its checkpoints shall contain the optimizer.

    transformers refuses this because its own checkpoints can't contain it. Those of this file can.

    Returns:
        A context manager that yields whether checkpoints shall contain the model alone.
    """
    only_model = args is not None and args.save_only_model
    is_refused = args is not None and not only_model and _loaded_in_parts(model)
    with replaced(args, save_only_model=True) if is_refused else nullcontext():
        yield only_model


def _saved_state(checkpoint) -> dict[str, Any] | None:
    """Read the state of the optimizer in a checkpoint; None if s2ft did not write it."""
    file = Path(checkpoint or "") / OPTIMIZER_NAME
    if not checkpoint or not file.is_file():
        return None
    state = torch.load(file, map_location="cpu", weights_only=True)
    return state if optimizer_state.NAMES in state else None


def _ignore_missing_base(model, incompatible) -> None:
    """Keep only the missing keys of trained parameters."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key in trained]


class S2FTTrainer(AdapterCheckpoints, Trainer):
    """The Trainer of transformers with :class:`AdapterCheckpoints`.

    Args:
        *args: The arguments of transformers' Trainer. The model must have a trainable adapter.
        **options: The keyword arguments of transformers' Trainer.

    Raises:
        ValueError: No adapter of the model is trainable.

    Example:
        >>> from transformers import TrainingArguments
        >>> from s2ft.train.trainer import S2FTTrainer
        >>> rows = [{"input_ids": ids, "labels": ids} for ids in input_ids]
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> options = dict(max_steps=2, save_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
        >>> trainer = S2FTTrainer(model, TrainingArguments("run", **options), train_dataset=rows)
        >>> trainer.train()
        {'train_runtime': ...}
        TrainOutput(global_step=2, ...)
        >>> _ = s2ft.load_adapter(s2ft.detach(model), "run/checkpoint-2")
    """
