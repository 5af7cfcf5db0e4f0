"""transformers' Trainer for a model with an attached adapter, made safe against interrupts.

Trainers of transformers and TRL as they are save and resume attached models, see s2ft/adapter/pretrained.py. What
:class:`AdapterCheckpoints` adds: a checkpoint is written beside and renamed, its files are checked before it is resumed
from, and the newest whole one is taken.
"""

import shutil
from pathlib import Path

from s2ft.packages import check_packages

check_packages("s2ft.train.trainer")  # before Python's own error, which does not say what to install

import torch
from accelerate.utils import save_fsdp_optimizer
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from s2ft.adapter import restore_adapter
from s2ft.adapter.saving import gathered
from s2ft.attached.record import attachment_of
from s2ft.train.checkpoints import UNFINISHED, damage, finish, last_whole


class AdapterCheckpoints:
    """To be put before a Trainer: ``class Mine(AdapterCheckpoints, SFTTrainer): pass``.

    Checkpoints hold the deltas, not the model; optimizer, schedule and random states are the Trainer's.
    """

    _beside: Path | None = None  # where a checkpoint is being written

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        model = self.accelerator.unwrap_model(self.model)
        if attachment_of(model).name is None:
            raise ValueError("no adapter of this model is trainable: s2ft.attach, or load_adapter with trainable=True")
        if self.is_deepspeed_enabled:  # its checkpoints hold no base here, and it would miss it
            model.register_load_state_dict_post_hook(_miss_no_base)

    def train(self, resume_from_checkpoint=None, *args, **options):
        """As Trainer's. resume_from_checkpoint: a folder, or True for the newest whole one in output_dir.

        Raises: ValueError where there is none, or the one named is damaged.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"there is no whole checkpoint in {self.args.output_dir} to resume from")
        elif resume_from_checkpoint:
            wrong = damage(Path(resume_from_checkpoint))
            if wrong:
                raise ValueError(f"checkpoint {resume_from_checkpoint} is damaged: {wrong}")
        if resume_from_checkpoint and self.is_deepspeed_enabled:  # which then loads its own, and checks nothing
            self._load_from_checkpoint(resume_from_checkpoint)
        if self.args.should_save:  # what an interrupt left; no rank writes before the first step has joined them all
            shutil.rmtree(Path(self.args.output_dir) / UNFINISHED, ignore_errors=True)
        return super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None, *args, **options)

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._beside is None else str(self._beside)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial))
        self._beside = folder / UNFINISHED
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._beside = None
        written = folder / UNFINISHED / f"checkpoint-{self.state.global_step}"
        self._rename_best(written, folder)
        self.accelerator.wait_for_everyone()  # every rank has written its random state
        if self.args.should_save:
            finish(
                written,
                folder,
                self.args.save_total_limit or 0,
                Path(self.state.best_model_checkpoint) if self.state.best_model_checkpoint else None,
            )
        self.accelerator.wait_for_everyone()

    def _rename_best(self, written: Path, folder: Path) -> None:
        """Where this checkpoint is the best so far its state should not name the folder beside."""
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(folder / written.name)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """With the checks of load_adapter, of the base too."""
        restore_adapter(self.accelerator.unwrap_model(self.model if model is None else model), resume_from_checkpoint)

    # ---- FSDP2 and DeepSpeed, where Trainer would gather and write the base as well -----------------------

    @property
    def _sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def save_model(self, output_dir=None, _internal_call=False):
        """As Trainer's; every rank must call it."""
        if not self._sharded:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=gathered(self.accelerator.unwrap_model(self.model)))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        else:
            save_fsdp_optimizer(
                self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
            )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_best_model(self):
        if self._sharded:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


def _miss_no_base(model, incompatible) -> None:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key in trained]


class S2FTTrainer(AdapterCheckpoints, Trainer):
    """Trainer with :class:`AdapterCheckpoints`."""
