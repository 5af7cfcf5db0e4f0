"""s2ft sft: train an adapter on your data."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from s2ft.cli.config_files import set_environment
from s2ft.cli.parse import quiet_transformers
from s2ft.train.options import with_default_ratio

logger = logging.getLogger(__name__)
DESCRIPTION = """Train an adapter on your data. s2ft finetune is another name of this command.

The names of the options are those of TRL and transformers, with dashes or underscores; many have a short name.
--config reads them from a YAML file, such as the config.yaml that each run writes into its folder.
Without any ratio the command trains --d-ratio 0.03.

Several devices: torchrun --nproc-per-node N -m s2ft sft ...
             or: accelerate launch -m s2ft sft ..."""
EXAMPLE = """  s2ft sft --model meta-llama/Llama-3.2-1B --data my-data.jsonl --output my-run --epochs 3
  s2ft sft --model meta-llama/Llama-3.2-1B --data my-data.jsonl --output my-run --resume
  s2ft sft --config my-run/config.yaml --output another-run --lr 1e-4"""


def run(arguments: list[str]) -> None:
    from s2ft.packages import check_packages

    check_packages("s2ft sft")
    set_environment(arguments)
    from s2ft.cli.training import parse_training
    from s2ft.config import S2FTConfig
    from s2ft.text.data import DataOptions
    from s2ft.train.arguments import SFTArguments
    from s2ft.train.options import ForgettingOptions, ModelOptions, RunOptions

    quiet_transformers()
    kinds = [ModelOptions, DataOptions, S2FTConfig, SFTArguments, RunOptions, ForgettingOptions]
    parsed = parse_training("sft", kinds, arguments, DESCRIPTION, EXAMPLE)
    train(parsed, SFTArguments, _train)


def train(parsed, kind: type, body: Callable) -> None:
    """Train, after everything has been checked. Only the first rank reserves the output folder.

    Args:
        parsed: The options, see :func:`s2ft.cli.training.parse_training`.
        kind: The class of the trainer's arguments.
        body: Function of the options, the output folder, the rank and what to resume, which trains and returns the
            result.

    Raises:
        ValueError: An option does not fit the model, the data or the machine.
        FileExistsError: The output folder holds another run, or another process uses it.
        OSError: A file can't be written. The message names what is kept.
    """
    from s2ft.config import S2FTConfig
    from s2ft.files.reading import check_adapter_name
    from s2ft.packages import check_packages
    from s2ft.selection.protection import with_protect_ratio
    from s2ft.train.kernels import check_kernels
    from s2ft.train.options import ForgettingOptions, ModelOptions, RunOptions
    from s2ft.train.output import RunFolder
    from s2ft.train.preparation import check_upload, checkpoint_to_resume, set_batches
    from s2ft.train.sft import check_packages_of_run, this_rank

    config, protects = with_default_ratio(parsed[S2FTConfig], parsed.given), bool(parsed[ForgettingOptions].protect)
    parsed.objects[S2FTConfig] = with_protect_ratio(config, protects)
    arguments, options = parsed[kind], parsed[RunOptions]
    check_packages_of_run(arguments)
    check_packages("a model in 4 or 8 bit" if parsed[ModelOptions].quantized else "")
    check_kernels(options.kernels)
    check_adapter_name(options.name, "name")  # Saving would refuse the name only after the training.
    ranks, folder = this_rank(), RunFolder(arguments.output_dir)
    batches = set_batches(arguments, options, parsed.given)
    resume = checkpoint_to_resume(arguments.resume_from_checkpoint, folder.path)
    with folder.reserved(bool(resume), options.overwrite) if ranks.is_main_process else nullcontext():
        check_upload(arguments)
        if ranks.is_main_process:
            logger.info(batches)
        # The adapter is uploaded once, at the end. The trainer would upload every checkpoint.
        uploads, arguments.push_to_hub = arguments.push_to_hub, False
        result = body(parsed, folder, ranks, resume)
        if ranks.is_main_process:
            _finish(result, folder, arguments, uploads)


def _train(parsed, folder, ranks, resume):
    from s2ft.cli.forgetting import meter_for, protect_batches, read_other
    from s2ft.config import S2FTConfig
    from s2ft.text.calibration import calibration_for
    from s2ft.train.arguments import SFTArguments
    from s2ft.train.device import say_device
    from s2ft.train.loading import fit_layout, load_base
    from s2ft.train.memory import log_memory
    from s2ft.train.options import ModelOptions, RunOptions
    from s2ft.train.parallel import check_can_shard
    from s2ft.train.sft import check_run, sft

    arguments, options = parsed[SFTArguments], parsed[RunOptions]
    check_can_shard(arguments)
    train_rows, held_out_rows = _read(parsed)
    other = read_other(parsed)
    if ranks.is_main_process:
        say_device(ranks.device)
    model, tokenizer = load_base(parsed[ModelOptions], arguments)
    _choose_rate(parsed, model, ranks)
    prompt, rows, held_out = _tokenize(parsed, model, tokenizer, train_rows, held_out_rows, ranks)
    config = parsed.objects[S2FTConfig] = fit_layout(parsed[S2FTConfig], model, "layout" in parsed.given)
    check_run(model, rows, arguments)
    calibration = calibration_for(
        config, tokenizer, rows, options.calibration_examples, arguments.per_device_train_batch_size
    )
    if ranks.is_main_process and not resume:
        log_memory(model, config, rows, arguments, options, tokenizer)
    meter = meter_for(parsed, other, model, tokenizer, rows if held_out is None else held_out.rows)
    protect = protect_batches(parsed, other, model, tokenizer, arguments)
    begin("sft", parsed, arguments, model, prompt, rows, folder, ranks, resume, calibration, protect)
    settings = {"options": options, "resume": resume, "held_out": held_out, "meter": meter}
    with naming_what_is_kept(folder):
        return sft(model, tokenizer, rows, arguments, folder, **settings)


def _choose_rate(parsed, model, ranks) -> None:
    """Set the learning rate by the width of the model, unless the user has set one. The run's config.yaml has it."""
    from s2ft.train.arguments import SFTArguments
    from s2ft.train.rates import suggested_rate, width_of

    width = width_of(model)
    if "learning_rate" in parsed.given or width is None:
        return
    rate = suggested_rate(width).rate
    parsed[SFTArguments].learning_rate = parsed.given["learning_rate"] = rate
    if ranks.is_main_process:
        logger.info(f"learning rate {rate:g}, by the model's width of {width}; --learning-rate sets another one")


def begin(
    command, parsed, arguments, model, prompt, rows, folder, ranks, resume, calibration=None, protect=None
) -> None:
    """Attach the adapter to the model, record its prompt and training, and write the options into the output folder."""
    import s2ft
    from s2ft.adapter import add_info
    from s2ft.config import S2FTConfig
    from s2ft.train.kernels import apply_kernels
    from s2ft.train.options import RunOptions
    from s2ft.train.parallel import has_weights, is_spread
    from s2ft.train.preparation import run_options
    from s2ft.train.sft import check_ranks_agree

    placed = getattr(model, "hf_quantizer", None) is not None or is_spread(model) or not has_weights(model)
    if (calibration is not None or protect is not None) and not placed:
        model.to(ranks.device)
    options = parsed[RunOptions]
    load_below(model, options.on_top, options.name)
    how = {"protect": protect, "on_top": bool(options.on_top)}
    report = s2ft.attach(model, parsed[S2FTConfig], options.name, calibration, **how)
    apply_kernels(model, options.kernels)
    add_info(model, {"prompt": prompt.to_dict(), "training": _training(command, parsed, arguments, rows)})
    check_ranks_agree(model)
    if ranks.is_main_process:
        folder.begin(run_options(command, parsed.objects, parsed.given), bool(resume), parsed.config_text())
        print(report, flush=True)
    ranks.wait_for_everyone()  # The other ranks must not read the folder before it is ready.


def load_below(model, folders: list[str], name: str) -> None:
    """Load the adapters that a run trains on top of, and make all of them active.

    Args:
        model: The base.
        folders: Adapter folders, or outputs of runs.
        name: Name of the adapter that will be trained. An adapter with this name, or with that of an earlier folder,
            gets the name of its folder.

    Raises:
        FileNotFoundError: A folder does not exist.
        ValueError: A folder has no adapter of this base, or names clash. The message names the folder.
    """
    from pathlib import Path

    import s2ft

    names: list[str] = []
    for folder in folders:
        adapter = s2ft.read_adapter(folder)
        chosen = adapter.name if adapter.name not in (name, *names) else Path(folder).name
        try:
            s2ft.load_adapter(model, adapter, chosen, active=False)
        except ValueError as error:
            raise ValueError(f"on_top {folder}: {error}") from error
        names.append(chosen)
    if names:
        s2ft.set_adapter(model, dict.fromkeys(names, 1.0))


def _read(parsed):
    """Read the training rows and the held-out rows. Raises ValueError if the run evaluates and has no held-out rows."""
    from s2ft.text.data import DataOptions, load_split
    from s2ft.text.examples import examples_of
    from s2ft.text.scoring import right_answer
    from s2ft.train.arguments import SFTArguments
    from s2ft.train.options import RunOptions

    arguments, options = parsed[SFTArguments], parsed[RunOptions]
    evaluates = arguments.eval_strategy != "no" or options.eval_task is not None
    train, held_out = load_split(
        parsed[DataOptions], seed=arguments.seed, evaluates=evaluates, eval_limit=options.eval_limit
    )
    if held_out is None and (evaluates or options.eval_limit is not None):
        name = "eval_task" if options.eval_task else "eval_limit" if options.eval_limit else "an evaluation"
        raise ValueError(
            f"{name} needs held-out rows: give eval_data, test_split_size, or a dataset_name that has a split "
            f"{parsed[DataOptions].dataset_test_split!r}"
        )
    if options.eval_task is not None:
        for example in examples_of(held_out):
            right_answer(example, options.eval_task)
    return (train.shuffle(seed=arguments.seed) if arguments.shuffle_dataset else train), held_out


def _tokenize(parsed, model, tokenizer, train_rows, held_out_rows, ranks):
    """Choose the prompt's format, set it in the tokenizer, and convert the rows to tokens."""
    from s2ft.text.data import DataOptions
    from s2ft.text.encoding import context_length, tokenize_rows
    from s2ft.text.examples import examples_of
    from s2ft.text.prompts import prompt_for_rows
    from s2ft.train.arguments import SFTArguments
    from s2ft.train.held_out import HeldOut
    from s2ft.train.options import RunOptions

    data, arguments, options = parsed[DataOptions], parsed[SFTArguments], parsed[RunOptions]
    prompt = prompt_for_rows(tokenizer, train_rows, data)
    prompt.apply_to(tokenizer)
    everything = not arguments.assistant_only_loss
    how = {
        "max_length": min(arguments.max_length or 1 << 30, context_length(model) or 1 << 30),
        "too_long": data.too_long,
        "loss_on": "last" if data.last_answer_only else "all" if everything else "assistant",
        "completion_only": arguments.completion_only_loss is not False,
        "skip_bad_rows": data.skip_bad_rows,
        "processes": arguments.dataset_num_proc,
    }
    rows = tokenize_rows(train_rows, tokenizer, prompt, **how)
    if ranks.is_main_process:
        logger.info(str(rows))
    if held_out_rows is None:
        return prompt, rows.dataset, None
    examples = list(examples_of(held_out_rows)) if options.eval_task else ()
    tokens = tokenize_rows(held_out_rows, tokenizer, prompt, **how).dataset
    return prompt, rows.dataset, HeldOut(tokens, examples, options.eval_task, max_new_tokens=options.max_new_tokens)


def _training(command, parsed, arguments, rows) -> dict:
    """What an adapter tells of its training. Names of data sets on the hub are told, and no paths."""
    from pathlib import Path

    from s2ft.text.data import DataOptions
    from s2ft.train.parallel import rows_of_update

    data = parsed[DataOptions]
    names = [*data.data, *filter(None, [data.dataset_name]), *(entry["path"] for entry in data.datasets)]
    return {
        "method": command,
        "rows": len(rows) if hasattr(rows, "__len__") else None,
        "data": [name for name in names if "/" in name and not Path(name).expanduser().exists()],
        "epochs": arguments.num_train_epochs,
        "max_steps": arguments.max_steps if arguments.max_steps > 0 else None,
        "batch_size": rows_of_update(arguments),
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
    }


@contextmanager
def naming_what_is_kept(folder) -> Iterator[None]:
    """If a file can't be written inside the context, for example on a full disk, the OSError names what is kept."""
    from s2ft.cli.main import reason_not_written

    try:
        yield
    except Exception as error:
        reason = reason_not_written(error)
        if reason is None:
            raise
        raise OSError(f"{reason}; {folder.kept()}") from error


def _finish(result, folder, arguments, uploads: bool) -> None:
    """Print the summary, write the model card, and upload the adapter if that was asked for."""
    from s2ft.adapter import read_adapter
    from s2ft.adapter.hub import write_card
    from s2ft.train.preparation import upload
    from s2ft.train.sft import log_errors

    steps = f"{result.steps} step{'s' * (result.steps != 1)}"
    quality = f"loss {result.loss:.4f}" if result.reward is None else f"reward {result.reward:.3f}"
    print(
        f"{steps}, {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s, {quality} "
        "(mean of the last tenth of the logged steps)"
    )
    if result.drift is not None:
        where = "" if result.kept_step is None else f", step {result.kept_step} of the {result.stopped_at} trained"
        print(f"{result.drift}{where}")
    if not result.finished:
        print(f"stopped before the end: go on with --resume in {folder.path}")
        return
    with log_errors("the model card was not written"):
        write_card(read_adapter(result.adapter), result.adapter)
    print(f"adapter: {result.adapter}")
    if uploads:
        try:
            print(f"uploaded: {upload(arguments, folder)}")
        except Exception as error:
            raise OSError(f"the adapter was not uploaded: {error}; {folder.kept()}") from error
