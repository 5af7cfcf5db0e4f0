"""s2ft select: choose units and save them, without training."""

import logging
from dataclasses import dataclass

from s2ft.cli.parse import MODEL, given_options, new_file, parse, quiet_transformers
from s2ft.config import S2FTConfig
from s2ft.text.data.data_options import DATA, ReadingOptions
from s2ft.text.models import DTYPES
from s2ft.train.options import CALIBRATION, PROTECT, PROTECT_ROWS, Options, option, with_default_ratio

logger = logging.getLogger(__name__)
EXAMPLE = """  s2ft select --model meta-llama/Llama-3.2-1B --d-ratio 0.03 --selection weight --output units.json
  s2ft sft --model meta-llama/Llama-3.2-1B --data my-data.jsonl --units units.json --output my-run"""


@dataclass
class SelectArguments(Options):
    model: str = option(text=MODEL, group="model and data")
    output: str = option(text="JSON file for the selection; it must not exist", group="model and data", metavar="FILE")
    data: list[str] | None = option(
        None,
        f"calibration data for the selections activation, product and gradient: {DATA}",
        group="model and data",
        metavar="FILE_OR_NAME",
    )
    calibration_examples: int | None = option(None, group="model and data", **CALIBRATION)
    protect: list[str] = option([], group="model and data", **PROTECT)
    protect_rows: int = option(128, group="model and data", **PROTECT_ROWS)
    batch_size: int = option(8, "rows of one forward pass", group="model and data", unit="rows", least=1)
    max_length: int = option(
        1024, "longest row; a longer row is left out", group="model and data", unit="tokens", least=1
    )
    dtype: str = option(
        "auto",
        "dtype of the model's weights; auto keeps the checkpoint's dtype",
        group="model and data",
        choices=DTYPES,
    )


def run_select(arguments: list[str]) -> None:
    job, config, reading = parse(
        "select",
        "Choose the units that a configuration describes, print a table of them, and save them.",
        [SelectArguments, S2FTConfig, ReadingOptions],
        arguments,
        EXAMPLE,
        {S2FTConfig: "selection", ReadingOptions: "model and data"},
    )
    quiet_transformers()
    from s2ft.selection import with_protect_ratio

    config = with_protect_ratio(with_default_ratio(config, given_options(arguments)), bool(job.protect))
    new_file(job.output)
    selection = choose(job, config, reading)
    selection.save(job.output)
    print(f"{selection}\nselection: {job.output}")


def choose(job: SelectArguments, config, reading: ReadingOptions):
    """Return the selection.

    Args:
        job: The options of the command.
        config: The S2FTConfig.
        reading: How the data is read.

    Raises:
        ValueError: The configuration needs calibration data and there is none, or the other way round.
    """
    import torch

    import s2ft
    from s2ft.text.collator import batches_of, needs_calibration
    from s2ft.text.divergence import read_texts, text_rows
    from s2ft.text.encoding import context_length
    from s2ft.text.models import load_model
    from s2ft.train.device import say_device

    calibrated = needs_calibration(config)
    if bool(job.data) != calibrated:
        raise ValueError(f"selection={config.selection!r} " + ("needs data" if calibrated else "takes no data"))
    if not calibrated and not job.protect:
        return _choose_from_disk(job, config)
    protected = read_texts(reading.of(job.protect, "train"), job.protect_rows, config.seed) if job.protect else None
    model, tokenizer = load_model(job.model, job.dtype)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator or torch.device("cpu")
    say_device(device)
    calibration = _calibration(job, config, reading, model, tokenizer) if calibrated else None
    protect = None
    if protected is not None:
        longest = min(job.max_length, context_length(model) or job.max_length)
        texts = text_rows(protected, tokenizer, longest, job.protect_rows, config.seed)
        protect = batches_of(texts, tokenizer, job.batch_size)
    return s2ft.select(model.to(device), config, calibration, protect=protect)


def _choose_from_disk(job: SelectArguments, config):
    """Return a selection that needs no data. Weights are read one at a time where that is possible."""
    import s2ft
    from s2ft.model.checkpoint import CannotStream, read_from
    from s2ft.selection import reads_weights
    from s2ft.text.models import load_model, model_on_disk, model_without_values

    try:
        if not reads_weights(config):
            return s2ft.select(model_without_values(job.model, job.dtype), config)
        model, weights = model_on_disk(job.model, job.dtype)
    except CannotStream as reason:
        logger.info("loading the whole model to select from, because %s", reason)
        return s2ft.select(load_model(job.model, job.dtype)[0], config)
    with read_from(model, weights):
        return s2ft.select(model, config)


def _calibration(job: SelectArguments, config, reading: ReadingOptions, model, tokenizer):
    from s2ft.text.collator import calibration_for
    from s2ft.text.data import load_rows
    from s2ft.text.encoding import context_length, tokenize_rows
    from s2ft.text.prompts import prompt_for_rows

    options = reading.of(job.data or [], "train")
    rows = load_rows(options)
    prompt = prompt_for_rows(tokenizer, rows, options)
    room = min(job.max_length, context_length(model) or job.max_length)
    tokenized = tokenize_rows(rows, tokenizer, prompt, max_length=room, skip_bad_rows=options.skip_bad_rows)
    return calibration_for(config, tokenizer, tokenized.dataset, job.calibration_examples, job.batch_size)
