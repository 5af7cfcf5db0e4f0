"""What is known before a training: what ratios mean for a model, and the learning rate to begin with.

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
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import s2ft
from s2ft.attached.record import record_of
from s2ft.codecs.codec import is_whole
from s2ft.codecs.gguf_file import GgufFile
from s2ft.codecs.packed_folder import PackedFolder
from s2ft.config import S2FTConfig
from s2ft.distributed import full_shape
from s2ft.estimation.devices import Estimate, size
from s2ft.estimation.shadow import as_random
from s2ft.files import plain_text as tables
from s2ft.files.plain_text import first_line
from s2ft.model.coupling import Projection, by_key, projections_of
from s2ft.model.parts import couplings_in_towers
from s2ft.model.registry import find_couplings
from s2ft.model.weights import count_parameters, weight_at
from s2ft.selection import with_units
from s2ft.train.loss import has_standard_loss, loss_in_chunks
from s2ft.train.parallel import run_where_weights_are

RATIOS = (0.01, 0.03, 0.05, 0.1, 0.2)
BITS = {4: 4.5, 8: 8.1}  # of one weight in bitsandbytes' blocks, with their scales


@dataclass(frozen=True)
class Planned:
    """What one configuration trains.

    Attributes:
        ratio: The ratio of every projection that is trained, or None if they differ or a budget sets them.
        trained: Number of trained parameters.
        share: Trained parameters as a share of the model's.
        lora_rank: Rank of a LoRA with as many parameters on the same weights. It is no whole number.
        adapter_bytes: Bytes of the adapter's tensors.
        refused: Why this ratio can't be trained, or "".
        kept: Bytes that one forward pass keeps for the backward pass; None if memory was not counted.
        peak: Largest memory of a step; None if memory was not counted.
        counted: Whether the two were counted for this row. Otherwise they lie on the line between the counted rows.
        fits: Whether the peak is at most the memory of the device; None if one of them is not known.
    """

    ratio: float | None
    trained: int = 0
    share: float = 0.0
    lora_rank: float = 0.0
    adapter_bytes: int = 0
    refused: str = ""
    kept: int | None = None
    peak: int | None = None
    counted: bool = False
    fits: bool | None = None


def rows_of(model: nn.Module, config: S2FTConfig, ratios: Sequence[float] = RATIOS) -> list[Planned]:
    """Return a row for the configuration, and one for each ratio in place of the configuration's own ratios.

    Args:
        model: A model without adapters. Its weights are not read.
        config: What is trained.
        ratios: The ratios of the other rows. A configuration with a budget or with named units has no other rows.

    Raises:
        ValueError: The configuration can't be trained.
    """
    config = as_random(config)
    is_fixed = config.units is not None or config.budget is not None or config.match_lora_rank is not None
    own = set() if is_fixed else set(config.ratios.values())
    rows = [planned(model, config, own.pop() if len(own) == 1 else None)]
    for ratio in () if is_fixed else [ratio for ratio in ratios if ratio != rows[0].ratio]:
        try:
            rows.append(planned(model, with_ratio(config, ratio), ratio))
        except ValueError as error:
            rows.append(Planned(ratio, refused=first_line(error)))
    return sorted(rows, key=lambda row: (row.ratio is not None, row.ratio or 0.0))


def with_ratio(config: S2FTConfig, ratio: float) -> S2FTConfig:
    """Return a configuration with this ratio for all projections that it trains."""
    return replace(config, **{f"{name}_ratio": ratio for name in config.ratios})


def planned(model: nn.Module, config: S2FTConfig, ratio: float | None) -> Planned:
    """Return the row of one configuration, without its memory."""
    config = with_units(config)
    report, selection = s2ft.plan(model, config), s2ft.select(model, config)
    couplings = couplings_in_towers(model, find_couplings(model, None, None, config).couplings, config)
    trained = [projection for projection in projections_of(couplings) if projection.name in selection]
    shapes = {projection.weight_key: weight_at(model, projection).shape for projection in trained}
    each_rank = sum(shape[0] + shape[1:].numel() for shape in shapes.values())
    in_full = sum(report.extra_weights.values())
    values = sum(row.parameters * row.dtype.itemsize for row in report.rows)
    index = sum(selection[projection.name].numel() * projection.unit for projection in trained) * 4
    return Planned(
        ratio,
        report.trainable,
        share=report.trainable / count_parameters(model),
        lora_rank=(report.trainable - in_full) / each_rank,
        adapter_bytes=values + index + in_full * 4,
    )


def scales_of(base: GgufFile | PackedFolder, model: nn.Module, config: S2FTConfig) -> str:
    """Return lines that say which scales of the packed weights change, each with its end.

    Args:
        base: The files of the model.
        model: The model. Its weights are not read.
        config: What is trained.

    Raises:
        ValueError: The type of a weight has no codec.
    """
    selection, found = s2ft.select(model, config), []
    couplings = couplings_in_towers(model, find_couplings(model, None, None, config).couplings, config)
    for one in (one for one in projections_of(couplings) if one.name in selection):
        codec = base.codec(one.path)
        whole = one.dim == 0 or is_whole(one.elements(selection[one.name]), codec.block)
        found.append(((codec.name, codec.block, whole), one.path))
    return "".join(
        f"{name} in {len(paths)} weights, such as {paths[0]}: "
        + (
            "all scales stay\n"
            if block == 1
            else f"one scale for {block} inputs, which changes with them\n"
            if whole
            else f"one scale for {block} inputs, which stays where some are trained; --group {block} trains all\n"
        )
        for (name, block, whole), paths in by_key(found).items()
    )


def with_memory(
    rows: list[Planned],
    model: nn.Module,
    config: S2FTConfig,
    step: Mapping[str, Any],
    chunked: bool,
    bits: int | None = None,
) -> tuple[list[Planned], Estimate]:
    """Add the memory of a step to the rows.

    It is counted for the smallest and the largest row. Memory grows with the trained parameters in pieces of lines, and
    a row between the two is at most on the line through them.

    Args:
        rows: The rows.
        model: The model, as for :func:`rows_of`.
        config: The configuration.
        step: Arguments of :func:`s2ft.estimate`. Its `memory` is what the device has.
        chunked: Whether the loss is computed without keeping the logits.
        bits: 4 or 8 for a base that will be quantized.

    Returns:
        The rows, and the estimate of the smallest one.
    """
    config = as_random(config)
    usable = sorted((row for row in rows if not row.refused), key=lambda row: row.trained)
    ends: dict[int, tuple[int, int]] = {}
    strategy = step["strategy"]
    whole_logits = strategy is not None and strategy.shards_weights  # of a head that is gathered
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    loss = loss_in_chunks if chunked and not whole_logits and not capped and has_standard_loss(model) else None
    for row in {usable[-1].trained: usable[-1], usable[0].trained: usable[0]}.values():
        wanted = config if row.ratio is None else with_ratio(config, row.ratio)
        found = s2ft.estimate(model, wanted, **step, loss=loss, use_cache=False)
        if strategy is not None:  # the number of devices for the largest row is that of all
            step = {**step, "devices": found.devices}
        ends[row.trained] = (found.kept, found.peak - saved_by_bits(model, bits))
    (low, below), (high, above) = min(ends.items()), max(ends.items())

    def on_line(row: Planned) -> Planned:
        part = (row.trained - low) / (high - low) if high > low else 0.0
        kept, peak = (round(start + part * (end - start)) for start, end in zip(below, above))
        fits = None if step["memory"] is None else peak <= step["memory"]
        return replace(row, kept=kept, peak=peak, counted=row.trained in ends, fits=fits)

    return [row if row.refused else on_line(row) for row in rows], found


def saved_by_bits(model: nn.Module, bits: int | None) -> int:
    """Return the bytes that a quantized base saves. The largest weight is unpacked for its product.

    Args:
        model: The model without quantization.
        bits: 4 or 8, or None.
    """
    head = model.get_output_embeddings()  # bitsandbytes quantizes all linear layers but this one
    weights = [layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
    if bits is None or not weights:
        return 0
    return max(0, int((sum(weights) - max(weights)) * model.dtype.itemsize - sum(weights) * BITS[bits] / 8))


# ---- text ----------------------------------------------------------------------------------------------


def table(rows: Sequence[Planned], room: int | None = None) -> str:
    """Return the rows as a table."""
    columns = {  # by heading, what stands in it for a row
        "ratio": lambda row: "as given" if row.ratio is None else f"{row.ratio:g}",
        "trained": lambda row: f"{row.trained:,}",
        "share": lambda row: f"{row.share:.2%}",
        "LoRA rank": lambda row: f"{row.lora_rank:.1f}",
        "adapter": lambda row: size(row.adapter_bytes),
    }
    if any(row.peak is not None for row in rows):
        columns["kept for backward"] = lambda row: ("" if row.counted else "≤ ") + size(row.kept or 0)
        columns["peak"] = lambda row: ("" if row.counted else "≤ ") + size(row.peak or 0)
        if room is not None:
            columns[size(room)] = lambda row: "fits" if row.fits else "too small"
    cells = [[cell(row) for cell in columns.values()] for row in rows if not row.refused]
    notes = [f"ratio {row.ratio:g}: {row.refused}" for row in rows if row.refused]
    return "\n".join([tables.table([[*columns], *cells], right=range(len(columns))), *notes])


# ---- the learning rate ---------------------------------------------------------------------------------


FACTOR = 0.0048  # rate × share × √width / size
HIGHEST = 1e-2  # nothing is known of higher rates
FEWEST_UPDATES = 32  # that a run should make, and that get the rate of the rule; fewer get a higher rate


def suggested_rate(width: int, share: float, size: float, updates: int = FEWEST_UPDATES) -> float:
    """Return a learning rate with which to start a search, for AdamW and S²FT's slices.

    Args:
        width: Hidden size of the model.
        share: Share that is trained of the weights that S²FT can train, above 0, see :func:`rate_of_adapter`.
        size: Root mean square of the trained weights, see :func:`weight_size`.
        updates: Number of updates of the run.

    Returns:
        The rate with one significant digit. The good rates that are known are within a factor of 10.

    Example:
        >>> from s2ft.train.planning import suggested_rate
        >>> suggested_rate(4096, 0.008, 0.015)
        0.0001
    """
    more = min(max(FEWEST_UPDATES / updates, 1), 2)
    return float(f"{min(more * FACTOR * size / (share * width**0.5), HIGHEST):.0e}")


def rate_of_adapter(model: nn.Module, updates: int) -> float:
    """Return the suggested learning rate for a model's trainable adapter. All ranks must call this.

    Args:
        model: The model.
        updates: Number of updates of the run.

    Example:
        >>> from s2ft.train.planning import rate_of_adapter
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.25))
        >>> rate_of_adapter(model, 100)
        0.0002
    """
    record = record_of(model)
    chosen = [record.projections[name] for name in record.selection.units]
    every = {(one.path, one.expert): weight_at(model, one).shape.numel() for one in record.projections.values()}
    share = sum(full_shape(mount.layer.s2).numel() for mount in record.mounts.values()) / sum(every.values())
    size = run_where_weights_are("the size of the weights", model, partial(weight_size, model, chosen))
    return suggested_rate(width_of(model), share, size, updates)


def weight_size(model: nn.Module, projections: Iterable[Projection]) -> float:
    """Return the median of the root mean squares of weights. Every rank of a model that is spread must call this."""
    sizes = []
    for handle in (weight_at(model, one) for one in projections):
        with handle.full() as weight:
            values = handle.view(weight)
            sizes.append(float(torch.linalg.vector_norm(values, dtype=torch.float32)) / values.numel() ** 0.5)
    return statistics.median(sizes) or 0.02  # of zeros, as a new layer may have: what most models begin with


def width_of(model: Any) -> int:
    """Return the hidden size of a model's language model, or that of SmolLM2-135M if the config names none.

    Args:
        model: A model of transformers.

    Example:
        >>> from s2ft.train.planning import width_of
        >>> width_of(model)
        64
    """
    return getattr(model.config.get_text_config(), "hidden_size", 576)
