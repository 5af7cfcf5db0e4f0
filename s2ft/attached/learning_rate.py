"""The learning rate to begin with, by what is trained.

AdamW moves each trained weight by about the learning rate in a step, those of one output in the same sense. So an
output moves with the rate times the number of trained weights that it sums, and it is as large as the size of its
weights times the root of their number. What a rate does is the relation of the two. Hence
``rate = 0.0048 × size / (share × √width)``, with the root mean square of the trained weights as their size, and the
trained share of the weights that S²FT can train. Twice the weights want half the rate, and so do half as large ones.
It holds for full fine-tuning too. All good rates that are known:

| model | width | share | size | task | good rate | rule | source |
|---|--:|--:|--:|---|--:|--:|---|
| SmolLM2-135M | 576 | 0.032 | 0.19 | two tasks, 16 updates | 1e-3 to 4e-3 | 2e-3 | this project, `frontier` |
| SmolLM2-135M | 576 | 0.0075 | 0.19 | word problems, 64 updates | 4e-3 | 5e-3 | this project, `frontier` |
| SmolLM2-135M | 576 | 1 | 0.19 | three tasks, 16 updates | 5e-5 to 1e-4 | 8e-5 | `frontier`, full model |
| Gemma 3 270M | 640 | 0.07 | 0.016 | three tasks, 16 updates | 1e-4 to 1.5e-4 | 9e-5 | this project, `second-model` |
| Gemma 3 270M | 640 | 0.076 | 0.04 | three tasks, 16 updates | 1.6e-4 to 2.5e-4 | 2e-4 | `second-model`, inputs |
| Llama-3.2-3B | 3072 | 0.0034 | 0.02? | MetaMathQA | 3e-4 | 5e-4 | PEFT's comparison, SHiRA (1) |
| LLaMA-3-8B | 4096 | 0.008 | 0.015? | commonsense | 2e-4 | 1e-4 | S²FT paper, arXiv 2412.06289 |
| LLaMA-3-8B | 4096 | 0.008 | 0.015? | arithmetic | 1e-3 | 1e-4 | S²FT paper |

(1) SHiRA trains single weights, at random places. Only this rate was tried, over 5,000 updates. A size with a question
mark is an estimate.

Eight points do not prove a rule. It does not know the task (the two of the paper differ by a factor of five), the
batch, and how much forgetting is allowed: a higher rate learns more of the task, and forgets more.

What a weight moves grows with the number of updates too. A run of fewer than 32 gets the rate times 32 / updates, at
most twice (`python -m bench.experiments updates`, `frontier`). More updates do not lower it: nothing was measured.

A weight of a quantized file stays as it is unless its delta grows past half a step of the file. So with a codec the
rate is at least the one with which the updates, whose rates fall to 0, could move a weight by MOVED half steps. Known
points, all of SmolLM2-135M in Q4_1, whose half steps of `down` are 0.026 in the median:

| share of d | updates | rate | half steps | the file | source |
|--:|--:|--:|--:|---|---|
| 0.25 | 30 | 6e-4 | 0.3 | answers as the base | twelve chats, by hand |
| 0.25 | 30 | 2e-3 | 1.1 | has learned half | twelve chats, by hand |
| 0.25 | 30 | 4e-3 | 2.3 | answers right | twelve chats, by hand, twice |
| 0.06 | 30 | 4e-3 | 2.3 | answers right | twelve chats, by hand |
| 0.05 | 64 | 2e-3 | 2.4 | as without rounding | `bench/quantized.py` |
"""

import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from s2ft.attached.record import on_unwrapped, record_of
from s2ft.config import check_whole
from s2ft.distributed import decide, full_shape
from s2ft.model.coupling import Projection
from s2ft.model.weights import have_values, weight_at

FACTOR = 0.0048  # rate × share × √width / size
MOVED = 2.4  # half steps of a quantized file that the updates together can move a weight by
HIGHEST = 1e-2  # nothing is known of higher rates
FEWEST_UPDATES = 32  # that a run should make, and that get the rate of the rule; fewer get a higher rate
USUAL_WIDTH = 576  # of SmolLM2-135M, for a model whose config names none
USUAL_SIZE = 0.02  # what the weights of most new models begin with, for weights that are zero


@on_unwrapped
def suggested_rate(model: nn.Module, updates: int = FEWEST_UPDATES) -> float:
    """Return the learning rate with which `s2ft sft` would begin to train a model's adapter.

    It is for AdamW and for a loop or a trainer of your own, and follows from what is trained: the width of the model,
    the share of the weights, their size, and with a codec the steps of the quantized file. The task is not known:
    search from half to four times this rate.

    Args:
        model: Model with a trainable adapter. All ranks must call this.
        updates: Number of updates of the training. Fewer than 32 get up to twice the rate.

    Returns:
        The rate, with one significant digit.

    Raises:
        ValueError: The model has no trainable adapter, or `updates` is no whole number above 0.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.25))
        >>> s2ft.suggested_rate(model, updates=100)
        0.0002
    """
    check_whole("updates", updates)
    record = record_of(model)
    if record.selection is None:
        raise ValueError(f"no adapter of {', '.join(record.names)} is trainable: load one with trainable=True")
    chosen = [record.projections[name] for name in record.selection.units]
    every = {(one.path, one.expert): weight_at(model, one).shape.numel() for one in record.projections.values()}
    share = sum(full_shape(mount.layer.s2).numel() for mount in record.mounts.values()) / sum(every.values())
    can_read = have_values(model, record.couplings)
    size = decide("the size of the weights", can_read, lambda: weight_size(model, chosen)).value
    rate = rate_by_rule(width_of(model), share, size, updates)
    roundings = [mount.layer.rounding for mount in record.mounts.values()]
    halves = [one.half_step for one in roundings if one is not None]
    return max(rate, rate_for_file(statistics.median(halves), updates)) if halves else rate


def rate_for_file(half_step: float, updates: int) -> float:
    """Return the least learning rate whose updates change the values that a quantized file holds.

    Args:
        half_step: Half the distance of two values of the file.
        updates: Number of updates of the run, whose rates fall to 0.

    Returns:
        The rate with one significant digit.

    Example:
        >>> from s2ft.attached.learning_rate import rate_for_file
        >>> rate_for_file(0.02, 36)
        0.003
    """
    return float(f"{min(2 * MOVED * half_step / updates, HIGHEST):.0e}")


def rate_by_rule(width: int, share: float, size: float, updates: int = FEWEST_UPDATES) -> float:
    """Return a learning rate with which to start a search, for AdamW and S²FT's slices.

    Args:
        width: Hidden size of the model.
        share: Share that is trained of the weights that S²FT can train, above 0.
        size: Root mean square of the trained weights, see :func:`weight_size`.
        updates: Number of updates of the run.

    Returns:
        The rate with one significant digit. The good rates that are known are within a factor of 10.

    Example:
        >>> from s2ft.attached.learning_rate import rate_by_rule
        >>> rate_by_rule(4096, 0.008, 0.015)
        0.0001
    """
    more = min(max(FEWEST_UPDATES / updates, 1), 2)
    return float(f"{min(more * FACTOR * size / (share * width**0.5), HIGHEST):.0e}")


def weight_size(model: nn.Module, projections: Iterable[Projection]) -> float:
    """Return the median of the root mean squares of weights. Every rank of a model that is spread must call this."""
    sizes = []
    for handle in (weight_at(model, one) for one in projections):
        with handle.full() as weight:
            values = handle.view(weight)
            sizes.append(float(torch.linalg.vector_norm(values, dtype=torch.float32)) / values.numel() ** 0.5)
    return statistics.median(sizes) or USUAL_SIZE


def width_of(model: Any) -> int:
    """Return the hidden size of a model's language model, or a usual one if its config names none.

    Args:
        model: Any model.

    Example:
        >>> from s2ft.attached.learning_rate import width_of
        >>> width_of(model)
        64
    """
    config = getattr(model, "config", None)
    of_text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(of_text, "hidden_size", USUAL_WIDTH)
