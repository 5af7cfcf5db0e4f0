"""transformers' Trainer for a model with an attached adapter: checkpoints hold the adapter alone."""
import os

import s2ft
from s2ft.adapter import restore_adapter
from s2ft.train.models import base_info
from s2ft.train.output import ADAPTER
from transformers import Trainer


class S2FTTrainer(Trainer):
    """Saves and restores the deltas, not the model; optimizer, scheduler and random states are Trainer's."""

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:   # the first rank
            directory = os.path.join(output_dir or self.args.output_dir, ADAPTER)
            model = self.accelerator.unwrap_model(self.model)
            s2ft.save_adapter(model, directory, info=base_info(model))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        restore_adapter(model, os.path.join(resume_from_checkpoint, ADAPTER))
