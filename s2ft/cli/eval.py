"""s2ft eval: score a model, with or without an adapter."""

from dataclasses import dataclass

from s2ft.cli.parse import ADAPTER, DTYPE, MODEL, parse, quiet_transformers
from s2ft.text.data.options import DATA, ReadingOptions
from s2ft.text.models import DTYPES
from s2ft.text.scoring import TASKS
from s2ft.train.options import check_fields, option

EXAMPLE = "  s2ft eval --model meta-llama/Llama-3.2-1B --adapter my-run --data test.jsonl --task arithmetic"


@dataclass
class EvalArguments:
    model: str = option(text=MODEL)
    data: list[str] = option(
        text=f"{DATA}; the field `answer` of a row is scored, or its output if there is none", metavar="FILE_OR_NAME"
    )
    task: str = option(
        text="arithmetic scores the last number of the generated text, commonsense the first answer word "
        "(true, answer1, ...)",
        choices=TASKS,
    )
    adapter: str | None = option(None, ADAPTER, metavar="ADAPTER")
    batch_size: int = option(32, "prompts that are answered at once", unit="prompts", least=1)
    max_new_tokens: int = option(256, "longest answer", unit="tokens", least=1)
    limit: int | None = option(None, "use the first N rows only", shown="all rows", least=1)
    dtype: str = option("auto", DTYPE, choices=DTYPES)
    output: str | None = option(None, "write the accuracy and every answer to this JSON file", metavar="FILE")

    def __post_init__(self) -> None:
        check_fields(self)


def run(arguments: list[str]) -> None:
    description = "Generate an answer to each row greedily and score it."
    job, reading = parse("eval", description, [EvalArguments, ReadingOptions], arguments, EXAMPLE)
    quiet_transformers()
    score(job, reading)


def score(job: EvalArguments, reading: ReadingOptions) -> None:
    """Score the model and print the accuracy.

    Args:
        job: The options of the command.
        reading: How the data is read.

    Raises:
        FileExistsError: The output file exists.
        FileNotFoundError: The folder of the output file does not exist.
        ValueError: A row can't be scored, or the model or the adapter can't be loaded.
    """
    from pathlib import Path

    from s2ft.text.adapter_prompts import load_with_adapter
    from s2ft.text.evaluation import evaluate
    from s2ft.text.examples import read_examples
    from s2ft.text.scoring import right_answer
    from s2ft.train.device import gpu_or_cpu
    from s2ft.train.generation_memory import explain_generation
    from s2ft.train.output import write_json

    output = Path(job.output) if job.output else None
    if output and output.exists():
        raise FileExistsError(f"output {output} exists")
    if output and not output.parent.is_dir():
        raise FileNotFoundError(f"output {output} is in a folder that doesn't exist")
    examples = read_examples(reading.of(job.data, "test", job.limit))
    for example in examples:  # A row that can't be scored is reported before the model is loaded.
        right_answer(example, job.task)
    model, prompter = load_with_adapter(job.model, job.adapter, job.dtype)
    with explain_generation(model, job.batch_size, job.max_new_tokens):
        model.to(gpu_or_cpu())
        result = evaluate(
            model, prompter.tokenizer, examples, job.task, job.batch_size, job.max_new_tokens, prompt=prompter.format
        )
    print(result)
    if output:
        write_json(output, {"model": job.model, "adapter": job.adapter, "data": job.data, **result.to_dict()})
