"""s2ft finetune: train an adapter on your data."""

from dataclasses import dataclass, replace

from s2ft.cli.parse import MODEL, parse, quiet_transformers
from s2ft.text.scoring import TASKS
from s2ft.train.options import check_fields, option

DEFAULT_D_RATIO = 0.03  # The paper's, if the user gives no ratio.
DATA = "JSON or JSONL files with instruction/input/output, prompt/completion, or messages"
CALIBRATION = {
    "text": "rows of the data for the selections activation, product and gradient",
    "shown": "1 % of the rows, at least 16",
}
DESCRIPTION = """Train an adapter on your data.

Several devices: torchrun --nproc-per-node N -m s2ft finetune ...
             or: accelerate launch -m s2ft finetune ...
Without any ratio the command trains --d-ratio 0.03."""
EXAMPLE = """  s2ft finetune --model meta-llama/Llama-3.2-1B --data my-data.jsonl --output my-run --epochs 3
  s2ft finetune --model meta-llama/Llama-3.2-1B --data my-data.jsonl --output my-run --resume"""


@dataclass
class FinetuneArguments:
    model: str = option(text=MODEL, group="model and data")
    data: list[str] = option(text=DATA, group="model and data", metavar="FILE")
    output: str = option(
        text="folder for the adapter, log.jsonl, loss.png and checkpoints", group="output", metavar="DIR"
    )
    limit: int | None = option(None, "use the first N rows only", group="model and data", shown="all rows", least=1)
    name: str = option("default", "name of the adapter", group="output")
    calibration_examples: int | None = option(None, group="selection", **CALIBRATION)
    eval_data: list[str] | None = option(
        None,
        "files with held-out rows: their loss is computed at the end, and every --eval-steps updates",
        group="evaluation",
        metavar="FILE",
    )
    eval_task: str | None = option(
        None, "also score generated answers to the held-out rows, as s2ft eval does", group="evaluation", choices=TASKS
    )
    eval_limit: int | None = option(
        None, "use the first N held-out rows only", group="evaluation", shown="all rows", least=1
    )
    max_new_tokens: int = option(
        256, "longest generated answer for --eval-task", group="evaluation", unit="tokens", least=1
    )
    resume: bool = option(False, "continue the run in --output from its newest valid checkpoint", group="output")
    overwrite: bool = option(False, "replace the run in --output", group="output")

    def __post_init__(self) -> None:
        check_fields(self)


def run(arguments: list[str]) -> None:
    from s2ft.config import S2FTConfig
    from s2ft.train.options import TrainOptions

    job, config, options = parse(
        "finetune",
        DESCRIPTION,
        [FinetuneArguments, S2FTConfig, TrainOptions],
        arguments,
        EXAMPLE,
        {S2FTConfig: "selection"},
    )
    quiet_transformers()
    if not config.ratios and config.units is None:
        config = replace(config, d_ratio=DEFAULT_D_RATIO)
    train(job, config, options)


def train(job: FinetuneArguments, config, options) -> None:
    """Train, after everything has been checked. Only the first rank reserves the output folder.

    Args:
        job: The options of the command.
        config: The S2FTConfig.
        options: The TrainOptions.

    Raises:
        ValueError: An option does not fit the model, the data or the machine.
        FileExistsError: The output folder holds another run, or another process uses it.
        OSError: A file can't be written. The message names what is kept.
    """
    from contextlib import nullcontext

    from s2ft.files.reading import check_adapter_name
    from s2ft.train.finetune import check_packages_of_run, this_rank
    from s2ft.train.output import RunFolder

    check_packages_of_run(options)
    check_adapter_name(job.name, "name")  # Saving would refuse the name only after the training.
    ranks, folder = this_rank(), RunFolder(job.output)
    options.accumulation(ranks.num_processes)
    with folder.reserved(job.resume, job.overwrite) if ranks.is_main_process else nullcontext():
        _train(job, config, options, folder, ranks)


def _train(job: FinetuneArguments, config, options, folder, ranks) -> None:
    import s2ft
    from s2ft.text.calibration import calibration_for
    from s2ft.text.encoding import context_length, encode_examples
    from s2ft.text.examples import read_examples
    from s2ft.text.models import load_model
    from s2ft.text.prompts import pad_id
    from s2ft.train.device import say_device
    from s2ft.train.finetune import check_ranks_agree, training_arguments
    from s2ft.train.memory import log_memory

    examples = read_examples(job.data)[: job.limit]
    if ranks.is_main_process:
        say_device(ranks.device)
    model, tokenizer = load_model(job.model, options.dtype)
    room = min(options.max_length, context_length(model) or options.max_length)
    rows = encode_examples(tokenizer, examples, room)
    held_out = _held_out(job, tokenizer, room)
    arguments = training_arguments(model, options, len(rows), folder)  # Raises if an option does not work here.
    calibration = calibration_for(config, tokenizer, rows, job.calibration_examples, options.micro_batch_size)
    if calibration is not None:
        model.to(ranks.device)
    if ranks.is_main_process and not job.resume:
        log_memory(model, config, rows, options, arguments, pad_id(tokenizer))
    report = s2ft.attach(model, config, job.name, calibration)
    check_ranks_agree(model)
    if ranks.is_main_process:
        folder.begin(_run_options(job, config, options), job.resume)
        print(report, flush=True)
    ranks.wait_for_everyone()  # The other ranks must not read the folder before it is ready.
    result = _finetune(model, tokenizer, rows, options, folder, job.resume, held_out)
    if ranks.is_main_process:
        print(_summary(result, folder))


def _summary(result, folder) -> str:
    steps = f"{result.steps} step{'s' * (result.steps != 1)}"
    return (
        f"{steps}, {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s, loss {result.loss:.4f} "
        "(mean of the last tenth of the logged steps)\n"
    ) + (
        f"adapter: {result.adapter}"
        if result.finished
        else f"stopped before the end: go on with --resume in {folder.path}"
    )


def _finetune(model, tokenizer, rows, options, folder, resume, held_out):
    """Train. If a file can't be written, for example on a full disk, the OSError also names what is kept."""
    from s2ft.cli.main import reason_not_written
    from s2ft.train.finetune import finetune

    try:
        return finetune(model, tokenizer, rows, options, folder, resume, held_out)
    except Exception as error:
        reason = reason_not_written(error)
        if reason is None:
            raise
        raise OSError(f"{reason}; {folder.kept()}") from error


def _held_out(job: FinetuneArguments, tokenizer, room: int):
    """Read the held-out rows. Raises ValueError for a task without data, or for rows that it can't score."""
    from s2ft.text.encoding import encode_examples
    from s2ft.text.examples import read_examples
    from s2ft.text.scoring import right_answer
    from s2ft.train.held_out import HeldOut

    if job.eval_data is None:
        if job.eval_task is not None or job.eval_limit is not None:
            raise ValueError("eval_task and eval_limit need eval_data")
        return None
    examples = read_examples(job.eval_data)[: job.eval_limit]
    if job.eval_task is not None:
        for example in examples:
            right_answer(example, job.eval_task)
    return HeldOut(
        encode_examples(tokenizer, examples, room), examples, job.eval_task, max_new_tokens=job.max_new_tokens
    )


def _run_options(job: FinetuneArguments, config, options) -> dict:
    """Return the options that --resume compares with those of the run that it continues."""
    return {
        "model": job.model,
        "data": job.data,
        "limit": job.limit,
        "name": job.name,
        "calibration_examples": job.calibration_examples,
        **{f"adapter.{key}": value for key, value in config.to_dict().items()},
        **{f"training.{key}": value for key, value in options.to_dict().items()},
    }
