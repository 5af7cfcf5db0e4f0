"""Log the memory that a run needs before it starts."""

import logging
from collections.abc import Sequence
from functools import partial

import torch

import s2ft
from s2ft.text.encoding import AnswerCollator, TokenRow
from s2ft.train.loss import chunked_loss, why_not_chunked
from s2ft.train.options import TrainOptions

logger = logging.getLogger(__name__)


def log_memory(model, config, rows: Sequence[TokenRow], options: TrainOptions, arguments, pad: int) -> None:
    """Log the memory that a step on the longest rows needs on one device, with a warning if it is more than is free.

    Args:
        model: The model without an adapter.
        config: The S2FTConfig of the run.
        rows: The rows of the training data.
        options: The options of the run.
        arguments: The Trainer's arguments, which determine the optimizer.
        pad: The token id to pad with.
    """
    collate = AnswerCollator(pad)
    longest = collate(sorted(rows, key=len)[-options.micro_batch_size :])
    try:
        chunked = options.chunked_loss and not options.compile and not why_not_chunked(model, collate(list(rows[:1])))
        found = s2ft.estimate(
            model,
            config,
            example=longest,
            optimizer=_optimizer(arguments),
            loss=_loss if chunked else None,
            gradient_checkpointing=options.gradient_checkpointing,
            accumulation=arguments.gradient_accumulation_steps,
            autocast=None if options.autocast == "none" else getattr(torch, options.autocast),
        )
    except Exception as error:  # a model may fail on tensors without data, and the run does not need the estimate
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
