"""s2ft info and combine: describe adapters and add them up. No model is loaded, and transformers is not imported."""

from dataclasses import dataclass
from pathlib import Path

from s2ft.cli.parse import ADAPTER, parse
from s2ft.files.plain_text import table
from s2ft.train.options import option

DIMS = {0: "rows", 1: "columns"}


@dataclass
class InfoArguments:
    folder: str = option(text=ADAPTER, positional=True, metavar="ADAPTER")


def run_info(arguments: list[str]) -> None:
    (job,) = parse(
        "info",
        "Print the size, the origin, the settings and the deltas of an adapter.",
        [InfoArguments],
        arguments,
        "  s2ft info my-run",
    )
    print(describe(job.folder))


def describe(name: str | Path) -> str:
    """Return a text with the adapter's size, origin, settings, and a table of its deltas.

    Args:
        name: An adapter's folder, the output folder of a run, or a name on the hub.

    Raises:
        FileNotFoundError: There is no such folder or name, or the folder has no adapter.
        ValueError: The adapter is damaged, or it is one of PEFT.
    """
    from s2ft.adapter.folders import resolve
    from s2ft.adapter.formats import ADAPTER_FORMATS
    from s2ft.attached.loading import read_adapter

    folder = resolve(name)
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
    if one_sided:
        word = ("output", "input")[delta.dim] if units == delta.index.numel() else "group"
    else:
        word = "channel" if units == delta.index.numel() else "head"  # A head spans several rows or columns.
    count = f"{delta.index.numel()} {DIMS[delta.dim]}"
    largest = f"largest update {delta.values.abs().max():.3g}"
    return path, f"{units} {word}{'s' * (units != 1)}", count, _dtype(delta.values), largest


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
    words = [printable(value.get("form"))]
    words += [] if template is None else [f"template of {len(str(template)):,} characters"]
    words += [] if system is None else [f"system prompt {printable(system)!r}"]
    return ", ".join(words)


def printable(value) -> str:
    """Return the value as text on one line, with control characters escaped."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in str(value))


def choice(config) -> str:
    """Describe how the units were chosen."""
    if config.units is not None:
        return "units: given by the user"
    words = [
        f"ratios: {', '.join(f'{key}_ratio {value:g}' for key, value in config.ratios.items())}; selection "
        f"{config.selection}"
    ]
    words += [f"{config.order} first"] if config.selection != "random" else []
    words += [f"allocation {config.allocation}"] if config.allocation != "uniform" else []
    words += [f"{name} {getattr(config, name):,}" for name in ("budget", "match_lora_rank") if getattr(config, name)]
    words += ["some units excluded"] if config.exclude else []
    words += [] if config.protect_ratio is None else [f"{config.protect_ratio:.0%} of the units protected"]
    return ", ".join(words)


# ---- s2ft combine --------------------------------------------------------------------------------------


@dataclass
class CombineArguments:
    adapters: list[str] = option(
        text="adapter folders, or output folders of s2ft sft", positional=True, metavar="ADAPTER"
    )
    output: str = option(text="folder for the new adapter; it must not exist", metavar="DIR")
    weights: list[float] | None = option(None, "one weight for each adapter", shown="1 for each", metavar="W")
    name: str | None = option(None, "name of the new adapter", shown="the name of the output folder")


def run_combine(arguments: list[str]) -> None:
    (job,) = parse(
        "combine",
        "Add adapters of one base model into a new adapter, and print how many units they share.",
        [CombineArguments],
        arguments,
        "  s2ft combine math-run chat-run --weights 0.7 0.3 --output math-and-chat",
    )
    print(combine(job.adapters, job.weights, job.name, Path(job.output)))


def combine(folders: list[str], weights: list[float] | None, name: str | None, output: Path) -> str:
    """Write the weighted sum of adapters.

    Args:
        folders: Adapter folders.
        weights: One weight for each adapter, or None for 1 each.
        name: Name of the new adapter, or None for the name of the output folder.
        output: Folder to write.

    Returns:
        A text with the units that the adapters share, and the folder of the new adapter.

    Raises:
        ValueError: The adapters do not fit together, or the name or the number of weights is wrong.
        FileNotFoundError: An adapter does not exist.
        FileExistsError: The output folder exists.
    """
    from s2ft.adapter import native
    from s2ft.adapter.adapter import overlap, weighted_sum
    from s2ft.attached.loading import read_adapter
    from s2ft.files.reading import check_adapter_name

    weights = [1.0] * len(folders) if weights is None else weights
    if len(weights) != len(folders):
        raise ValueError(f"there are {len(folders)} adapters and {len(weights)} weights: give one weight for each")
    if output.exists():
        raise FileExistsError(f"output {output} exists")
    name = output.name if name is None else name
    check_adapter_name(name)
    adapters = [read_adapter(folder) for folder in folders]
    native.write(weighted_sum(list(zip(adapters, weights)), name), output)
    lines = [str(overlap(adapters))]
    recorded = [adapter for adapter in adapters if "prompt" in adapter.info]
    if any(adapter.info["prompt"] != recorded[0].info["prompt"] for adapter in recorded):
        lines.append(f"the adapters were trained with different prompts; the sum records that of {recorded[0].name!r}")
    return "\n".join([*lines, f"adapter {name!r}: {output}"])
