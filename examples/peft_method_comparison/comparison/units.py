"""Writes the units of an experiment that are chosen with data or weights, so that PEFT's run.py needs neither."""

import json
from pathlib import Path
from typing import Any

import s2ft
from comparison import data, models
from comparison.settings import PEFT_CONFIG, TRAINING_PARAMS, training_params
from comparison.training import encoded
from s2ft.peft import S2FTPeftConfig

ROWS = 2000  # training rows that are read; a selection uses the first of them


def write(folder: Path, options: dict[str, Any], changes: dict[str, Any], data_folder: Path | None) -> Path:
    """Choose units of the real model, and write the experiment's `adapter_config.json`.

    Args:
        folder: The experiment's folder, experiments/METHOD/NAME. Its `training_params.json` is used if there is one.
        options: Fields of :class:`s2ft.S2FTConfig`, such as `d_ratio`, `selection`, `order` and `protect_ratio`.
        changes: Training parameters that differ.
        data_folder: Folder with the data; None reads from the hub.

    Returns:
        The file. It names the units, and in `info` the options by which they were chosen.

    Raises:
        ValueError: An option is not allowed, or there is too little data.
    """
    try:
        config = s2ft.S2FTConfig(**options)
    except TypeError as error:
        raise ValueError(f"--units must have fields of S2FTConfig: {error}") from None
    file = folder / TRAINING_PARAMS
    own = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    params = training_params({**own, **changes}, folder.name)
    texts = data.read(data_folder, min(ROWS, params.max_steps * params.batch_size), 1)
    model, tokenizer = models.load(params)
    rows = encoded(tokenizer, texts.training, params)
    protected = [ids[: params.max_seq_length] for ids in map(tokenizer.encode, texts.protected)]
    needed = models.batches_for(config, tokenizer, rows, protected, params.batch_size)
    selection = s2ft.select(model, config, **needed)
    folder.mkdir(parents=True, exist_ok=True)
    written = S2FTPeftConfig(task_type="CAUSAL_LM", units=selection, info={"chosen_by": options})
    written.save_pretrained(folder)
    return folder / PEFT_CONFIG
