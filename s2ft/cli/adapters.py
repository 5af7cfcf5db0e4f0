"""s2ft info, combine, export, merge and patch: what is done with adapters that are trained.

info and combine load no model and import no transformers.
"""

from dataclasses import dataclass, make_dataclass
from pathlib import Path

from s2ft.cli.parse import ADAPTER, BASE_MODEL, OptionParser, command, quiet_transformers
from s2ft.config import refuse
from s2ft.conversion import EXPORTS, IMPORTS, export
from s2ft.files.plain_text import table
from s2ft.packages import check_packages
from s2ft.text.models import DTYPES, locate
from s2ft.train.options import Options, option

DIMS = {0: "rows", 1: "columns"}


@dataclass
class InfoArguments:
    folder: str = option(text=ADAPTER, positional=True, metavar="ADAPTER")


@command("Print the size, the origin, the settings and the deltas of an adapter.", "  s2ft info my-run", quiet=False)
def run_info(job: InfoArguments) -> None:
    print(describe(job.folder))


def describe(name: str | Path) -> str:
    """Return a text with the adapter's size, origin, settings, and a table of its deltas.

    Args:
        name: An adapter's folder, the output folder of a run, or a name on the hub.

    Raises:
        FileNotFoundError: There is no such folder or name, or the folder has no adapter.
        ValueError: The adapter is damaged, or it is one of PEFT.
    """
    from s2ft.adapter.formats import ADAPTER_FORMATS
    from s2ft.attached.loading import read_adapter
    from s2ft.files.reading import local_folder

    folder = local_folder(name)
    if (folder / "adapter_config.json").is_file() and not ADAPTER_FORMATS["peft"].module.matches(folder):
        raise ValueError(
            f"{folder} is a PEFT adapter: s2ft export --from-lora makes an S²FT adapter from a LoRA that changes "
            "the same few rows or columns"
        )
    adapter = read_adapter(folder)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    tensors = sum(delta.values.numel() * delta.values.element_size() for delta in adapter.deltas.values())
    units = sum(units.numel() for units in adapter.selection.units.values())
    dtypes = sorted({_dtype(delta.values) for delta in adapter.deltas.values()})
    lines = [
        f"adapter {adapter.name!r} in {folder}: {adapter.parameters:,} parameters, {size:,} bytes",
        f"{len(adapter.deltas)} projections, {units:,} units, {' and '.join(dtypes)}; as a LoRA about "
        f"{2 * tensors:,} bytes, if the weights are square",
        f"trained on: {len(adapter.fingerprint['layers'])} layers in {printable(adapter.fingerprint['dtype'])}"
        + ("" if adapter.couplings is None else f", {len(adapter.couplings)} couplings in the file"),
        f"selection digest: {adapter.selection.digest}",
    ]
    lines += [f"{printable(key)}: {_value(key, value)}" for key, value in adapter.info.items() if value is not None]
    config = adapter.config
    towers = f", towers {' '.join(config.towers)}" if config.towers else ""
    lines.append(f"{choice(config)}{towers}, seed {config.seed}, layout {config.layout}")
    lines += [
        f"{name} trained in full: {' × '.join(map(str, value.shape))}, {_dtype(value)}"
        for name, value in adapter.extra_weights.items()
    ]
    # Couplings of a known family are in its code, not in the file.
    one_sided = {coupling.main.name for coupling in adapter.couplings or () if coupling.is_one_sided}
    rows = [
        _row(path, delta, adapter.selection[path].numel(), path in one_sided) for path, delta in adapter.deltas.items()
    ]
    return "\n".join([*lines, table(rows)])


def _row(path: str, delta, units: int, one_sided: bool) -> tuple[str, ...]:
    # A head or a group spans several rows or columns.
    word = ((("output", "input")[delta.dim], "group") if one_sided else ("channel", "head"))[
        units != delta.index.numel()
    ]
    return (
        path,
        f"{units} {word}{'s' * (units != 1)}",
        f"{delta.index.numel()} {DIMS[delta.dim]}",
        _dtype(delta.values),
        f"largest update {delta.values.abs().max():.3g}",
    )


def _dtype(values) -> str:
    return str(values.dtype).removeprefix("torch.")


def _value(key: str, value) -> str:
    """Return a value of the adapter's info as text. The prompt's template is many lines, so its length is shown."""
    if not isinstance(value, dict):
        return printable(value)
    if key != "prompt":
        kept = {name: one for name, one in value.items() if one not in (None, [], {})}
        return ", ".join(f"{printable(name)} {printable(one)}" for name, one in kept.items())
    template, system = value.get("template"), value.get("system")
    words = (
        printable(value.get("form")),
        "" if template is None else f"template of {len(str(template)):,} characters",
        "" if system is None else f"system prompt {printable(system)!r}",
    )
    return ", ".join(filter(None, words))


def printable(value) -> str:
    """Return the value as text on one line, with control characters escaped."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in str(value))


def choice(config) -> str:
    """Describe how the units were chosen."""
    if config.units is not None:
        return "units: given by the user"
    ratios = ", ".join(f"{key}_ratio {value:g}" for key, value in config.ratios.items())
    words = (
        f"ratios: {ratios}; selection {config.selection}",
        f"{config.order} first" if config.selection != "random" else "",
        f"allocation {config.allocation}" if config.allocation != "uniform" else "",
        *(f"{name} {getattr(config, name):,}" for name in ("budget", "match_lora_rank") if getattr(config, name)),
        "some units excluded" if config.exclude else "",
        "" if config.protect_ratio is None else f"{config.protect_ratio:.0%} of the units protected",
    )
    return ", ".join(filter(None, words))


# ---- s2ft combine --------------------------------------------------------------------------------------


@dataclass
class CombineArguments:
    adapters: list[str] = option(
        text="adapter folders, or output folders of s2ft sft", positional=True, metavar="ADAPTER"
    )
    output: str = option(text="folder for the new adapter; it must not exist", metavar="DIR")
    weights: list[float] | None = option(None, "one weight for each adapter", shown="1 for each", metavar="W")
    name: str | None = option(None, "name of the new adapter", shown="the name of the output folder")


@command(
    "Add adapters of one base model into a new adapter, and print how many units they share.",
    "  s2ft combine math-run chat-run --weights 0.7 0.3 --output math-and-chat",
    quiet=False,
)
def run_combine(job: CombineArguments) -> None:
    from s2ft.adapter import native
    from s2ft.adapter.adapter import overlap, weighted_sum
    from s2ft.attached.loading import read_adapter

    weights = job.weights or [1.0] * len(job.adapters)
    output = Path(job.output).expanduser()
    if len(weights) != len(job.adapters):
        raise ValueError(f"there are {len(job.adapters)} adapters and {len(weights)} weights: give one weight for each")
    if output.exists():
        raise FileExistsError(f"output {output} exists")
    name = output.name if job.name is None else job.name
    adapters = [read_adapter(folder) for folder in job.adapters]
    native.write(weighted_sum(list(zip(adapters, weights)), name), output)
    print(overlap(adapters))
    recorded = [adapter for adapter in adapters if "prompt" in adapter.info]
    if any(adapter.info["prompt"] != recorded[0].info["prompt"] for adapter in recorded):
        print(f"the adapters were trained with different prompts; the sum records that of {recorded[0].name!r}")
    print(f"adapter {name!r}: {output}")


# ---- s2ft export and merge -----------------------------------------------------------------------------


def run_export(arguments: list[str]) -> None:
    formats = "\n".join(f"{name:<9}{one.summary}" for name, one in EXPORTS.items())
    description = f"""Write an adapter for other tools, read it again and compare.

{formats}

With --from-lora, convert in the other direction: a LoRA that has the structure of S²FT becomes an adapter. --from-peft
does so with an adapter that PEFT saved, for example in Axolotl."""
    example = "  s2ft export my-run --model meta-llama/Llama-3.2-1B --format lora --output my-lora"
    job = OptionParser("export", description, [_options()], example).given(arguments)
    sources = [name for name in IMPORTS if f"from_{name}" in job]
    target = f"from-{sources[0]}" if sources else job.get("format", "lora")
    owners = {word: [name for name, one in EXPORTS.items() if word in one.options] for word in job}
    owners["name"] = [f"from-{name}" for name in IMPORTS]
    given = {word: value for word, value in job.items() if owners.get(word)}
    refuse(
        (
            ("adapter" in job) == bool(sources) or len(sources) > 1,
            f"give an ADAPTER to export, or {' or '.join(f'--from-{name}' for name in IMPORTS)} with a folder to "
            "convert, and not both",
        ),
        (sources and "format" in job, f"--{target} writes an adapter, so there is no --format"),
        *(
            (target not in kinds, f"--{word.replace('_', '-')} is for {' and '.join(kinds)}, not for {target}")
            for word, kinds in sorted(owners.items())
            if word in given
        ),
        *(("model" not in job, f"missing: --model, the base of {job[f'from_{name}']}") for name in sources),
    )
    dtype = job.get("dtype", "auto")
    check_packages(f"s2ft export --format {target}")
    quiet_transformers()
    if sources:
        from s2ft.conversion.adapter_formats import convert

        name, folder = sources[0], job[f"from_{sources[0]}"]
        print(convert(job["model"], folder, job["output"], dtype, format_name=name, name=job.get("name")))
    else:
        from s2ft.text.adapter_prompts import base_name

        base = base_name(job.get("model"), job["adapter"])
        print(export(target, base, job["adapter"], job["output"], dtype, **given))


def _options() -> type:
    """The options of the command as a dataclass: its own, and those of the formats."""
    named = {name: about for one in EXPORTS.values() for name, about in one.options.items()}
    owners = {name: ", ".join(kind for kind, one in EXPORTS.items() if name in one.options) for name in named}
    sources = ", ".join(f"from-{name}" for name in IMPORTS)
    found = {
        "adapter": option(None, ADAPTER, positional=True, metavar="ADAPTER"),
        "model": option(None, **BASE_MODEL),
        "format": option("lora", "the format to write", choices=tuple(EXPORTS)),
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


@command(
    "Write base model and adapter as one checkpoint, which transformers loads without s2ft. Weights are read and "
    "written one at a time: a model of any size needs the memory of a few of its tensors. A base that is a GGUF "
    "file can be written as one, and a base in NF4, or of compressed-tensors without --dtype and --max-shard-size, "
    "is: only the blocks of trained units change.",
    "  s2ft merge --model meta-llama/Llama-3.2-1B --adapter my-run --output my-model",
)
def run_merge(job: MergeArguments) -> None:
    from s2ft.codecs.packed_folder import PackedFolder
    from s2ft.conversion import packed
    from s2ft.model.checkpoint import packed_base
    from s2ft.text.adapter_prompts import base_name

    base = base_name(job.model, job.adapter)
    plain = job.dtype != "auto" or job.max_shard_size is not None
    to_gguf = job.output.endswith(".gguf")
    if to_gguf and plain:
        raise ValueError("a .gguf file has the types of its base: leave out --dtype and --max-shard-size")
    source, is_gguf = locate(base)
    if to_gguf or not plain and not is_gguf and isinstance(packed_base(source), PackedFolder):
        print(packed.export(base, job.adapter, job.output))
    else:
        print(export("merged", base, job.adapter, job.output, job.dtype, max_shard_size=job.max_shard_size))


# ---- s2ft patch ----------------------------------------------------------------------------------------


@dataclass
class PatchArguments(Options):
    file: str = option(text="a .gguf file, the adapter's base", positional=True, metavar="FILE")
    adapter: str | None = option(None, ADAPTER, positional=True, metavar="ADAPTER", shown="print which one it has")
    undo: bool = option(False, "put the base's bytes back, also after an interrupt")


@command(
    "Write an adapter into the blocks of a quantized file in place. The base's bytes are kept in a file beside it, "
    "so that they can be put back whatever happens. Stop programs that use the file before.",
    "  s2ft patch model.Q4_K_M.gguf my-run\n  s2ft patch model.Q4_K_M.gguf --undo",
)
def run_patch(job: PatchArguments) -> None:
    if job.undo and job.adapter is not None:
        raise ValueError("--undo takes the adapter out, so give no ADAPTER with it")
    from s2ft.conversion.packed import patch, state, undo

    print(undo(job.file) if job.undo else state(job.file) if job.adapter is None else patch(job.file, job.adapter))
