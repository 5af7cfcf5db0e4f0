"""s2ft info: say what an adapter folder holds. Quick: no model, no transformers."""
import argparse
from pathlib import Path

DIMS = {0: "rows", 1: "columns"}


def run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="s2ft info", description="Say what an adapter folder holds.")
    parser.add_argument("folder", help="an adapter folder, or the output folder of s2ft finetune")
    print(describe(Path(parser.parse_args(arguments).folder)))


def describe(folder: Path) -> str:
    """The adapter's config and a table of its deltas. Raises: as `s2ft.adapter.read_adapter`."""
    from s2ft.adapter import read_adapter

    if not (folder / "s2ft_config.json").exists() and (folder / "adapter").is_dir():
        folder = folder / "adapter"
    adapter = read_adapter(folder)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    config = adapter.config
    lines = [f"adapter {adapter.name!r} in {folder}: {adapter.parameters:,} parameters, {size:,} bytes"]
    lines += [f"{key}: {value}" for key, value in adapter.info.items() if value is not None]
    lines.append(f"{choice(config)}, seed {config.seed}, layout {config.layout}")
    width = max(map(len, adapter.deltas))
    lines += [f"{path:<{width}}  {delta.index.numel():>6} {DIMS[delta.dim]:<8} "
              f"{str(delta.values.dtype).removeprefix('torch.')}  largest update {delta.values.abs().max():.3g}"
              for path, delta in adapter.deltas.items()]
    return "\n".join(lines)


def choice(config) -> str:
    """How the units were chosen, in words."""
    if config.units is not None:
        return "units: given by hand"
    words = [f"ratios: {', '.join(f'{key}_ratio {value:g}' for key, value in config.ratios.items())}; selection "
             f"{config.selection}"]
    if config.selection != "random":
        words.append(f"{config.order} first")
    if config.allocation != "uniform":
        words.append(f"allocation {config.allocation}")
    words += [f"{name} {getattr(config, name):,}" for name in ("budget", "match_lora_rank") if getattr(config, name)]
    return ", ".join(words + (["some units excluded"] if config.exclude else []))
