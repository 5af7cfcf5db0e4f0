"""s2ft eval: score a model, with or without an adapter."""

from dataclasses import dataclass, field

from s2ft.cli.parse import parse, quiet_transformers


@dataclass
class EvalArguments:
    model: str = field(metadata={"help": "a checkpoint folder, a name on the hub, or a .gguf file"})
    data: list[str] = field(metadata={"help": "JSON or JSONL files; `answer` is what is scored, else the output's"})
    task: str = field(
        metadata={
            "help": "arithmetic: the last number of the generated text; commonsense: the first "
            "answer word (true, answer1, …)"
        }
    )
    adapter: str | None = field(
        default=None, metadata={"help": "an adapter folder, or the output folder of s2ft finetune"}
    )
    batch_size: int = field(default=32, metadata={"help": "prompts generated at once"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer in tokens"})
    limit: int | None = field(default=None, metadata={"help": "take the first rows only"})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "auto (with an adapter that of its training, else the checkpoint's), float32, bfloat16, float16"
        },
    )
    output: str | None = field(default=None, metadata={"help": "write accuracy and every answer to this JSON file"})


def run(arguments: list[str]) -> None:
    (job,) = parse("eval", "Score a model by greedy generation.", [EvalArguments], arguments)
    quiet_transformers()
    score(job)


def score(job: EvalArguments) -> None:
    from pathlib import Path

    import torch

    import s2ft.adapter
    from s2ft.text.examples import read_examples
    from s2ft.text.models import dtype_of_base, load_model
    from s2ft.train.evaluate import evaluate
    from s2ft.train.output import write_json
    from s2ft.train.scoring import right_answer

    output = Path(job.output) if job.output else None
    if output and output.exists():
        raise FileExistsError(f"output {output} exists")
    if output and not output.parent.is_dir():
        raise FileNotFoundError(f"output {output} is in a folder that doesn't exist")
    examples = read_examples(job.data)[: job.limit]
    for example in examples:  # before a minute goes into loading the model
        right_answer(example, job.task)
    dtype = dtype_of_base(s2ft.adapter.read_adapter(job.adapter), job.dtype) if job.adapter else job.dtype
    model, tokenizer = load_model(job.model, dtype)
    if job.adapter:
        s2ft.load_adapter(model, job.adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    result = evaluate(model, tokenizer, examples, job.task, job.batch_size, job.max_new_tokens)
    print(result)
    if output:
        write_json(output, {"model": job.model, "adapter": job.adapter, "data": job.data, **result.to_dict()})
