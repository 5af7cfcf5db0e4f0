"""s2ft merge: write model and adapter as a stock checkpoint."""

from dataclasses import dataclass, field

from s2ft.cli.parse import parse, quiet_transformers


@dataclass
class MergeArguments:
    model: str = field(metadata={"help": "the adapter's base: a checkpoint folder, a name on the hub, or a .gguf file"})
    adapter: str = field(metadata={"help": "an adapter folder, or the output folder of s2ft finetune"})
    output: str = field(metadata={"help": "folder for the checkpoint; it must not exist"})
    dtype: str = field(default="auto", metadata={"help": "auto (that of training), float32, bfloat16, float16"})


def run(arguments: list[str]) -> None:
    (job,) = parse("merge", "Write a checkpoint that stock transformers loads.", [MergeArguments], arguments)
    quiet_transformers()
    from s2ft.export import EXPORTS

    print(EXPORTS["merged"].run(job.model, job.adapter, job.output, job.dtype))
