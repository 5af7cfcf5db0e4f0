"""s2ft merge: write model and adapter as a stock checkpoint."""

from dataclasses import dataclass

from s2ft.cli.parse import ADAPTER, BASE, parse, quiet_transformers
from s2ft.text.models import DTYPES
from s2ft.train.options import Options, option

EXAMPLE = "  s2ft merge --model meta-llama/Llama-3.2-1B --adapter my-run --output my-model"


@dataclass
class MergeArguments(Options):
    model: str = option(text=BASE)
    adapter: str = option(text=ADAPTER, metavar="DIR")
    output: str = option(text="folder for the checkpoint; it must not exist", metavar="DIR")
    dtype: str = option("auto", "dtype of the merged weights; auto: the dtype of the training", choices=DTYPES)
    max_shard_size: str | None = option(
        None, "the largest file of weights, for example 2GB; default: that of transformers", metavar="SIZE"
    )


def run(arguments: list[str]) -> None:
    (job,) = parse(
        "merge",
        "Write base model and adapter as one checkpoint, which transformers loads without s2ft. Weights are read and "
        "written one at a time: a model of any size needs the memory of a few of its tensors.",
        [MergeArguments],
        arguments,
        EXAMPLE,
    )
    quiet_transformers()
    from s2ft.export.merged import export

    size = job.max_shard_size
    print(export(job.model, job.adapter, job.output, job.dtype, max_shard_size=size))
