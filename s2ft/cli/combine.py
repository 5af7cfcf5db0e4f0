"""s2ft combine: add adapters into a new one. It loads no model and does not import transformers."""

from dataclasses import dataclass
from pathlib import Path

from s2ft.cli.parse import parse
from s2ft.train.options import option

EXAMPLE = "  s2ft combine math-run chat-run --weights 0.7 0.3 --output math-and-chat"


@dataclass
class CombineArguments:
    adapters: list[str] = option(
        text="adapter folders, or output folders of s2ft sft", positional=True, metavar="ADAPTER"
    )
    output: str = option(text="folder for the new adapter; it must not exist", metavar="DIR")
    weights: list[float] | None = option(None, "one weight for each adapter", shown="1 for each", metavar="W")
    name: str | None = option(None, "name of the new adapter", shown="the name of the output folder")


def run(arguments: list[str]) -> None:
    (job,) = parse(
        "combine",
        "Add adapters of one base model into a new adapter, and print how many units they share.",
        [CombineArguments],
        arguments,
        EXAMPLE,
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
    from s2ft.adapter import overlap, read_adapter
    from s2ft.adapter.adapter import weighted_sum
    from s2ft.adapter.formats import native
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
    lines = [str(overlap(adapters)), *_prompt_line(adapters)]
    return "\n".join([*lines, f"adapter {name!r}: {output}"])


def _prompt_line(adapters: list) -> list[str]:
    """A line about the prompt of the sum, if the adapters were trained with different ones."""
    recorded = [adapter for adapter in adapters if "prompt" in adapter.info]
    if all(adapter.info["prompt"] == recorded[0].info["prompt"] for adapter in recorded):
        return []
    return [f"the adapters were trained with different prompts; the sum records that of {recorded[0].name!r}"]
