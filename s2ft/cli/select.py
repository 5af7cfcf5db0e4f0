"""s2ft select: choose units and save them, without training."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from s2ft.cli.finetune import DEFAULT_D_RATIO
from s2ft.cli.parse import parse, quiet_transformers


@dataclass
class SelectArguments:
    model: str = field(metadata={"help": "a checkpoint folder, a name on the hub, or a .gguf file"})
    output: str = field(metadata={"help": "JSON file for the selection; it must not exist"})
    data: list[str] | None = field(
        default=None,
        metadata={
            "help": "calibration data, JSON or JSONL as for finetune; for selections by activation, product or gradient"
        },
    )
    calibration_examples: int | None = field(
        default=None, metadata={"help": "rows of the data to look at; default: one in a hundred, but at least 16"}
    )
    batch_size: int = field(default=8, metadata={"help": "rows of one forward pass"})
    max_length: int = field(default=1024, metadata={"help": "longest row in tokens; a longer one is left out"})
    dtype: str = field(
        default="auto",
        metadata={"help": "dtype of the model's weights: auto (the checkpoint's), float32, bfloat16, float16"},
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def run(arguments: list[str]) -> None:
    from s2ft.config import S2FTConfig

    job, config = parse(
        "select",
        "Choose the units that a config asks for, print a table of them, and save them.",
        [SelectArguments, S2FTConfig],
        arguments,
    )
    quiet_transformers()
    if not config.ratios and config.units is None:
        config = replace(config, d_ratio=DEFAULT_D_RATIO)
    if Path(job.output).exists():
        raise FileExistsError(f"output {job.output} exists: choose another")
    if not Path(job.output).absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder for output {job.output}")
    selection = choose(job, config)
    selection.save(job.output)
    print(f"{selection}\nselection: {job.output}")


def choose(job: SelectArguments, config):
    import torch

    import s2ft
    from s2ft.text.calibration import needs_calibration
    from s2ft.text.models import load_model

    calibrated = needs_calibration(config)
    if bool(job.data) != calibrated:
        raise ValueError(f"selection={config.selection!r} " + ("needs data" if calibrated else "takes no data"))
    model, tokenizer = load_model(job.model, job.dtype)
    if not calibrated:
        return s2ft.select(model, config)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return s2ft.select(model.to(accelerator or "cpu"), config, _calibration(job, config, model, tokenizer))


def _calibration(job: SelectArguments, config, model, tokenizer):
    from s2ft.text.calibration import calibration_for
    from s2ft.text.encoding import context_length, encode_examples
    from s2ft.text.examples import read_examples

    room = min(job.max_length, context_length(model) or job.max_length)
    rows = encode_examples(tokenizer, read_examples(job.data), room)
    return calibration_for(config, tokenizer, rows, job.calibration_examples, job.batch_size)
