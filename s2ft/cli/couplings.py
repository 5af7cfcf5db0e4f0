"""s2ft couplings: print which layers of a model share units, and what becomes of every weight of its blocks."""

import json
from dataclasses import dataclass

from s2ft.cli.parse import MODEL, parse, quiet_transformers
from s2ft.train.options import option

EXAMPLE = """  s2ft couplings Qwen/Qwen3-0.6B
  s2ft couplings my-checkpoint --json > couplings.json"""


@dataclass
class CouplingsArguments:
    model: str = option(text=MODEL, positional=True, metavar="MODEL")
    example: str | None = option(
        None,
        "safetensors file with an input of the model, its tensors by name; default: inputs made from the config",
        metavar="FILE",
    )
    json: bool = option(False, "print JSON: the couplings with all their fields, and a row for every weight")


def run(arguments: list[str]) -> None:
    (job,) = parse(
        "couplings",
        "Print which layers of a model share units, and what becomes of every weight of its blocks. Only the model's "
        "config is read, no weights.",
        [CouplingsArguments],
        arguments,
        EXAMPLE,
    )
    quiet_transformers()
    from s2ft.model.registry import explain
    from s2ft.text.models import hollow_model

    found = explain(hollow_model(job.model), _example(job.example))
    print(json.dumps(found.to_dict(), indent=2) if job.json else found)


def _example(file: str | None):
    if file is None:
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"example {file} is no safetensors file: {error}") from error
