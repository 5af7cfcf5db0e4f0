"""What is known before a training: what ratios mean for a model, and the memory of a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

import s2ft
from s2ft.codecs.codec import is_whole
from s2ft.codecs.gguf_file import GgufFile
from s2ft.codecs.packed_folder import PackedFolder
from s2ft.config import S2FTConfig
from s2ft.estimation.devices import Estimate, size
from s2ft.estimation.shadow import as_random
from s2ft.files import plain_text as tables
from s2ft.files.plain_text import first_line
from s2ft.model.coupling import Projection, by_key, projections_of
from s2ft.model.parts import couplings_in_towers
from s2ft.model.registry import find_couplings
from s2ft.model.weights import count_parameters, find, weight_at
from s2ft.packages import is_installed
from s2ft.selection import Selection, with_units
from s2ft.train.loss import has_standard_loss, loss_in_chunks

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
        lora_peak: Largest memory of a step with a LoRA of :attr:`lora_rank`, at least 1, on the same weights. None if
            it was not counted.
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
    lora_peak: int | None = None


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
    trained = trained_projections(model, config, selection)
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


def trained_projections(model: nn.Module, config: S2FTConfig, selection: Selection) -> list[Projection]:
    """Return the projections of a model of which a selection has units.

    Args:
        model: The model.
        config: What is trained.
        selection: The units.
    """
    couplings = couplings_in_towers(model, find_couplings(model, None, None, config).couplings, config)
    return [projection for projection in projections_of(couplings) if projection.name in selection]


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
    for one in trained_projections(model, config, selection):
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
    ends: dict[int, tuple[int, ...]] = {}
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
        if strategy is None and (lora := lora_like(model, wanted, row.lora_rank)) is not None:
            of_lora = s2ft.estimate(model, lora, **step, loss=loss, use_cache=False)
            ends[row.trained] += (of_lora.peak - saved_by_bits(model, bits),)
    (low, below), (high, above) = min(ends.items()), max(ends.items())

    def on_line(row: Planned) -> Planned:
        part = (row.trained - low) / (high - low) if high > low else 0.0
        kept, peak, *of_lora = (round(start + part * (end - start)) for start, end in zip(below, above))
        fits = None if step["memory"] is None else peak <= step["memory"]
        lora_peak = of_lora[0] if of_lora else None
        return replace(row, kept=kept, peak=peak, counted=row.trained in ends, fits=fits, lora_peak=lora_peak)

    return [row if row.refused else on_line(row) for row in rows], found


def lora_like(model: nn.Module, config: S2FTConfig, rank: float) -> Any:
    """Return PEFT's config of a LoRA on the weights that a configuration trains.

    Args:
        model: The model.
        config: The configuration.
        rank: The rank, which is rounded.

    Returns:
        The LoraConfig. None if PEFT is not installed, or some of the weights are not those of plain nn.Linear layers.
    """
    if not is_installed("peft"):
        return None
    from peft import LoraConfig

    paths = {one.path for one in trained_projections(model, config, s2ft.select(model, config))}
    is_linear = all(type(find(model, path)) is nn.Linear for path in paths)
    return LoraConfig(r=max(1, round(rank)), target_modules=sorted(paths)) if is_linear else None


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
        if any(row.lora_peak is not None for row in rows):
            columns["LoRA's peak"] = lambda row: ("" if row.counted else "≤ ") + size(row.lora_peak or 0)
        if room is not None:
            columns[size(room)] = lambda row: "fits" if row.fits else "too small"
    cells = [[cell(row) for cell in columns.values()] for row in rows if not row.refused]
    notes = [f"ratio {row.ratio:g}: {row.refused}" for row in rows if row.refused]
    return "\n".join([tables.table([[*columns], *cells], right=range(len(columns))), *notes])
