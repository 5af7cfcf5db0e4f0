"""s2ft export and merge: write an adapter for other tools, or convert an adapter of another tool."""

from dataclasses import dataclass, make_dataclass

from s2ft.cli.parse import ADAPTER, BASE_MODEL, OptionParser, parse, quiet_transformers
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
    formats = "\n".join(f"{name:<9}{one.summary}" for name, one in EXPORTS.items())
    parser = OptionParser("export", DESCRIPTION.format(formats=formats), [_options()], EXAMPLE)
    job = parser.given(arguments)
    source, given = _check(job)
    target, dtype = job.get("format", DEFAULT), job.get("dtype", "auto")
    check_packages(f"s2ft export --format {target}")
    quiet_transformers()
    if source is not None:
        from s2ft.export.adapter_formats import convert

        if "model" not in job:
            raise ValueError(f"missing: --model, the base of {job[f'from_{source}']}")

        folder, name = job[f"from_{source}"], job.get("name")
        print(convert(job["model"], folder, job["output"], dtype, format_name=source, name=name))
    else:
        base = _base(job.get("model"), job["adapter"])
        print(export(target, base, job["adapter"], job["output"], dtype, **given))


def _base(model: str | None, adapter: str) -> str:
    from s2ft.text.adapter_prompts import base_name  # not at the top, where it would load PyTorch for a mistake

    return base_name(model, adapter)


def _options() -> type:
    """The options of the command as a dataclass: its own, and those of the formats."""
    named = {name: about for one in EXPORTS.values() for name, about in one.options.items()}
    owners = {name: ", ".join(kind for kind, one in EXPORTS.items() if name in one.options) for name in named}
    sources = ", ".join(f"from-{name}" for name in IMPORTS)
    found = {
        "adapter": option(None, ADAPTER, positional=True, metavar="ADAPTER"),
        "model": option(None, **BASE_MODEL),
        "format": option(DEFAULT, "the format to write", choices=tuple(EXPORTS)),
        **{
            f"from_{name}": option(None, f"a folder of format {name} to convert to an adapter", metavar="DIR")
            for name in IMPORTS
        },
        "output": option(text="the folder to write; it must not exist", metavar="DIR"),
        "dtype": option("auto", "dtype of the weights; auto: the dtype of the training", choices=DTYPES),
        **{name: option(**{**one, "text": f"{owners[name]}: {one['text']}"}) for name, (_, one) in named.items()},
        "name": option(None, f"{sources}: name of the new adapter", shown="default"),
    }
    fields = [(name, named.get(name, (str,))[0], one) for name, one in found.items()]
    return make_dataclass("ExportArguments", fields, kw_only=True)


def _check(job: dict) -> tuple[str | None, dict]:
    """Check the options against each other.

    Returns:
        The format to convert from, or None; and the options that were given for the one format of this call.
    """
    sources = [name for name in IMPORTS if f"from_{name}" in job]
    if ("adapter" in job) == bool(sources) or len(sources) > 1:
        flags = " or ".join(f"--from-{name}" for name in IMPORTS)
        raise ValueError(f"give an ADAPTER to export, or {flags} with a folder to convert, and not both")
    if sources and "format" in job:
        raise ValueError(f"--from-{sources[0]} writes an adapter, so there is no --format")
    kind = f"from-{sources[0]}" if sources else job.get("format", DEFAULT)
    allowed = {name: set(one.options) for name, one in EXPORTS.items()}
    allowed |= {f"from-{name}": {"name"} for name in IMPORTS}
    given = {word: job[word] for options in allowed.values() for word in options if word in job}
    for word in sorted(given.keys() - allowed[kind]):
        kinds = " and ".join(name for name, options in allowed.items() if word in options)
        raise ValueError(f"--{word.replace('_', '-')} is for {kinds}, not for {kind}")
    return (sources[0] if sources else None), given


@dataclass
class MergeArguments(Options):
    adapter: str = option(text=ADAPTER, metavar="DIR")
    output: str = option(
        text="folder for the checkpoint, or for a base that is a .gguf file such a file; it must not exist",
        metavar="PATH",
    )
    model: str | None = option(None, **BASE_MODEL)
    dtype: str = option("auto", "dtype of the merged weights; auto: the dtype of the training", choices=DTYPES)
    max_shard_size: str | None = option(
        None, "the largest file of weights, for example 2GB; default: that of transformers", metavar="SIZE"
    )


def run_merge(arguments: list[str]) -> None:
    (job,) = parse(
        "merge",
        "Write base model and adapter as one checkpoint, which transformers loads without s2ft. Weights are read and "
        "written one at a time: a model of any size needs the memory of a few of its tensors. A base that is a GGUF "
        "file can be written as one: only the blocks of trained units change.",
        [MergeArguments],
        arguments,
        "  s2ft merge --model meta-llama/Llama-3.2-1B --adapter my-run --output my-model",
    )
    quiet_transformers()
    base = _base(job.model, job.adapter)
    if job.output.endswith(".gguf"):
        if job.dtype != "auto" or job.max_shard_size is not None:
            raise ValueError("a .gguf file has the types of its base: leave out --dtype and --max-shard-size")
        from s2ft.export import packed

        print(packed.export(base, job.adapter, job.output))
        return
    print(export("merged", base, job.adapter, job.output, job.dtype, max_shard_size=job.max_shard_size))
