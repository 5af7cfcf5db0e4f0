"""s2ft info: describe an adapter folder. It loads no model and does not import transformers."""

from dataclasses import dataclass
from pathlib import Path

from s2ft.cli.parse import ADAPTER, parse
from s2ft.files.tables import table
from s2ft.train.options import option

DIMS = {0: "rows", 1: "columns"}
EXAMPLE = "  s2ft info my-run"


@dataclass
class InfoArguments:
    folder: str = option(text=ADAPTER, positional=True, metavar="ADAPTER")


def run(arguments: list[str]) -> None:
    (job,) = parse(
        "info",
        "Print the size, the origin, the settings and the deltas of an adapter.",
        [InfoArguments],
        arguments,
        EXAMPLE,
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
    from s2ft.adapter import read_adapter
    from s2ft.adapter.hub import resolve
    from s2ft.files.formats import ADAPTER_FORMATS

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
    dtypes = sorted({_dtype(delta) for delta in adapter.deltas.values()})
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
        f"{name} trained in full: {' × '.join(map(str, value.shape))}, {_name(value.dtype)}"
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
    return path, f"{units} {word}{'s' * (units != 1)}", count, _dtype(delta), largest


def _dtype(delta) -> str:
    return _name(delta.values.dtype)


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    if config.selection != "random":
        words.append(f"{config.order} first")
    if config.allocation != "uniform":
        words.append(f"allocation {config.allocation}")
    words += [f"{name} {getattr(config, name):,}" for name in ("budget", "match_lora_rank") if getattr(config, name)]
    words += ["some units excluded"] if config.exclude else []
    words += [] if config.protect_ratio is None else [f"{config.protect_ratio:.0%} of the units protected"]
    return ", ".join(words)
