"""s2ft eval: score a model, with or without an adapter, on a file of problems, or on tasks of lm-eval."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from s2ft.cli.parse import ADAPTER, BASE_MODEL, DTYPE, UsageError, command, new_file
from s2ft.config import check_fields, option, refuse
from s2ft.text.data.data_options import DATA, TASKS, ReadingOptions
from s2ft.text.models import DTYPES
from s2ft.train.options import KEEP_MEMORY, POSITIONS, POSITIONS_TEXT

ONLY_DATA, ONLY_LM_EVAL = ("data", "task", "kl", "forgetting"), ("lm_eval_path", "num_fewshot", "apply_chat_template")


@dataclass
class EvalArguments:
    model: str | None = option(None, **BASE_MODEL)
    data: list[str] = option(
        [], f"{DATA}; the field `answer` of a row is scored, or its output if there is none", metavar="FILE_OR_NAME"
    )
    task: str | None = option(
        None,
        "score generated answers: arithmetic by the last number, commonsense by the first answer word (true, answer1, "
        "...), exact by the whole text",
        shown="compare the adapter with its base: the loss of the answers, and some answers side by side",
        choices=TASKS,
    )
    adapter: str | None = option(None, ADAPTER, metavar="ADAPTER")
    num_beams: int = option(1, "beams of generated answers; the paper uses 4; 1 is greedy", unit="beams", least=1)
    batch_size: int = option(32, "prompts that are answered at once", unit="prompts", least=1)
    max_new_tokens: int = option(256, "longest answer; without --task at most 64", unit="tokens", least=1)
    limit: int | None = option(None, "use the first N rows only", shown="all rows", least=1)
    forgetting: list[str] = option(
        [],
        "also measure by how much the adapter raises the loss on this text, in nats a token: files, folders, or names "
        "of data sets on the hub",
        metavar="FILE_OR_NAME",
    )
    kl: bool = option(False, "also measure KL(base||adapter) on the prompts of the scored rows, in nats a position")
    kl_on: str = option("prompts", f"positions of --kl. {POSITIONS_TEXT}", choices=tuple(POSITIONS))
    meter_rows: int = option(64, "rows that --forgetting and --kl draw, each", unit="rows", least=1)
    dtype: str = option("auto", DTYPE, choices=DTYPES)
    output: str | None = option(None, "write the accuracy and every answer to this JSON file", metavar="FILE")
    keep_memory: bool = option(True, **KEEP_MEMORY)
    lm_eval: str | None = option(
        None, "tasks of lm-eval, separated by commas; needs the package lm-eval", metavar="TASKS"
    )
    lm_eval_path: str | None = option(None, "folder with further tasks of lm-eval, as YAML files", metavar="DIR")
    num_fewshot: int | None = option(
        None, "examples before each question, for --lm-eval", unit="examples", shown="the task's own", least=0
    )
    apply_chat_template: bool = option(False, "put the questions of --lm-eval into the chat template")

    def __post_init__(self) -> None:
        check_fields(self)
        way = "data" if self.lm_eval is None else "lm_eval"
        measures = self.forgetting or self.kl
        refuse(
            (measures and self.adapter is None, "forgetting and kl compare an adapter with its base: give --adapter"),
            (self.kl and not self.data, "kl needs rows with prompts: give --data"),
            *(
                (getattr(self, name), f"{name} has no meaning with {way}")
                for name in (ONLY_DATA if way == "lm_eval" else ONLY_LM_EVAL)
            ),
            (self.kl_on != "prompts" and not self.kl, "kl_on has no meaning without kl"),
            (self.num_beams > 1 and self.task is None, "num_beams has no meaning without task"),
            (
                way == "data" and not self.data and (self.task is not None or not measures),
                "missing: --data FILE_OR_NAME, or --lm-eval",
            ),
        )


@command(
    "Compare an adapter with its base on your data, or score the answers to each row.",
    """\
  s2ft eval --adapter my-run --data my-data.jsonl
  s2ft eval --adapter my-run --data test.jsonl --task arithmetic
  s2ft eval --adapter my-run --forgetting other-text.jsonl
  s2ft eval --model meta-llama/Llama-3.2-1B --adapter my-run --lm-eval hellaswag,arc_easy""",
)
def run_eval(job: EvalArguments, reading: ReadingOptions) -> None:
    if job.lm_eval is not None and reading != ReadingOptions():
        raise UsageError("split, field and skip_bad_rows have no meaning with lm_eval (see s2ft eval --help)")
    from s2ft.text.adapter_prompts import base_name

    job.model = base_name(job.model, job.adapter)
    if job.lm_eval is not None:
        score_by_lm_eval(job)
    else:
        score(job, reading)


def score(job: EvalArguments, reading: ReadingOptions) -> None:
    """Score the model on the rows of --data, measure how far the adapter has moved it from its base, and print both.

    Args:
        job: The options of the command. Without a task the adapter is compared with its base.
        reading: How the data is read.

    Raises:
        FileExistsError: The output file exists.
        FileNotFoundError: The folder of the output file does not exist.
        ValueError: A row can't be scored or measured, or the model or the adapter can't be loaded.
    """
    from s2ft.text.data import DataOptions, load_rows
    from s2ft.text.divergence import read_texts
    from s2ft.text.encoding import context_length, tokenize_rows
    from s2ft.text.evaluation import compare, evaluate, examples_of, right_answer
    from s2ft.text.prompts import prompt_for_rows
    from s2ft.train.output import write_json

    output, compares = new_file(job.output), bool(job.data) and job.task is None and not job.kl
    rows = load_rows(reading.of(job.data, "test", job.limit), scored=not compares) if job.data else None
    examples = tuple(examples_of(rows)) if job.data and not compares else ()
    for number, example in enumerate(examples if job.task else (), 1):  # before the model is loaded
        try:
            right_answer(example, job.task)
        except ValueError as error:
            raise ValueError(f"the data, example {number}: {error}") from None
    other = read_texts(reading.of(job.forgetting, "test", beside=job.data), job.meter_rows) if job.forgetting else None
    found: dict[str, Any] = {"model": job.model, "adapter": job.adapter, "data": job.data}
    with _loaded(job) as (model, prompter):
        if job.data and job.adapter is None:  # as s2ft sft would choose
            prompter.format = prompt_for_rows(prompter.tokenizer, rows, DataOptions())
        how = (job.task, job.batch_size, job.max_new_tokens, "evaluating", prompter.format, job.num_beams)
        result = evaluate(model, prompter.tokenizer, examples, *how) if job.task else None
        if compares:
            prompter.format.apply_to(prompter.tokenizer)
            room = {"max_length": context_length(model), "skip_bad_rows": reading.skip_bad_rows}
            tokens = tokenize_rows(rows, prompter.tokenizer, prompter.format, **room).dataset
            short = {"max_new_tokens": min(job.max_new_tokens, 64), "batch_size": min(8, job.batch_size)}
            result = compare(model, prompter.tokenizer, tokens, most=len(tokens), **short)
        if job.forgetting or job.kl:
            found["drift"] = _measure_drift(job, model, prompter, other, examples)
    if result is not None:
        print(result)
        found |= result.to_dict()
    if output:
        write_json(output, found)


def _measure_drift(job: EvalArguments, model, prompter, other: Any, examples: Sequence) -> dict[str, Any]:
    """Measure how far the loaded adapter has moved the model from its base, and print it."""
    from s2ft.text.divergence import (
        DriftMeter,
        answer_rows,
        longest_other_row,
        prompt_rows,
        row_of_prompt,
        some,
        text_rows,
    )
    from s2ft.text.encoding import context_length
    from s2ft.text.evaluation import encode_prompts

    texts = None if other is None else text_rows(other, prompter.tokenizer, longest_other_row(model), job.meter_rows)
    prompts = None
    if job.kl:
        answers = job.kl_on == "answers"
        room = context_length(model) - (job.max_new_tokens if answers else 1)
        asked = list(encode_prompts(prompter.tokenizer, some(examples, job.meter_rows), room, prompter.format).values())
        prompts = (
            answer_rows(model, prompter.tokenizer, asked, job.max_new_tokens)
            if answers
            else prompt_rows([row_of_prompt(ids) for ids in asked])
        )
    meter = DriftMeter(model, other=texts, prompts=prompts, batch_size=min(8, job.batch_size))
    drift = meter.measure(model)
    print(drift)
    base = {} if meter.base_loss is None else {"base_loss": meter.base_loss}
    on = {"kl_on": job.kl_on, "positions": meter.distributions.positions} if job.kl else {}
    return {**base, **drift.to_dict(), **on}


def score_by_lm_eval(job: EvalArguments) -> None:
    """Score the model on tasks of lm-eval and print its table.

    Args:
        job: The options of the command.

    Raises:
        FileExistsError: The output file exists.
        MissingPackages: The package lm-eval is not installed.
        ValueError: A task is unknown, or the model or the adapter can't be loaded.
    """
    from s2ft.files.plain_text import replace_file
    from s2ft.packages import check_packages

    check_packages("s2ft eval --lm-eval")
    output = new_file(job.output)
    from s2ft.integrations.lm_eval import as_json, as_table, check_tasks, evaluate

    tasks = [name.strip() for name in job.lm_eval.split(",") if name.strip()]
    check_tasks(tasks, job.lm_eval_path)
    with _loaded(job) as (model, prompter):
        results = evaluate(
            model,
            prompter,
            tasks,
            num_fewshot=job.num_fewshot,
            limit=job.limit,
            batch_size=job.batch_size,
            apply_chat_template=job.apply_chat_template,
            include_path=job.lm_eval_path,
        )
    print(as_table(results))
    if output:
        replace_file(output, as_json({"model": job.model, "adapter": job.adapter, **results}).encode())


# ---- shared by the ways of scoring -----------------------------------------------------------------------


@contextmanager
def _loaded(job: EvalArguments) -> Iterator[tuple[Any, Any]]:
    """Load the model with its adapter, and explain an out-of-memory error inside the context."""
    from s2ft.text.adapter_prompts import load_with_adapter
    from s2ft.train.device import explain_out_of_memory, gpu_or_cpu, smaller_answers

    model, prompter = load_with_adapter(job.model, job.adapter, job.dtype)
    with explain_out_of_memory(smaller_answers(job.batch_size, str(model.dtype))):
        model.to(gpu_or_cpu(job.keep_memory))
        yield model, prompter
