"""Expected memory and time of runs, before anything is run: computed, not measured."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch

import s2ft
import s2ft.peft  # registers the method S2FT in PEFT
from comparison.settings import PEFT_CONFIG, Run
from s2ft.reproduce.methods import parameters_of
from s2ft.reproduce.tables import Column, Table
from s2ft.text.models import hollow_model

TOKENS = 4_198_051  # of 5,000 batches of four rows, with the tokenizer of Llama 3.2, in PEFT's results
STEPS, ROWS = 5000, 4
SPEEDS = {"L40S": 90e12, "H100": 300e12}  # FLOP/s in bfloat16: half of an L40S's peak, 30 % of an H100's
NOTES = (
    "computed, not measured; memory: the step with four rows of the greatest length (s2ft.estimate), without the test",
    "time: of the training steps alone, at 90 TFLOP/s on an L40S and 300 TFLOP/s on an H100",
)


def table(runs: Sequence[Run]) -> Table:
    """Return what runs are expected to take.

    Args:
        runs: The runs.

    Returns:
        A table with a row for each run.
    """
    columns = [
        Column("run"),
        Column("rate", "learning rate"),
        Column("trained", "trained", ",d"),
        Column("file", "file (MB)", ".1f"),
        Column("memory", "memory of a step (GB)", ".1f"),
        *(Column(card, f"training on an {card} (s)", ".0f") for card in SPEEDS),
    ]
    return Table("estimates", "Expected, not measured", columns, [_row(run) for run in runs], NOTES)


def _row(run: Run) -> list[Any]:
    params = run.params
    model = hollow_model(params.model_id).to(getattr(torch, params.dtype))
    weights = sum(each.numel() for each in model.parameters())
    trained, memory = _counted(run, model)
    tokens = TOKENS / STEPS / ROWS * params.max_steps * params.batch_size
    # two operations a weight and token in the forward, as many for the gradients of the inputs, and again for those
    # of the weights that are trained
    operations = tokens * (4 * weights + 2 * trained)
    is_full = run.adapter is None and run.method == "full"
    bytes_each = 4 if params.autocast_adapter_dtype and not is_full else 2
    return [
        run.name,
        params.rate,
        trained,
        trained * bytes_each / 1e6,
        memory and memory / 1e9,
        *(operations / speed for speed in SPEEDS.values()),
    ]


def _counted(run: Run, model) -> tuple[int, int | None]:
    """Return the number of trained parameters, and the peak of a step in bytes where s2ft can estimate it."""
    config = _s2ft_config(run)
    if config is None:
        if run.method == "full":
            return sum(each.numel() for each in model.parameters()), None
        return parameters_of(model, run.method, run.options), None
    if not run.params.autocast_adapter_dtype:
        config = replace(config, delta_dtype=run.params.dtype)
    estimate = s2ft.estimate(model, config, run.params.batch_size, run.params.max_seq_length, device="cuda")
    return estimate.trained, estimate.peak


def _s2ft_config(run: Run) -> s2ft.S2FTConfig | None:
    """The S2FTConfig of a run, or None for another method."""
    if run.adapter is None:
        return s2ft.S2FTConfig(**run.options) if run.method == "s2ft" else None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / PEFT_CONFIG).write_text(json.dumps(run.adapter), encoding="utf-8")
        config = peft.PeftConfig.from_pretrained(folder)
    if not isinstance(config, s2ft.peft.S2FTPeftConfig):
        raise ValueError(f"{run.name} is of {config.peft_type.value}: expected memory is computed for S2FT only")
    if config.target_modules is not None:
        raise ValueError(f"{run.name} has target_modules: expected memory is computed for ratios and units only")
    names = s2ft.S2FTConfig.__dataclass_fields__
    return s2ft.S2FTConfig(**{name: getattr(config, name) for name in names if name != "layout"}, layout="indexed")
