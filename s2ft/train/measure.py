"""The time of a training step of a model with random weights, which takes as long as one with trained weights."""

import contextlib
import statistics
import time

import torch
from torch import nn

import s2ft
from s2ft.config import S2FTConfig
from s2ft.distributed import without_zero_init
from s2ft.train.ratio_table import as_random
from s2ft.train.remedies import loss_in_chunks

STEPS = 3  # measured ones, after one to warm up


def seconds_of_step(
    model: nn.Module,
    config: S2FTConfig,
    batch: int,
    length: int,
    gradient_checkpointing: bool = False,
    chunked_loss: bool = True,
    device: str | None = None,
) -> float:
    """Return the median time of a forward and a backward pass.

    Args:
        model: A model on the meta device. It gets random weights on the device, and an adapter.
        config: What is trained.
        batch: Rows of the pass.
        length: Tokens of each row, all of which have labels.
        gradient_checkpointing: Whether activations are computed again in the backward pass.
        chunked_loss: Whether the loss is computed in pieces.
        device: "cpu" or "cuda"; default: the GPU if there is one.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = next(model.parameters()).dtype
    with torch.device(place), without_zero_init():
        real = type(model)._from_config(model.config, dtype=dtype)
    if gradient_checkpointing:
        real.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    s2ft.attach(real.train(), as_random(config))
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (batch, length), device=place)
    times = [_step(real, ids, chunked_loss, place) for _ in range(STEPS + 1)]
    return statistics.median(times[1:])


def _step(model: nn.Module, ids: torch.Tensor, chunked: bool, place: torch.device) -> float:
    wait = torch.cuda.synchronize if place.type == "cuda" else contextlib.nullcontext
    wait()
    start = time.perf_counter()
    inputs = {"input_ids": ids, "labels": ids}
    loss = loss_in_chunks(model, inputs) if chunked else model(**inputs).loss
    loss.backward()
    wait()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds
