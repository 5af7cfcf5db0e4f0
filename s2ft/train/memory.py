"""What memory a run will take, said before it starts."""

import logging
from collections.abc import Sequence
from functools import partial

import torch

import s2ft
from s2ft.text.encoding import AnswerCollator, TokenRow
from s2ft.train.loss import chunked_loss, why_not
from s2ft.train.options import TrainOptions

logger = logging.getLogger(__name__)


def say_memory(model, config, rows: Sequence[TokenRow], options: TrainOptions, arguments, pad: int) -> None:
    """Log what a step on the longest rows takes on one device, and warn where that is more than is free.

    Args: model: unattached. arguments: of the Trainer, for the optimizer. pad: the token to fill with.
    """
    collate = AnswerCollator(pad)
    longest = collate(sorted(rows, key=len)[-options.micro_batch_size :])
    try:
        fused = options.chunked_loss and not options.compile and not why_not(model, collate(list(rows[:1])))
        found = s2ft.estimate(
            model,
            config,
            example=longest,
            optimizer=_optimizer(arguments),
            loss=_loss if fused else None,
            gradient_checkpointing=options.gradient_checkpointing,
            accumulation=arguments.gradient_accumulation_steps,
            autocast=None if options.autocast == "none" else getattr(torch, options.autocast),
        )
    except Exception as error:  # whatever a model does on tensors without data, the run does not depend on it
        logger.info("memory was not estimated: %s", str(error).split("\n")[0] or type(error).__name__)
        return
    logger.log(logging.WARNING if found.fits is False else logging.INFO, "%s", found.lines())


def _optimizer(arguments):
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return partial(kind, **options)


def _loss(model, inputs):
    with chunked_loss(model):
        return model(**inputs).loss
