"""s2ft info: say what an adapter folder holds. Quick: no model, no transformers."""

import argparse
from pathlib import Path

DIMS = {0: "rows", 1: "columns"}


def run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="s2ft info", description="Say what an adapter folder holds.")
    parser.add_argument("folder", help="an adapter folder, or the output folder of s2ft finetune")
    print(describe(Path(parser.parse_args(arguments).folder)))


def describe(folder: Path) -> str:
    """What the adapter is, where it comes from and a table of its deltas. Raises: as `s2ft.adapter.read_adapter`."""
    from s2ft.adapter import read_adapter
    from s2ft.adapter.folders import adapter_folder

    folder = adapter_folder(folder)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} is a PEFT adapter: s2ft export --from-lora makes an S²FT adapter of a LoRA "
            "that is one by its structure"
        )
    adapter = read_adapter(folder)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    tensors = sum(delta.values.numel() * delta.values.element_size() for delta in adapter.deltas.values())
    units = sum(units.numel() for units in adapter.selection.units.values())
    dtypes = sorted({_dtype(delta) for delta in adapter.deltas.values()})
    lines = [
        f"adapter {adapter.name!r} in {folder}: {adapter.parameters:,} parameters, {size:,} bytes",
        f"{len(adapter.deltas)} projections, {units:,} units, {' and '.join(dtypes)}; a LoRA of the same ranks has "
        f"about twice the bytes, {2 * tensors:,} where the weights are square",
        f"trained on: {len(adapter.fingerprint['layers'])} layers in {printable(adapter.fingerprint['dtype'])}"
        + ("" if adapter.couplings is None else f", {len(adapter.couplings)} couplings given by hand"),
        f"selection digest: {adapter.selection.digest}",
    ]
    lines += [f"{printable(key)}: {printable(value)}" for key, value in adapter.info.items() if value is not None]
    config = adapter.config
    lines.append(f"{choice(config)}, seed {config.seed}, layout {config.layout}")
    lines += [
        f"{name} trained whole: {' × '.join(map(str, value.shape))}, {_name(value.dtype)}"
        for name, value in adapter.extra_weights.items()
    ]
    width = max(map(len, adapter.deltas))
    return "\n".join(
        [*lines, *(_row(path, delta, adapter.selection[path].numel(), width) for path, delta in adapter.deltas.items())]
    )


def _row(path: str, delta, units: int, width: int) -> str:
    word = "channel" if units == delta.index.numel() else "head"  # of several rows or columns
    return (
        f"{path:<{width}}  {units:>6} {word + 's' * (units != 1):<8}  {delta.index.numel():>6} {DIMS[delta.dim]:<8} "
        f"{_dtype(delta)}  largest update {delta.values.abs().max():.3g}"
    )


def _dtype(delta) -> str:
    return _name(delta.values.dtype)


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def printable(value) -> str:
    """On one line, with nothing that a terminal takes for a command."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in str(value))


def choice(config) -> str:
    """How the units were chosen, in words."""
    if config.units is not None:
        return "units: given by hand"
    words = [
        f"ratios: {', '.join(f'{key}_ratio {value:g}' for key, value in config.ratios.items())}; selection "
        f"{config.selection}"
    ]
    if config.selection != "random":
        words.append(f"{config.order} first")
    if config.allocation != "uniform":
        words.append(f"allocation {config.allocation}")
    words += [f"{name} {getattr(config, name):,}" for name in ("budget", "match_lora_rank") if getattr(config, name)]
    return ", ".join(words + (["some units excluded"] if config.exclude else []))
