"""s2ft finetune: train an adapter on your data."""
from dataclasses import dataclass, field, replace

from s2ft.cli.parse import parse, quiet_transformers

DEFAULT_D_RATIO = 0.03   # the paper's, where no ratio is given


@dataclass
class FinetuneArguments:
    model: str = field(metadata={"help": "a checkpoint folder, a name on the hub, or a .gguf file"})
    data: list[str] = field(metadata={"help": "JSON or JSONL files with instruction/input/output, prompt/completion, "
                                              "or messages"})
    output: str = field(metadata={"help": "folder for the adapter, log.jsonl, loss.png and checkpoints"})
    limit: int | None = field(default=None, metadata={"help": "take the first rows only"})
    name: str = field(default="default", metadata={"help": "the adapter's name"})
    calibration_examples: int | None = field(default=None, metadata={
        "help": "rows of the data that a selection by activation, product or gradient looks at; default: one in a "
                "hundred, but at least 16"})
    resume: bool = field(default=False, metadata={"help": "go on from the newest checkpoint in output"})
    overwrite: bool = field(default=False, metadata={"help": "replace the run that output holds"})


def run(arguments: list[str]) -> None:
    from s2ft.config import S2FTConfig
    from s2ft.train.options import TrainOptions

    job, config, options = parse("finetune", "Train an adapter. One device: run as it is. Several: torchrun "
                                 "--nproc-per-node N -m s2ft.cli finetune …, or accelerate launch -m s2ft.cli …",
                                 [FinetuneArguments, S2FTConfig, TrainOptions], arguments)
    quiet_transformers()
    if not config.ratios and config.units is None:
        config = replace(config, d_ratio=DEFAULT_D_RATIO)
    train(job, config, options)


def train(job: FinetuneArguments, config, options) -> None:
    """Everything is checked before the output folder is touched."""
    import s2ft
    from s2ft.train.calibration import calibration_for
    from s2ft.train.encoding import context_length, encode_examples
    from s2ft.train.examples import read_examples
    from s2ft.train.finetune import check_ranks_agree, finetune, this_rank
    from s2ft.train.models import load_model
    from s2ft.train.output import RunFolder

    ranks = this_rank()
    folder = RunFolder(job.output)
    if ranks.is_main_process:
        folder.check(job.resume, job.overwrite)
    options.accumulation(ranks.num_processes)
    examples = read_examples(job.data)[:job.limit]
    model, tokenizer = load_model(job.model, options.dtype)
    room = min(options.max_length, context_length(model) or options.max_length)
    rows = encode_examples(tokenizer, examples, room)
    calibration = calibration_for(config, tokenizer, rows, job.calibration_examples, options.micro_batch_size)
    if calibration is not None:
        model.to(ranks.device)
    report = s2ft.attach(model, config, job.name, calibration)
    check_ranks_agree(model)
    if ranks.is_main_process:
        folder.begin(_run_options(job, config, options), job.resume)
        print(report, flush=True)
    ranks.wait_for_everyone()   # the others must not look into the folder before it is ready
    result = finetune(model, tokenizer, rows, options, folder, job.resume)
    if ranks.is_main_process:
        print(f"{result.steps} steps in {result.seconds:.0f} s, loss {result.loss:.4f}\nadapter: {result.adapter}")


def _run_options(job: FinetuneArguments, config, options) -> dict:
    """What makes a run this run: --resume must find the same."""
    return {"model": job.model, "data": job.data, "limit": job.limit, "name": job.name,
            "calibration_examples": job.calibration_examples,
            **{f"adapter.{key}": value for key, value in config.to_dict().items()},
            **{f"training.{key}": value for key, value in options.to_dict().items()}}
