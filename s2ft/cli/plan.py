"""s2ft plan: what ratios train of a model, without reading its weights."""

import json
from dataclasses import asdict, dataclass

from s2ft.cli.parse import MODEL, given_options, parse, quiet_transformers
from s2ft.text.models import DTYPES
from s2ft.train.options import check_fields, option, with_default_ratio

EXAMPLE = """  s2ft plan meta-llama/Llama-3.2-1B
  s2ft plan meta-llama/Llama-3.2-1B --d-ratio 0.03 --o-ratio 0.1 --ratios 0.02 0.04 0.08"""
SHARED = {"group": "model and data"}


@dataclass
class PlanArguments:
    model: str = option(text=MODEL, positional=True, metavar="MODEL")
    ratios: list[float] | None = option(
        None, "ratios of the table, for every projection that is trained", shown="0.01 0.03 0.05 0.1 0.2", **SHARED
    )
    dtype: str = option("auto", "dtype of the model's weights; auto: that of its config", choices=DTYPES, **SHARED)
    json: bool = option(False, "print JSON", **SHARED)

    def __post_init__(self) -> None:
        check_fields(self)
        check_ratios(self.ratios)


def check_ratios(ratios: list[float] | None) -> None:
    """Raise ValueError for a ratio that is no share of the units."""
    for ratio in ratios or ():
        if not 0 < ratio <= 1:
            raise ValueError(f"ratios must be above 0 and at most 1, got {ratio:g}")


def run(arguments: list[str]) -> None:
    from s2ft.config import S2FTConfig

    job, config = parse(
        "plan",
        "Print what would be trained of a model, and a table of ratios with the LoRA rank of the same size. Only the "
        "model's config is read, no weights. s2ft estimate adds the memory.",
        [PlanArguments, S2FTConfig],
        arguments,
        EXAMPLE,
        {S2FTConfig: "selection"},
    )
    quiet_transformers()
    import s2ft
    from s2ft.train.rates import suggested_rate, width_of
    from s2ft.train.ratio_table import as_random, rows_of, table

    config = with_default_ratio(config, given_options(arguments))
    model = hollow(job.model, job.dtype)
    report = s2ft.plan(model, as_random(config))
    rows = rows_of(model, config, **({"ratios": job.ratios} if job.ratios else {}))
    width = width_of(model)
    rate = suggested_rate(width) if width else None
    if job.json:
        found = {"learning_rate": rate and asdict(rate), "rows": [row.to_dict() for row in rows]}
        print(json.dumps({"model": job.model, **found}, indent=2))
        return
    print(f"{report}\n\n{table(rows)}\nLoRA rank: of a LoRA on the same weights with as many parameters")
    if rate:
        print(f"learning rate: no rule is known for all tasks; start with {rate}")


def hollow(name: str, dtype: str):
    """Return a model without data in a dtype."""
    import torch

    from s2ft.text.models import hollow_model

    model = hollow_model(name)
    return model if dtype == "auto" else model.to(getattr(torch, dtype))
