"""s2ft fuse: add adapters up into a new one. Quick: no model, no transformers."""

import argparse
from pathlib import Path


def run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="s2ft fuse", description="Add adapters of one base up into a new one, and say what they have in common."
    )
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="adapter folders, or output folders of s2ft finetune"
    )
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one for each adapter; default: 1 each")
    parser.add_argument("--name", help="of the new adapter; default: the output folder's name")
    parser.add_argument("--output", required=True, help="folder for the new adapter; it must not exist")
    job = parser.parse_args(arguments)
    print(fuse(job.adapters, job.weights, job.name, Path(job.output)))


def fuse(folders: list[str], weights: list[float] | None, name: str | None, output: Path) -> str:
    """The overlap in words, when the sum is written. Raises: ValueError or FileNotFoundError, nothing written."""
    from s2ft.adapter import overlap, read_adapter
    from s2ft.adapter.adapter import weighted_sum
    from s2ft.adapter.formats import native
    from s2ft.files.reading import check_adapter_name

    weights = [1.0] * len(folders) if weights is None else weights
    if len(weights) != len(folders):
        raise ValueError(f"there are {len(folders)} adapters and {len(weights)} weights: give one for each")
    if output.exists():
        raise FileExistsError(f"output {output} exists")
    name = output.name if name is None else name
    check_adapter_name(name)
    adapters = [read_adapter(folder) for folder in folders]
    native.write(weighted_sum(list(zip(adapters, weights)), name), output)
    return f"{overlap(adapters)}\nadapter {name!r}: {output}"
