"""s2ft finetune: train an adapter on your data."""

from dataclasses import dataclass, field, replace

from s2ft.cli.parse import parse, quiet_transformers

DEFAULT_D_RATIO = 0.03  # the paper's, where no ratio is given


@dataclass
class FinetuneArguments:
    model: str = field(metadata={"help": "a checkpoint folder, a name on the hub, or a .gguf file"})
    data: list[str] = field(
        metadata={"help": "JSON or JSONL files with instruction/input/output, prompt/completion, or messages"}
    )
    output: str = field(metadata={"help": "folder for the adapter, log.jsonl, loss.png and checkpoints"})
    limit: int | None = field(default=None, metadata={"help": "take the first rows only"})
    name: str = field(default="default", metadata={"help": "the adapter's name"})
    calibration_examples: int | None = field(
        default=None,
        metadata={
            "help": "rows of the data that a selection by activation, product or gradient looks at; default: one in a "
            "hundred, but at least 16"
        },
    )
    eval_data: list[str] | None = field(
        default=None,
        metadata={"help": "files of held-out rows to evaluate on: at the end, and every eval_steps updates"},
    )
    eval_task: str | None = field(
        default=None,
        metadata={
            "help": "arithmetic or commonsense: score generated answers to the held-out rows too, as s2ft eval does"
        },
    )
    eval_limit: int | None = field(default=None, metadata={"help": "take the first held-out rows only"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest generated answer in tokens, for eval_task"})
    resume: bool = field(default=False, metadata={"help": "go on from the newest whole checkpoint in output"})
    overwrite: bool = field(default=False, metadata={"help": "replace the run that output holds"})


def run(arguments: list[str]) -> None:
    from s2ft.config import S2FTConfig
    from s2ft.train.options import TrainOptions

    job, config, options = parse(
        "finetune",
        "Train an adapter. One device: run as it is. Several: torchrun "
        "--nproc-per-node N -m s2ft finetune …, or accelerate launch -m s2ft finetune …",
        [FinetuneArguments, S2FTConfig, TrainOptions],
        arguments,
    )
    quiet_transformers()
    if not config.ratios and config.units is None:
        config = replace(config, d_ratio=DEFAULT_D_RATIO)
    train(job, config, options)


def train(job: FinetuneArguments, config, options) -> None:
    """Everything is checked before a run in the output folder is touched. The first rank alone holds the folder."""
    from contextlib import nullcontext

    from s2ft.files.reading import check_adapter_name
    from s2ft.train.finetune import check_packages_of_run, this_rank
    from s2ft.train.output import RunFolder

    check_packages_of_run(options)
    check_adapter_name(job.name, "name")  # else saving would refuse it after the training
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
    from s2ft.train.finetune import check_ranks_agree, training_arguments
    from s2ft.train.memory import log_memory

    examples = read_examples(job.data)[: job.limit]
    model, tokenizer = load_model(job.model, options.dtype)
    room = min(options.max_length, context_length(model) or options.max_length)
    rows = encode_examples(tokenizer, examples, room)
    held_out = _held_out(job, tokenizer, room)
    arguments = training_arguments(model, options, len(rows), folder)  # raises for what can't be
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
    ranks.wait_for_everyone()  # the others must not look into the folder before it is ready
    result = _finetune(model, tokenizer, rows, options, folder, job.resume, held_out)
    if ranks.is_main_process:
        print(
            f"{result.steps} steps, {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s, loss "
            f"{result.loss:.4f}\n"
            + (
                f"adapter: {result.adapter}"
                if result.finished
                else f"stopped before the end: go on with --resume in {folder.path}"
            )
        )


def _finetune(model, tokenizer, rows, options, folder, resume, held_out):
    """Raises: OSError that also says what is kept, where a file can't be written, on a full disk for example."""
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
    """Raises: ValueError for a task without data, or data that it can't score."""
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
    """What makes a run this run: --resume must find the same."""
    return {
        "model": job.model,
        "data": job.data,
        "limit": job.limit,
        "name": job.name,
        "calibration_examples": job.calibration_examples,
        **{f"adapter.{key}": value for key, value in config.to_dict().items()},
        **{f"training.{key}": value for key, value in options.to_dict().items()},
    }
