"""Log the memory that a run needs before it starts."""

import copy
import logging
from functools import partial

import torch
from torch import nn
from transformers import Trainer

import s2ft
from s2ft.distributed import without_zero_init
from s2ft.text.prompts import pad_id
from s2ft.train.batching import Batching, choose_batching, row_lengths, short_row
from s2ft.train.loading import plain_kernels
from s2ft.train.loss import loss_in_chunks, why_not_chunked
from s2ft.train.options import RunOptions
from s2ft.train.parallel import devices_of, is_spread, strategy_of_run
from s2ft.train.sft import is_checkpointed
from s2ft.train.trainers import needs_trl_loss

logger = logging.getLogger(__name__)


def log_memory(model, config, train, arguments, options: RunOptions, tokenizer) -> None:
    """Log the memory that a step on the longest rows needs on one device, with a warning if it is more than is free.

    Args:
        model: The model without an adapter.
        config: The S2FTConfig of the run.
        train: The token rows of the training data.
        arguments: The SFTArguments of the run.
        options: Options that TRL's arguments do not have.
        tokenizer: The model's tokenizer.
    """
    if devices_of(arguments).splits_rows:
        logger.info("memory was not estimated: each row is divided among devices")
        return
    trl_loss, trial = needs_trl_loss(arguments), None
    if is_spread(model):  # the other devices do not call this, so the model is neither run nor read
        model, trial = plain_copy(model), lambda *arguments: ""
    batching = choose_batching(model, pad_id(tokenizer), train, arguments, trl_loss, trial)
    chunked = options.chunked_loss and not arguments.torch_compile and not trl_loss
    longest, short = longest_batch(train, arguments, batching), batching.collator([short_row(train)])
    log_memory_of_batch(model, config, longest, arguments, chunked, short)


def log_memory_of_batch(model, config, batch: dict, arguments, chunked: bool, short: dict | None = None) -> None:
    """Log the memory that a step on a batch needs on one device, with a warning if it is more than is free.

    Args:
        model: The model without an adapter.
        config: The S2FTConfig of the run.
        batch: The largest batch of the run.
        arguments: The arguments of the trainer.
        chunked: Whether the loss is computed without keeping all logits, if the model allows it.
        short: A batch on which the model is run to find out whether it allows it. None is `batch`.
    """
    try:
        strategy = strategy_of_run(arguments)
        if strategy is not None and strategy.shards_weights:
            chunked = False
        chunked = chunked and not why_not_chunked(model, batch if short is None else short)
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        found = s2ft.estimate(
            model,
            config,
            example=batch,
            optimizer=partial(kind, **options),
            loss=loss_in_chunks if chunked else None,
            gradient_checkpointing=is_checkpointed(arguments),
            accumulation=arguments.gradient_accumulation_steps,
            autocast=torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None,
            strategy=strategy,
            devices=None if strategy is None else devices_of(arguments).count,
        )
    except Exception as error:  # a model may fail on tensors without data, and the run does not need the estimate
        logger.info("memory was not estimated: %s", str(error).split("\n")[0] or type(error).__name__)
        return
    logger.log(logging.WARNING if found.fits is False else logging.INFO, "%s", found.lines())


def longest_batch(train, arguments, batching: Batching) -> dict:
    """Return the largest batch that the training may have: its longest rows, or full packs of labelled tokens.

    Args:
        train: The token rows, a Dataset.
        arguments: The SFTArguments.
        batching: How rows become batches.
    """
    rows = arguments.per_device_train_batch_size
    if batching.packed:
        full = list(range(arguments.max_length))  # the values do not matter
        return batching.collator([{"input_ids": full, "labels": full}] * rows)
    lengths = row_lengths(train)
    return batching.collator([train[row] for row in sorted(range(len(train)), key=lengths.__getitem__)[-rows:]])


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a plain model of the same config and dtype on the meta device.

    Args:
        model: A model of transformers, attached or not. Its weights may be spread over devices.
    """
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with plain_kernels(), torch.device("meta"), without_zero_init():
        return type(model)._from_config(config).to(model.dtype)
