"""s2ft export: write an adapter for other tools, or convert an adapter of another tool."""

import argparse

from s2ft.cli.parse import ADAPTER, BASE, Help, Parser, choice, quiet_transformers
from s2ft.export import EXPORTS, IMPORTS, export
from s2ft.packages import check_packages
from s2ft.text.models import DTYPES

DEFAULT = "lora"
DESCRIPTION = """Write an adapter for other tools, read it again and compare.

{formats}

With --from-lora, convert in the other direction: a LoRA that has the structure of S²FT becomes an adapter. --from-peft
does so with an adapter that PEFT saved, for example in Axolotl."""

EXAMPLE = "  s2ft export my-run --model meta-llama/Llama-3.2-1B --format lora --output my-lora"


def run(arguments: list[str]) -> None:
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
    for option, keywords in {name: text for one in EXPORTS.values() for name, text in one.options.items()}.items():
        owners = ", ".join(name for name, one in EXPORTS.items() if option in one.options)
        keywords = {**keywords, "help": f"{owners}: {keywords['help']}"}
        parser.add_argument(_flag(option), default=argparse.SUPPRESS, **keywords)
    parser.add_argument(
        "--name",
        default=argparse.SUPPRESS,
        help=f"{', '.join(f'from-{name}' for name in IMPORTS)}: name of the new adapter (default: default)",
    )
    return parser


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


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
    given = {option: job[option] for options in allowed.values() for option in options if option in job}
    for option in sorted(given.keys() - allowed[kind]):
        kinds = " and ".join(name for name, options in allowed.items() if option in options)
        raise ValueError(f"{_flag(option)} is for {kinds}, not for {kind}")
    if sources:
        given.setdefault("name", None)
    return (sources[0] if sources else None), given
