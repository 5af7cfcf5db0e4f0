"""s2ft plan, estimate, couplings and select: what is known of a model, and chosen in it, before it is trained.

Only `select` reads weights.
"""

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from s2ft.cli.parse import MODEL, command, new_file
from s2ft.config import STRATEGIES, S2FTConfig, check_fields, option, refuse
from s2ft.text.data.data_options import DATA, ReadingOptions
from s2ft.text.models import DTYPES, hollow_model, load_model, model_on_disk, model_without_values
from s2ft.train.options import CALIBRATION, PROTECT, PROTECT_ROWS, Options, check_ratios, with_default_ratio

SHARED = {"group": "model and data"}
SEVERAL = {"group": "several devices"}
MODEL_OR_CONFIG = f"{MODEL}, or the path of a config.json"
RANK = "LoRA rank: of a LoRA on the same weights with as many parameters"


def folder_of_config(model: str) -> str:
    """The folder of a config.json, which is all that these commands read of a model; any other name as it is."""
    path = Path(model).expanduser()
    return str(path.parent) if path.name == "config.json" and path.is_file() else model


@dataclass
class PlanArguments:
    model: str = option(text=MODEL_OR_CONFIG, positional=True, metavar="MODEL")
    ratios: list[float] | None = option(
        None, "ratios of the table, for every projection that is trained", shown="0.01 0.03 0.05 0.1 0.2", **SHARED
    )
    dtype: str = option("auto", "dtype of the model's weights; auto: that of its config", choices=DTYPES, **SHARED)
    json: bool = option(False, "print JSON", **SHARED)

    def __post_init__(self) -> None:
        check_fields(self)
        self.model = folder_of_config(self.model)
        refuse(
            *(
                (not 0 < ratio <= 1, f"ratios must be above 0 and at most 1, got {ratio:g}")
                for ratio in self.ratios or ()
            )
        )

    def of_model(self, config: S2FTConfig, given: dict, keep_packed: bool = False):
        """Return a model without data but for packed blocks, the config with its ratio, and the rows of the table."""
        import torch

        from s2ft.train.planning import rows_of

        check_ratios(config, given)
        model = load_model(self.model, self.dtype, keep_packed=True)[0] if keep_packed else hollow_model(self.model)
        model = model if self.dtype == "auto" else model.to(getattr(torch, self.dtype))
        config = with_default_ratio(config, model)
        return model, config, rows_of(model, config, **({"ratios": self.ratios} if self.ratios else {}))


@command(
    "Print what would be trained of a model, and a table of ratios with the LoRA rank of the same size. Only the "
    "model's config is read, no weights. s2ft estimate adds the memory.",
    """  s2ft plan meta-llama/Llama-3.2-1B
  s2ft plan meta-llama/Llama-3.2-1B --d-ratio 0.03 --o-ratio 0.1 --ratios 0.02 0.04 0.08""",
    {S2FTConfig: "selection"},
)
def run_plan(job: PlanArguments, config: S2FTConfig, given: dict) -> None:
    import s2ft
    from s2ft.estimation.shadow import as_random
    from s2ft.model.checkpoint import packed_base
    from s2ft.train.planning import scales_of, table

    model, config, rows = job.of_model(config, given)
    scales = ""
    if config.codec != "none" and Path(job.model).expanduser().exists() and (base := packed_base(job.model)):
        scales = scales_of(base, model, as_random(config))
    print(
        json.dumps({"model": job.model, "rows": [asdict(row) for row in rows]}, indent=2)
        if job.json
        else f"{s2ft.plan(model, as_random(config))}\n{scales}\n{table(rows)}\n{RANK}"
    )


# ---- s2ft estimate -------------------------------------------------------------------------------------


@dataclass
class EstimateArguments(PlanArguments):
    batch_size: int = option(8, "rows of one forward pass on one device", unit="rows", least=1, **SHARED)
    max_length: int = option(1024, "tokens of the longest row", unit="tokens", least=2, **SHARED)
    accumulation: int = option(1, "forward passes of one update", least=1, **SHARED)
    load_in_4bit: bool = option(False, "count a base in 4 bit", **SHARED)
    load_in_8bit: bool = option(False, "count a base in 8 bit", **SHARED)
    keep_packed: bool = option(False, "count the blocks of a .gguf file, which is read", **SHARED)
    optimizer: str = option("adamw", "optimizer by its name in s2ft.estimate", **SHARED)
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass", **SHARED)
    chunked_loss: bool = option(
        True, "compute the loss in pieces", off="compute the loss from all logits at once", **SHARED
    )
    device: str | None = option(
        None, "device of the training", choices=("cpu", "cuda"), shown="the GPU if there is one", **SHARED
    )
    device_memory: str | None = option(
        None, "memory of the device, such as 24GB: the table says which row fits", metavar="SIZE",
        shown="what is free here", **SHARED,
    )  # fmt: skip
    strategy: str | None = option(
        None,
        "how training is spread over devices; the numbers are then those of one device",
        choices=STRATEGIES,
        shown="one device",
        **SEVERAL,
    )
    devices: int | None = option(
        None, "number of devices", least=1, shown="the smallest on which the largest row fits", **SEVERAL
    )
    tp_size: int | None = option(
        None, "devices over which each weight is split, for tp+fsdp2", least=2, shown="none", **SEVERAL
    )
    offload: str | None = option(
        None, "what is kept in the memory of the host", choices=("optimizer", "all"), shown="nothing", **SEVERAL
    )
    reshard_after_forward: bool = option(
        True, "FSDP2: free the gathered weights of a block after its forward pass",
        off="keep them until the backward pass", **SEVERAL,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        given = next((name for name in ("devices", "tp_size", "offload") if getattr(self, name) is not None), "")
        refuse(
            (
                self.load_in_4bit + self.load_in_8bit + self.keep_packed > 1,
                "load_in_4bit, load_in_8bit and keep_packed exclude each other",
            ),
            (self.strategy is None and given, f"{given} needs strategy: one of {', '.join(STRATEGIES)}"),
            (
                self.strategy is not None and (self.bits or self.keep_packed),
                "load_in_4bit, load_in_8bit and keep_packed are counted for one device: leave out strategy",
            ),
        )

    @property
    def bits(self) -> int | None:
        """The bits of a weight of a quantized base."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None


@command(
    "Print what training a model takes: parameters and memory. Only the model's config is read, no weights.",
    """  s2ft estimate meta-llama/Llama-3.1-8B --batch-size 4 --max-length 2048 --device-memory 24GB
  s2ft estimate meta-llama/Llama-3.1-70B --strategy fsdp2 --device-memory 80GB --gradient-checkpointing""",
    {S2FTConfig: "selection"},
)
def run_estimate(job: EstimateArguments, config: S2FTConfig, given: dict) -> None:
    import torch

    from s2ft.estimation.devices import Strategy, size, size_of
    from s2ft.estimation.step import free_memory
    from s2ft.train.planning import table, with_memory

    config = replace(config, layout="indexed") if job.bits or job.keep_packed else config  # as sft does
    device = torch.device(job.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    room = size_of(job.device_memory, "device_memory") or free_memory(device)  # before packed blocks are read
    model, config, rows = job.of_model(config, given, job.keep_packed)
    step = dict(
        batch=job.batch_size,
        length=job.max_length,
        accumulation=job.accumulation,
        gradient_checkpointing=job.gradient_checkpointing,
        optimizer=job.optimizer,
        device=device,
        strategy=None
        if job.strategy is None
        else Strategy(job.strategy, job.offload, job.tp_size, reshard_after_forward=job.reshard_after_forward),
        devices=job.devices,
        memory=room,
    )
    rows, found = with_memory(rows, model, config, step, job.chunked_loss, job.bits)
    if job.json:
        shown = {"model": job.model, "device": found.device, "batch": found.batch, "length": found.length}
        shown |= {"strategy": found.strategy, "devices": found.devices, "host": found.host}
        print(json.dumps({**shown, "room": room, "rows": [asdict(row) for row in rows]}, indent=2))
        return
    bits = f" before they are quantized to {job.bits} bit" if job.bits else ""
    place = found.device
    if place == "cpu" and job.device is None and job.device_memory is not None:
        place += " (--device cuda counts a GPU's kernels)"
    if found.strategy is not None:
        host = "" if not found.host else f" and at least {size(found.host)} of the host's memory each"
        place = f"each of {found.devices} {place} device{'s' * (found.devices > 1)} with {found.strategy}{host}"
    print(
        f"{size(found.parameters + found.buffers)} of weights{bits}; a step of {job.batch_size} × "
        f"{job.max_length:,} tokens on {place}, {job.optimizer}\n{table(rows, room)}\n{RANK}"
    )
    if any(row.lora_peak is not None for row in rows):
        print("LoRA's peak: with matrices in the dtype of the weights; float32 ones, as PEFT makes them, take more")
    if any(not row.counted and not row.refused for row in rows):
        print("≤: on the line between the smallest and the largest row, which were counted")
    for note in found.notes:
        print(f"note: {note}")


# ---- s2ft couplings ------------------------------------------------------------------------------------


@dataclass
class CouplingsArguments:
    model: str = option(text=MODEL_OR_CONFIG, positional=True, metavar="MODEL")
    example: str | None = option(
        None,
        "safetensors file with an input of the model, its tensors by name; default: inputs made from the config",
        metavar="FILE",
    )
    json: bool = option(False, "print JSON: the couplings with all their fields, and a row for every weight")


@command(
    "Print which layers of a model share units, and what becomes of every weight of its blocks. Only the model's "
    "config is read, no weights.",
    """  s2ft couplings Qwen/Qwen3-0.6B
  s2ft couplings my-checkpoint --json > couplings.json""",
)
def run_couplings(job: CouplingsArguments) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from s2ft.model.registry import explain

    try:
        example = None if job.example is None else load_file(job.example)
    except SafetensorError as error:
        raise ValueError(f"example {job.example} is no safetensors file: {error}") from error
    found = explain(hollow_model(folder_of_config(job.model)), example)
    print(json.dumps(found.to_dict(), indent=2) if job.json else found)


# ---- s2ft select ---------------------------------------------------------------------------------------

logger = logging.getLogger(__name__)


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
    protect_rows: int = option(32, group="model and data", **PROTECT_ROWS)
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


@command(
    "Choose the units that a configuration describes, print a table of them, and save them.",
    """\
  s2ft select --model meta-llama/Llama-3.2-1B --d-ratio 0.03 --selection weight --output units.json
  s2ft sft --model meta-llama/Llama-3.2-1B --data my-data.jsonl --units units.json --output my-run""",
    {S2FTConfig: "selection", ReadingOptions: "model and data"},
)
def run_select(job: SelectArguments, config: S2FTConfig, reading: ReadingOptions, given: dict) -> None:
    from s2ft.selection import with_protect_ratio

    check_ratios(config, given)
    new_file(job.output)
    config = with_protect_ratio(with_default_ratio(config, hollow_model(job.model)), bool(job.protect))
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
    import s2ft
    from s2ft.text.collator import needs_calibration, text_batches
    from s2ft.text.divergence import read_texts
    from s2ft.text.encoding import context_length
    from s2ft.train.device import gpu_or_cpu

    calibrated = needs_calibration(config)
    if bool(job.data) != calibrated:
        raise ValueError(f"selection={config.selection!r} " + ("needs data" if calibrated else "takes no data"))
    if not calibrated and not job.protect:
        return _choose_from_disk(job, config)
    protected = (
        read_texts(reading.of(job.protect, "train", beside=job.data), job.protect_rows, config.seed)
        if job.protect
        else None
    )
    model, tokenizer = load_model(job.model, job.dtype)
    model.to(gpu_or_cpu())
    calibration = _calibration(job, config, reading, model, tokenizer) if calibrated else None
    longest = min(job.max_length, context_length(model))
    protect = text_batches(protected, tokenizer, longest, job.protect_rows, config.seed, job.batch_size)
    return s2ft.select(model, config, calibration, protect=protect)


def _choose_from_disk(job: SelectArguments, config):
    """Return a selection that needs no data. Weights are read one at a time where that is possible."""
    import s2ft
    from s2ft.model.checkpoint import CannotStream, read_from
    from s2ft.selection import needs_weights

    try:
        if not needs_weights(config):
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
    room = min(job.max_length, context_length(model))
    tokenized = tokenize_rows(rows, tokenizer, prompt, max_length=room, skip_bad_rows=options.skip_bad_rows)
    return calibration_for(config, tokenizer, tokenized.dataset, job.calibration_examples, job.batch_size)
