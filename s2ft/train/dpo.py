"""Train an attached model on preferences by TRL's DPOTrainer, and save its adapter."""

import logging
from pathlib import Path

from s2ft.train.options import RunOptions
from s2ft.train.output import RunFolder
from s2ft.train.sft import Finetuned, callbacks_of, check_dtype, check_packages_of_run, log_length, run_trainer

logger = logging.getLogger(__name__)


def dpo(
    model,
    tokenizer,
    train,
    arguments,
    folder: RunFolder,
    *,
    options: RunOptions | None = None,
    resume: bool | Path = False,
    held_out=None,
    meter=None,
) -> Finetuned:
    """Train the attached adapter of a model by TRL's DPOTrainer, and save it.

    The reference model is the model itself without its adapter: no second model is loaded.

    Args:
        model: A causal language model with a trainable adapter.
        tokenizer: The model's tokenizer.
        train: Pairs of token rows, see :func:`s2ft.text.pairs.encode_pairs`.
        arguments: The DPOArguments of the run.
        folder: The output folder. The adapter is saved to `folder.adapter`.
        options: Options that TRL's arguments do not have.
        resume: Continue from the newest valid checkpoint, or from the start if there is none. A path names another
            checkpoint of the run.
        meter: A :class:`~s2ft.train.forgetting.ForgettingMeter`, or None.
        held_out: Pairs to evaluate on, or None.

    Returns:
        The loss, the time and the folder of the adapter.

    Raises:
        ValueError: The arguments do not fit the data, the model or the installed packages.
        MissingPackages: A package that the run needs is not installed.
    """
    from s2ft.train.rl_trainers import DPORunTrainer

    options = options or RunOptions()
    check_packages_of_run(arguments)
    check_dtype(model, arguments)
    trainer = DPORunTrainer(
        model,
        arguments,
        train,
        tokenizer=tokenizer,
        held_out=held_out,
        callbacks=callbacks_of(arguments, folder, options),
    )
    if trainer.is_world_process_zero():
        log_length(trainer.args, len(train))
    return run_trainer(trainer, model, arguments, folder, resume, meter)
