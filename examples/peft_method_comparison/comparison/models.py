"""Loads a base model and makes the trained part of a run."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME

import s2ft
import s2ft.peft  # registers the method S2FT in PEFT
from comparison.data import TEXTS
from comparison.settings import PEFT_CONFIG, Run, TrainingParams
from s2ft.reproduce.methods import Prepared, prepare
from s2ft.text.calibration import needs_calibration
from s2ft.text.collator import TokenCollator
from s2ft.text.models import load_model

CALIBRATION = 128  # training rows for selections that need data


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(params: TrainingParams) -> tuple[Any, Any]:
    """Load a base model and its tokenizer. The tokenizer pads with the end token.

    Args:
        params: Model, dtype, attention and checkpointing.

    Returns:
        The model on the device, and the tokenizer.

    Raises:
        ValueError: The tokenizer has no end token, or the model can't be loaded.
    """
    model, tokenizer = load_model(
        params.model_id, params.dtype, device_map=str(device()), attn_implementation=params.attn_implementation
    )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {params.model_id} has no end token, by which answers end")
    tokenizer.pad_token = tokenizer.eos_token
    if params.use_gc:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    return model, tokenizer


def batches_for(
    config: s2ft.S2FTConfig, tokenizer, rows: list[list[int]], protected: list[list[int]], batch_size: int
) -> dict[str, Any]:
    """Return the data that a selection of units needs, as arguments of :func:`s2ft.select`.

    Args:
        config: What is selected.
        tokenizer: The model's tokenizer.
        rows: Token ids of the training rows; the first 128 are used.
        protected: Token ids of texts for `protect_ratio`.
        batch_size: Rows of a batch.

    Returns:
        `calibration` and `protect`, if they are needed.

    Raises:
        ValueError: `protect_ratio` is set, and there are no such texts.
    """
    needed: dict[str, Any] = {}
    if needs_calibration(config):
        needed["calibration"] = _batches(tokenizer, rows[:CALIBRATION], batch_size)
    if config.protect_ratio is not None:
        if not protected:
            raise ValueError(
                f"protect_ratio needs more than {TEXTS} texts of the encyclopedia: on the first {TEXTS} forgetting is "
                "measured"
            )
        needed["protect"] = _batches(tokenizer, protected, batch_size)
    return needed


def _batches(tokenizer, rows: list[list[int]], batch_size: int) -> Iterator[dict[str, Any]]:
    collate = TokenCollator(tokenizer.pad_token_id)
    for first in range(0, len(rows), batch_size):
        yield collate([{"input_ids": row, "labels": row} for row in rows[first : first + batch_size]])


def with_method(model, tokenizer, run: Run, rows: list[list[int]], protected: list[list[int]]) -> Prepared:
    """Give a model the trained parameters of a run.

    Args:
        model: The base.
        tokenizer: Its tokenizer.
        run: The run.
        rows: Token ids of the training rows, for selections that need data.
        protected: Token ids of texts that a selection may protect.

    Returns:
        The model, ready to train.

    Raises:
        ValueError: The method, an option or the content of `adapter_config.json` is not allowed.
    """
    if run.adapter is None:
        more = {}
        if run.method == "s2ft":
            config = s2ft.S2FTConfig(**run.options)
            more = batches_for(config, tokenizer, rows, protected, run.params.batch_size)
        return prepare(model, run.method, run.options, seed=run.params.seed, **more)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / PEFT_CONFIG).write_text(json.dumps(run.adapter), encoding="utf-8")
        config = peft.PeftConfig.from_pretrained(folder)
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=run.params.autocast_adapter_dtype)
    trainable, total = wrapped.get_nb_trainable_parameters()
    report = f"{config.peft_type.value}: {trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})"
    return Prepared(wrapped, model, run.name.split("/")[0], {}, trainable, report)


def total_parameters(prepared: Prepared) -> int:
    """Number of all parameters, adapters included, as PEFT counts it."""
    return sum(each.numel() for each in prepared.model.parameters())


def base_values(prepared: Prepared):
    """A context in which the model computes what its base does. Before a full fine-tuning that is the model itself."""
    if prepared.method == "full":
        return nullcontext(prepared.model)
    if hasattr(prepared.model, "peft_config"):
        return prepared.model.disable_adapter()
    return s2ft.disable_adapters(prepared.model)


def size_of_adapter(prepared: Prepared) -> int:
    """Size of the saved adapter's weights in bytes; for full fine-tuning that of all weights, which are not saved."""
    model = prepared.model
    if prepared.method == "full":
        return sum(each.numel() * each.element_size() for each in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(model, "peft_config"):
            model.save_pretrained(folder)
            return (Path(folder) / SAFETENSORS_WEIGHTS_NAME).stat().st_size
        s2ft.save_adapter(model, folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
