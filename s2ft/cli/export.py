"""s2ft export and merge: write an adapter for other tools, or convert an adapter of another tool."""

import argparse
from dataclasses import dataclass

from s2ft.cli.parse import ADAPTER, BASE, Help, Parser, choice, parse, quiet_transformers
from s2ft.export import EXPORTS, IMPORTS, export
from s2ft.packages import check_packages
from s2ft.text.models import DTYPES
from s2ft.train.options import Options, option

DEFAULT = "lora"
DESCRIPTION = """Write an adapter for other tools, read it again and compare.

{formats}

With --from-lora, convert in the other direction: a LoRA that has the structure of S²FT becomes an adapter. --from-peft
does so with an adapter that PEFT saved, for example in Axolotl."""

EXAMPLE = "  s2ft export my-run --model meta-llama/Llama-3.2-1B --format lora --output my-lora"


def run_export(arguments: list[str]) -> None:
    job = vars(_parser().parse_args(arguments))
    source, given = _check(job)
    check_packages(f"s2ft export --format {job['format']}")
    quiet_transformers()
    if source is not None:
        from s2ft.export.adapters import convert

        print(convert(job["model"], job[f"from_{source}"], job["output"], job["dtype"], format_name=source, **given))
    else:
        print(export(job["format"] or DEFAULT, job["model"], job["adapter"], job["output"], job["dtype"], **given))


def _parser() -> Parser:
    formats = "\n".join(f"{name:<9}{one.summary}" for name, one in EXPORTS.items())
    parser = Parser(
        prog="s2ft export",
        usage="s2ft export [ADAPTER] --model MODEL --output DIR [options]",
        description=DESCRIPTION.format(formats=formats),
        formatter_class=Help,
        allow_abbrev=False,
        epilog=f"example:\n{EXAMPLE}",
    )
    parser.add_argument("adapter", nargs="?", metavar="ADAPTER", help=ADAPTER)
    parser.add_argument("--model", required=True, help=BASE)
    parser.add_argument("--format", choices=tuple(EXPORTS), help=f"the format to write (default: {DEFAULT})")
    for name in IMPORTS:
        parser.add_argument(f"--from-{name}", metavar="DIR", help=f"a folder of format {name} to convert to an adapter")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write; it must not exist")
    parser.add_argument(
        "--dtype",
        default="auto",
        type=choice(DTYPES),
        metavar=f"{{{','.join(DTYPES)}}}",
        help="dtype of the weights; auto: the dtype of the training (default: auto)",
    )
    for word, keywords in {name: text for one in EXPORTS.values() for name, text in one.options.items()}.items():
        owners = ", ".join(name for name, one in EXPORTS.items() if word in one.options)
        keywords = {**keywords, "help": f"{owners}: {keywords['help']}"}
        parser.add_argument(f"--{word.replace('_', '-')}", default=argparse.SUPPRESS, **keywords)
    parser.add_argument(
        "--name",
        default=argparse.SUPPRESS,
        help=f"{', '.join(f'from-{name}' for name in IMPORTS)}: name of the new adapter (default: default)",
    )
    return parser


def _check(job: dict) -> tuple[str | None, dict]:
    """Check the options against each other.

    Returns:
        The format to convert from, or None; and the options that were given for the one format of this call.
    """
    sources = [name for name in IMPORTS if job[f"from_{name}"] is not None]
    if (job["adapter"] is None) == (not sources) or len(sources) > 1:
        flags = " or ".join(f"--from-{name}" for name in IMPORTS)
        raise ValueError(f"give an ADAPTER to export, or {flags} with a folder to convert, and not both")
    if sources and job["format"] is not None:
        raise ValueError(f"--from-{sources[0]} writes an adapter, so there is no --format")
    kind = f"from-{sources[0]}" if sources else job["format"] or DEFAULT
    allowed = {name: set(one.options) for name, one in EXPORTS.items()}
    allowed |= {f"from-{name}": {"name"} for name in IMPORTS}
    given = {word: job[word] for options in allowed.values() for word in options if word in job}
    for word in sorted(given.keys() - allowed[kind]):
        kinds = " and ".join(name for name, options in allowed.items() if word in options)
        raise ValueError(f"--{word.replace('_', '-')} is for {kinds}, not for {kind}")
    if sources:
        given.setdefault("name", None)
    return (sources[0] if sources else None), given


@dataclass
class MergeArguments(Options):
    model: str = option(text=BASE)
    adapter: str = option(text=ADAPTER, metavar="DIR")
    output: str = option(text="folder for the checkpoint; it must not exist", metavar="DIR")
    dtype: str = option("auto", "dtype of the merged weights; auto: the dtype of the training", choices=DTYPES)
    max_shard_size: str | None = option(
        None, "the largest file of weights, for example 2GB; default: that of transformers", metavar="SIZE"
    )


def run_merge(arguments: list[str]) -> None:
    (job,) = parse(
        "merge",
        "Write base model and adapter as one checkpoint, which transformers loads without s2ft. Weights are read and "
        "written one at a time: a model of any size needs the memory of a few of its tensors.",
        [MergeArguments],
        arguments,
        "  s2ft merge --model meta-llama/Llama-3.2-1B --adapter my-run --output my-model",
    )
    quiet_transformers()
    print(export("merged", job.model, job.adapter, job.output, job.dtype, max_shard_size=job.max_shard_size))
