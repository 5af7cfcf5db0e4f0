"""s2ft eval: score a model, with or without an adapter, on files, on suites of tasks, or on tasks of lm-eval."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2ft.cli.forgetting import measure_drift, read_other_text
from s2ft.cli.parse import ADAPTER, DTYPE, MODEL, UsageError, parse, quiet_transformers
from s2ft.text.data.options import DATA, ReadingOptions
from s2ft.text.models import DTYPES
from s2ft.text.scoring import CHOICES, KINDS
from s2ft.text.suites import PAPER, SCORINGS
from s2ft.train.options import KEEP_MEMORY, POSITIONS, POSITIONS_TEXT, check_fields, option

if TYPE_CHECKING:
    from s2ft.reproduce.tables import Table
    from s2ft.text.suites import TaskResult

logger = logging.getLogger(__name__)
EXAMPLE = """\
  s2ft eval --model meta-llama/Llama-3.2-1B --adapter my-run --data test.jsonl --task arithmetic
  s2ft eval --model meta-llama/Llama-3.2-1B --adapter my-run --suite arithmetic --data LLM-Adapters --num-beams 4
  s2ft eval --model meta-llama/Llama-3.2-1B --adapter my-run --forgetting other-text.jsonl
  s2ft eval --model meta-llama/Llama-3.2-1B --adapter my-run --lm-eval hellaswag,arc_easy"""
# What determines the scores of a suite. The batch size changes only rounding, so that a smaller one can go on.
SCORED_BY = (
    "model",
    "adapter",
    "dtype",
    "scoring",
    "num_beams",
    "max_new_tokens",
    "length_normalized",
    "answer_form",
    "limit",
)
FORMS = {".txt": "text", ".csv": "csv", ".tex": "latex", ".md": "markdown"}  # of a suite's table, by the file's name


@dataclass
class EvalArguments:
    model: str = option(text=MODEL)
    data: list[str] = option(
        [],
        f"{DATA}; the field `answer` of a row is scored, or its output if there is none. With --suite: the folder with "
        "the files of the paper's tasks, such as a checkout of LLM-Adapters",
        metavar="FILE_OR_NAME",
    )
    task: str | None = option(
        None,
        "arithmetic scores the last number of the generated text, commonsense the first answer word (true, answer1, "
        "...), choices the likeliest of the field `choices`",
        choices=KINDS,
    )
    suite: list[str] = option(
        [],
        f"score several tasks with one model: {', '.join(PAPER)}, names of their tasks such as BoolQ, YAML files that "
        "list tasks, or files with rows of --task",
        metavar="NAME_OR_FILE",
    )
    adapter: str | None = option(None, ADAPTER, metavar="ADAPTER")
    scoring: str | None = option(
        None,
        "generation scores generated answers, likelihood the likeliest of the answers that a row allows",
        choices=SCORINGS,
        shown="generation; for the task choices likelihood",
    )
    num_beams: int = option(1, "beams of generated answers; the paper uses 4; 1 is greedy", unit="beams", least=1)
    length_normalized: bool = option(
        False, "divide the log-probability of an answer by the number of its characters, for --scoring likelihood"
    )
    answer_form: str | None = option(
        None,
        "text in which an answer stands, with {} in its place, for --scoring likelihood",
        metavar="TEXT",
        shown="'The answer is {}', 'the correct answer is {}' or '{}', by the task",
    )
    batch_size: int = option(32, "prompts that are answered at once", unit="prompts", least=1)
    max_new_tokens: int = option(256, "longest answer", unit="tokens", least=1)
    limit: int | None = option(None, "use the first N rows only, of each task", shown="all rows", least=1)
    skip_missing: bool = option(False, "leave out tasks of a suite that have no file in --data; they are named")
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
    output: str | None = option(
        None,
        "write the accuracy and every answer to this JSON file. With --suite the name can end in .txt, .csv, .md or "
        ".tex: the table is written there, and the answers to a JSON file beside it",
        metavar="FILE",
    )
    keep_memory: bool = option(True, **KEEP_MEMORY)
    resume: bool = option(False, "continue the scoring of a suite whose results so far are in --output")
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
        self._check_drift()
        if self.lm_eval is not None:
            ours = ("data", "task", "suite", "skip_missing", "resume", "scoring", "length_normalized", "answer_form")
            self._refuse("lm_eval", (*ours, "kl", "forgetting"))
            if self.num_beams > 1:
                raise ValueError("num_beams has no meaning with lm_eval: its tasks say how they generate")
            return
        self._refuse("data or suite", ("lm_eval_path", "num_fewshot", "apply_chat_template"))
        if self.suite:
            if self.resume and self.output is None:
                raise ValueError("resume needs output, the file with the results so far")
        elif self.measures_only:
            self._refuse("measuring without a task", ("resume", "skip_missing", "scoring"))
        elif not self.data or self.task is None:
            missing = [name for name, value in (("--data FILE_OR_NAME", self.data), ("--task", self.task)) if not value]
            raise ValueError(f"missing: {', '.join(missing)}, or --suite, or --lm-eval")
        else:
            self._refuse("data without suite", ("resume", "skip_missing"))
        if self.scoring == "generation":
            self._refuse("scoring generation", ("length_normalized", "answer_form"))
        elif self.num_beams > 1 and (self.scoring == "likelihood" or (self.task == CHOICES and not self.suite)):
            raise ValueError("scoring likelihood generates nothing, so it takes no num_beams")
        if self.answer_form is not None and self.answer_form.count("{}") != 1:
            raise ValueError(f"answer_form must have {{}} once, where the answer stands, got {self.answer_form!r}")

    @property
    def measures_only(self) -> bool:
        """Whether the distance from the base is measured, and nothing is scored."""
        return bool(self.forgetting or self.kl) and self.task is None and not self.suite

    def _check_drift(self) -> None:
        if not self.forgetting and not self.kl:
            return
        if self.adapter is None:
            raise ValueError("forgetting and kl compare an adapter with its base: give --adapter")
        if self.kl and not self.data and not self.suite:
            raise ValueError("kl needs rows with prompts: give --data or --suite")
        if self.data and not self.kl and self.measures_only:
            raise ValueError("data has no use here: give --task to score it, or --kl to measure on its prompts")

    def _refuse(self, way: str, names: tuple[str, ...]) -> None:
        """Refuse options that would be ignored."""
        given = [name for name in names if getattr(self, name)]
        if given:
            raise ValueError(f"{given[0]} has no meaning with {way}")


def run(arguments: list[str]) -> None:
    description = "Generate an answer to each row and score it, or score the likeliest of the answers that it allows."
    job, reading = parse("eval", description, [EvalArguments, ReadingOptions], arguments, EXAMPLE)
    if job.lm_eval is not None and reading != ReadingOptions():
        raise UsageError("split, field and skip_bad_rows have no meaning with lm_eval (see s2ft eval --help)")
    quiet_transformers()
    if job.lm_eval is not None:
        score_by_lm_eval(job)
    elif job.measures_only:
        measure(job, reading)
    elif job.suite:
        score_suite_of(job, reading)
    else:
        score(job, reading)


def score(job: EvalArguments, reading: ReadingOptions) -> None:
    """Score the model on the rows of --data and print the accuracy.

    Args:
        job: The options of the command.
        reading: How the data is read.

    Raises:
        FileExistsError: The output file exists.
        FileNotFoundError: The folder of the output file does not exist.
        ValueError: A row can't be scored, or the model or the adapter can't be loaded.
    """
    from s2ft.text.examples import read_examples
    from s2ft.text.suites import LoadedTask, SuiteTask, check_rows, evaluate_task
    from s2ft.train.output import write_json

    output = _check_output(job.output)
    examples = tuple(read_examples(reading.of(job.data, "test", job.limit)))
    task = LoadedTask(SuiteTask("evaluating", job.task, ""), examples)
    check_rows(task, job.scoring)  # A row that can't be scored is reported before the model is loaded.
    other = read_other_text(job, reading)
    with _loaded(job) as (model, prompter):
        result = evaluate_task(model, prompter, task, **_settings(job))
        drift = measure_drift(job, model, prompter, other, examples)
    print(result)
    if output:
        names = {"model": job.model, "adapter": job.adapter, "data": job.data}
        write_json(output, {**names, **drift, **result.to_dict()})


def measure(job: EvalArguments, reading: ReadingOptions) -> None:
    """Measure how far the adapter has moved the model from its base, and print it.

    Args:
        job: The options of the command.
        reading: How the data is read.

    Raises:
        FileExistsError: The output file exists.
        FileNotFoundError: The folder of the output file does not exist.
        ValueError: A row can't be measured, or the model or the adapter can't be loaded.
    """
    from s2ft.text.examples import read_examples
    from s2ft.train.output import write_json

    output = _check_output(job.output)
    examples = tuple(read_examples(reading.of(job.data, "test", job.limit))) if job.data else ()
    other = read_other_text(job, reading)
    with _loaded(job) as (model, prompter):
        drift = measure_drift(job, model, prompter, other, examples)
    if output:
        write_json(output, {"model": job.model, "adapter": job.adapter, "data": job.data, **drift})


def score_suite_of(job: EvalArguments, reading: ReadingOptions) -> None:
    """Score the model on the tasks of --suite, print their table, and keep the results of each task.

    Args:
        job: The options of the command.
        reading: How the data is read.

    Raises:
        FileExistsError: An output file exists.
        FileNotFoundError: A file of a task or the folder of the output does not exist.
        ValueError: A row can't be scored, the earlier results have other options, or the model can't be loaded.
    """
    from s2ft.files.writing import replace_file
    from s2ft.text.scores_file import ScoresFile, rows_digest
    from s2ft.text.suites import find_suite, load_suite, missing_tasks, score_suite

    if len(job.data) > 1:
        raise ValueError(f"data must be one folder with --suite, got {', '.join(job.data)}; files stand after --suite")
    folder = next(iter(job.data), None)
    output = _check_output(job.output, job.resume)
    form, kept = _forms(output, job.resume)
    tasks = find_suite(job.suite, folder, job.task, reading.split or "test", job.skip_missing)
    missing = missing_tasks(job.suite, tasks)
    if missing:
        logger.warning("%s has no rows of %s: left out", folder, ", ".join(missing))
    suite = load_suite(tasks, job.limit, job.scoring, reading.of)
    options = {name: getattr(job, name) for name in SCORED_BY} | {"rows": rows_digest(suite)}
    scores = ScoresFile(kept or "", options | {"tasks": {one.name: one.kind for one in tasks}})
    if job.resume:
        scores.resume()

    def add(result: "TaskResult") -> None:
        logger.info("%s: %.1f%% right, %.0f s", result.name, 100 * result.accuracy, result.seconds)
        if kept:
            scores.add(result)

    other = read_other_text(job, reading)
    with _loaded(job) as (model, prompter):
        scores.check_weights(model)
        results = score_suite(model, prompter, suite, **_settings(job), done=scores.results, on_result=add)
        drift = measure_drift(job, model, prompter, other, [one for loaded in suite for one in loaded.examples])
    table = suite_table(results, _title(job), missing)
    print(table.text())
    if kept:
        scores.write(missing=missing, **drift)
    if form:
        replace_file(output, (getattr(table, form)().rstrip("\n") + "\n").encode())


def score_by_lm_eval(job: EvalArguments) -> None:
    """Score the model on tasks of lm-eval and print its table.

    Args:
        job: The options of the command.

    Raises:
        FileExistsError: The output file exists.
        MissingPackages: The package lm-eval is not installed.
        ValueError: A task is unknown, or the model or the adapter can't be loaded.
    """
    from s2ft.files.writing import replace_file
    from s2ft.packages import check_packages

    check_packages("s2ft eval --lm-eval")
    output = _check_output(job.output)
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
    from s2ft.train.device import gpu_or_cpu
    from s2ft.train.out_of_memory import explain_out_of_memory, smaller_answers

    model, prompter = load_with_adapter(job.model, job.adapter, job.dtype)
    with explain_out_of_memory(smaller_answers(job.batch_size, str(model.dtype))):
        model.to(gpu_or_cpu(job.keep_memory))
        yield model, prompter


def _settings(job: EvalArguments) -> dict[str, Any]:
    """The options of scoring by the names that `score_suite` has for them."""
    names = ("num_beams", "batch_size", "max_new_tokens", "scoring", "length_normalized", "answer_form")
    return {name: getattr(job, name) for name in names}


def _check_output(name: str | None, resume: bool = False) -> Path | None:
    """Check that a file can be written, before anything is scored. Returns its path."""
    output = Path(name) if name else None
    if output and output.exists() and not resume:
        raise FileExistsError(f"output {output} exists")
    if output and not output.parent.is_dir():
        raise FileNotFoundError(f"output {output} is in a folder that doesn't exist")
    return output


def _forms(output: Path | None, resume: bool) -> tuple[str | None, Path | None]:
    """Return the form of a suite's table by the name of its file, and the JSON file of the answers."""
    if output is None:
        return None, None
    if output.suffix not in (".json", *FORMS):
        raise ValueError(f"output must end in .json, {', '.join(FORMS)}, got {output}")
    return FORMS.get(output.suffix), _check_output(str(output.with_suffix(".json")), resume)


def _title(job: EvalArguments) -> str:
    beams = f", {job.num_beams} beams" if job.num_beams > 1 else ""
    how = " by likelihood" + " of a character" * job.length_normalized if job.scoring == "likelihood" else beams
    return f"{' '.join(job.suite)}: {f'{job.adapter} on ' if job.adapter else ''}{job.model}{how}"


def suite_table(results: "Sequence[TaskResult]", title: str, missing: Sequence[str] = ()) -> "Table":
    """Return the table of a suite: a row for each task, and the average over the tasks.

    Args:
        results: The results of the tasks.
        title: The title.
        missing: Tasks that were left out, for a note.
    """
    from s2ft.reproduce.tables import Column, Table
    from s2ft.text.suites import average

    columns = [
        Column("task"),
        Column("accuracy", "accuracy %", ".1f"),
        Column("right", form="d"),
        Column("rows", form="d"),
        Column("left_out", "left out", "d"),
        Column("seconds", form=".0f"),
    ]
    rows = [[one.name, 100 * one.accuracy, one.right, one.of, one.left_out, one.seconds] for one in results]
    notes = [f"{sum(one.of for one in results)} rows in {sum(one.seconds for one in results):.0f} s"]
    if missing:
        notes.append(f"not in the average, because there are no rows of them: {', '.join(missing)}")
    mean = ["average", 100 * average(results), None, None, None, None]
    return Table("suite", title, columns, [*rows, mean], notes)
