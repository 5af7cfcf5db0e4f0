"""s2ft patch: write an adapter into a GGUF file in place, and take it back."""

from dataclasses import dataclass

from s2ft.cli.parse import ADAPTER, parse, quiet_transformers
from s2ft.train.options import Options, option


@dataclass
class PatchArguments(Options):
    file: str = option(text="a .gguf file, the adapter's base", positional=True, metavar="FILE")
    adapter: str | None = option(None, ADAPTER, positional=True, metavar="ADAPTER", shown="print which one it has")
    undo: bool = option(False, "put the base's bytes back, also after an interrupt")


def run_patch(arguments: list[str]) -> None:
    (job,) = parse(
        "patch",
        "Write an adapter into the blocks of a quantized file in place. The base's bytes are kept in a file beside it, "
        "so that they can be put back whatever happens. Stop programs that use the file before.",
        [PatchArguments],
        arguments,
        "  s2ft patch model.Q4_K_M.gguf my-run\n  s2ft patch model.Q4_K_M.gguf --undo",
    )
    if job.undo and job.adapter is not None:
        raise ValueError("--undo takes the adapter out, so give no ADAPTER with it")
    quiet_transformers()
    from s2ft.export.packed import patch, state, undo

    print(undo(job.file) if job.undo else state(job.file) if job.adapter is None else patch(job.file, job.adapter))
