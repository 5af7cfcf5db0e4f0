"""One run of a training command: options, data, model, adapter, training, files.

The commands differ in one object, a :class:`~s2ft.train.methods.Method`.
"""

import json
import logging
import math
import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import s2ft
from s2ft.adapter.folders import write_card
from s2ft.attached.learning_rate import FEWEST_UPDATES
from s2ft.attached.loading import read_adapter
from s2ft.attached.mounting import files_of
from s2ft.attached.record import record_of
from s2ft.attached.saving import add_info, push_to_hub
from s2ft.config import S2FTConfig, refuse
from s2ft.distributed import check_all_ranks_agree
from s2ft.files.reading import gguf_files
from s2ft.foreign import newer_than_tested
from s2ft.packages import check_packages
from s2ft.selection import with_protect_ratio
from s2ft.text.collator import text_batches
from s2ft.text.data import DataOptions
from s2ft.text.divergence import answer_rows, longest_other_row, prompt_rows, prompts_of, read_texts, some, text_rows
from s2ft.text.prompts import PromptFormat
from s2ft.train.base_model import apply_kernels, check_kernels, fit_layout, load_base
from s2ft.train.batching import updates_of
from s2ft.train.contents import count_of_trained, hash_of_rows
from s2ft.train.device import begin_on, explain_out_of_memory
from s2ft.train.fit import Finetuned, base_for_vllm, check_packages_of_run, is_checkpointed, log_errors
from s2ft.train.forgetting import ForgettingMeter
from s2ft.train.options import (
    DEFAULT_BATCH,
    ForgettingOptions,
    ModelOptions,
    RunOptions,
    check_ratios,
    divide_batch,
    with_default_ratio,
)
from s2ft.train.output import GROUPS, HELD_OUT_ROWS, ROWS, TRAINING_ROWS, RunFolder, read_log
from s2ft.train.parallel import (
    check_can_shard,
    devices_of,
    has_weights,
    model_is_spread,
    rows_of_update,
    trains_whole_models,
)

logger = logging.getLogger(__name__)
RISEN, UNCHANGED = 5, 0.99  # times the first loss, of which a run warns
MICRO, PASSES = "per_device_train_batch_size", "gradient_accumulation_steps"
NOT_OF_A_RUN = ("hub_", "logging_", "log_", "eval_", "save_", "trackio_", "dataloader_", "ddp_",
                "vllm_server_", "vllm_take_over", "vllm_group_port")  # fmt: skip # prefixes of names
NOT_IN_RUN = ("output_dir", "push_to_hub", "report_to", "run_name", "project", "disable_tqdm", "resume_from_checkpoint",
              "overwrite", "stop_after", "keep_memory", "max_new_tokens", "per_device_eval_batch_size", "debug",
              "local_rank", "batch_eval_metrics", "do_train", "do_eval", "do_predict", "deepspeed", "fsdp",
              "fsdp_config", "parallelism_config", "batch_size")  # fmt: skip
# part of a run whose best checkpoint is kept, or that stops when the outputs have moved too far
EVALUATION = ("eval_strategy", "eval_steps", "eval_data", "eval_limit", "eval_task")


@dataclass(frozen=True)
class Encoded:
    """The rows of a run as the trainer takes them.

    Attributes:
        prompt: The format of the prompts, which the tokenizer has.
        rows: The rows to train on.
        held_out: The rows to evaluate on, or None.
    """

    prompt: PromptFormat
    rows: Any
    held_out: Any = None

    @property
    def held_out_rows(self) -> Any:
        """The rows to evaluate on as the trainer takes them, without the examples that are answered; or None."""
        return getattr(self.held_out, "rows", self.held_out)


@dataclass(frozen=True)
class Run:
    """What the options of a training command say.

    Attributes:
        method: What the command does, a :class:`~s2ft.train.methods.Method`.
        model: How the base is loaded.
        data: Which data is read.
        config: What is trained.
        arguments: The arguments of TRL's trainer.
        options: Options that TRL's arguments do not have.
        forgetting: What is measured and protected.
        given: The options that the user has set, by their full names.
    """

    method: Any
    model: ModelOptions
    data: DataOptions
    config: S2FTConfig
    arguments: Any
    options: RunOptions
    forgetting: ForgettingOptions
    given: Mapping[str, Any]

    @property
    def folder(self) -> RunFolder:
        """The output folder."""
        return RunFolder(self.arguments.output_dir)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return this_rank().is_main_process

    def say(self, text: str) -> None:
        """Log a line in the first process alone."""
        if self.is_first:
            logger.info(text)

    @property
    def resume(self) -> bool | Path:
        """False, True for the newest valid checkpoint, or the path of the checkpoint to resume.

        Raises:
            FileNotFoundError: There is no such checkpoint in the output folder.
        """
        value, folder = self.arguments.resume_from_checkpoint, self.folder.path
        word = str(value).lower()
        if value is None or word in ("false", "no", "none", ""):
            return False
        if word in ("latest", "true", "yes"):
            return True
        path = Path(value).expanduser()
        if not path.is_dir() or path.resolve().parent != folder.resolve():
            raise FileNotFoundError(f"resume_from_checkpoint {value} is no checkpoint in the output folder {folder}")
        return path

    @property
    def keeps_best(self) -> bool:
        """Whether what is evaluated decides which weights the run ends with."""
        return self.arguments.load_best_model_at_end or self.forgetting.stop_at_kl is not None

    def for_model(self, model) -> "Run":
        """Return the run with the ratio and the layout that follow from the model, unless the user set them."""
        if model.name_or_path.endswith(".gguf") and not self.model.keep_packed:
            self.say(f"the file's weights are unpacked to {str(model.dtype)[6:]}: --keep-packed keeps them packed")
        if self.config.codec == "none" and model.name_or_path.endswith(".gguf"):
            self.say("s2ft merge will round to the base's file: --codec auto --group 32 trains what the file can hold")
        return replace(self, config=fit_layout(with_default_ratio(self.config, model), model, "layout" in self.given))

    def with_rate(self, model, rows: Any) -> "Run":
        """Return the run with the learning rate for what is trained of a model, unless the user set one."""
        if not self.method.suggests_rate or "learning_rate" in self.given:
            return self
        updates = updates_of(self.arguments, rows)
        rate = self.arguments.learning_rate = s2ft.suggested_rate(model, updates)
        is_coded = any(mount.layer.rounding is not None for mount in record_of(model).mounts.values())
        steps = ", the steps of the file" if is_coded else ""
        self.say(
            f"learning rate {rate:g}, by the width, the share that is trained, the size of the weights{steps} and "
            f"{updates:,} updates; --learning-rate sets another"
        )
        return replace(self, given={**self.given, "learning_rate": rate})  # the run's config.yaml has it

    def determining(self) -> dict[str, Any]:
        """Return the options that a resumed run must have in common with the run that it continues, as JSON values.

        The names of the selection begin with "adapter.", those of the model with "model.", and those of TRL's arguments
        with "training.".
        """
        arguments, given, best = self.arguments, self.given, self.keeps_best
        found: dict[str, Any] = {"command": self.method.name, "model": self.model.model_name_or_path}
        found |= {f"model.{one.name}": getattr(self.model, one.name) for one in fields(self.model)[1:]}
        found |= {f"adapter.{key}": entry for key, entry in self.config.to_dict().items()}
        for options in (self.data, self.options, self.forgetting):
            found |= {
                one.name: _plain(getattr(options, one.name)) for one in fields(options) if _belongs(one.name, best)
            }
        for one in fields(arguments):
            if one.init and _belongs(one.name, best) and given.get(one.name, one.default) != one.default:
                value = _plain(given[one.name])
                if one.name == "model_init_kwargs":
                    value.pop("distributed_config", None)  # other devices can go on with the run
                if value != {}:
                    found[f"training.{one.name}"] = value
        found |= {
            f"training.{name}": getattr(arguments, name)
            for name in (MICRO, PASSES, "num_train_epochs", "seed", "data_seed")
        }
        return {**found, ROWS: rows_of_update(arguments), GROUPS: devices_of(arguments).groups}


# ---- the run -------------------------------------------------------------------------------------------


def train(run: Run, config_text: Any) -> None:
    """Train, after everything has been checked. Only the first rank reserves the output folder.

    Args:
        run: The options.
        config_text: Function of the run that returns the text of config.yaml.

    Raises:
        ValueError: An option does not fit the model, the data or the machine.
        FileExistsError: The output folder holds another run, or another process uses it.
        OSError: A file can't be written. The message names what is kept.
        KeyboardInterrupt: Ctrl-C ended the run, after a checkpoint.
    """
    run = replace(run, config=config_of(run))
    arguments, options, folder = run.arguments, run.options, run.folder
    untested = newer_than_tested()
    if untested:
        run.say(untested)
    check_can_shard(arguments)
    check_packages_of_run(arguments)
    check_packages("a model in 4 or 8 bit" if run.model.quantized else "")
    check_kernels(options.kernels)
    set_batches(arguments, options, run.given)
    with folder.reserved(bool(run.resume), options.overwrite) if run.is_first else nullcontext():
        # The adapter is uploaded once, at the end. The trainer would upload every checkpoint.
        uploads, arguments.push_to_hub = arguments.push_to_hub, False
        result = _train(run, config_text)
        if run.is_first:
            _finish(run, result, uploads)
    if result.interrupted:
        raise KeyboardInterrupt


def config_of(run: Run) -> S2FTConfig:
    """Return what a run trains: what the options say, or what the adapter was trained with that it begins with.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: The options say it too, or the adapter is in the folder that the run writes.
    """
    folder = run.options.init_adapter
    used = {"init_adapter": [folder] if folder else [], "on_top": run.options.on_top}
    refuse(
        *(
            (
                run.folder.path.resolve() in (path, *path.parents),
                f"{name} {path} is in the output folder: choose another --output",
            )
            for name, paths in used.items()
            for path in map(Path.resolve, map(Path, paths))
        )
    )
    if folder is None:
        check_ratios(run.config, run.given)
        return with_protect_ratio(run.config, bool(run.forgetting.protect))
    choosing = {one.name for one in fields(S2FTConfig)} - {"seed"}  # that of the run; the config's is selection_seed
    choosing |= {"selection_seed", "calibration_examples", "protect", "on_top"}
    given = sorted(choosing & run.given.keys())
    refuse((given, f"init_adapter trains the units of an adapter: leave out {', '.join(given)}"))
    return read_adapter(folder).config


def load(run: Run) -> tuple[Run, Any, Any, Encoded]:
    """Read the data, load the model, and encode the rows with its tokenizer.

    Returns:
        The run with what follows from the model, the model, its tokenizer, and the rows.
    """
    method, arguments, device = run.method, run.arguments, this_rank().device
    rows, held_out = method.read(run)
    fitting = replace(run.options, batch_size=run.options.batch_size or fitting_batch(run, len(rows)))
    run.say(set_batches(arguments, fitting, run.given))
    begin_on(device, run.options.keep_memory, run.is_first)
    model, tokenizer = load_base(run.model, arguments)
    run = run.for_model(model)
    data = method.encode(run, model, tokenizer, rows, held_out)
    if run.is_first and data.held_out is not None:
        warn_of_trained_rows(data)
    return run, model, tokenizer, data


def warn_of_trained_rows(data: Encoded) -> None:
    """Log how many held-out rows are trained on too: what is measured on them says little about new ones."""
    count = count_of_trained(data.rows, data.held_out_rows)
    if count:
        logger.warning(
            "warning: %d of %d held-out rows stand in the training rows too: their loss says little about new rows",
            count,
            len(data.held_out_rows),
        )


def _train(run: Run, config_text: Any) -> Finetuned:
    """Read the data, load the model, attach the adapter, and train it."""
    method, arguments = run.method, run.arguments
    method.check(run)
    measured, protected = other_text(run)
    run, model, tokenizer, data = load(run)
    calibration = None if run.options.init_adapter else method.calibration(run, tokenizer, data)
    with base_for_vllm(model, tokenizer, arguments) as base:
        meter = meter_of(run, measured, model, tokenizer, data)
        size, most = arguments.per_device_train_batch_size, run.forgetting.protect_rows
        protect = text_batches(protected, tokenizer, longest_other_row(model), most, run.config.seed, size)
        _begin(run, model, data, calibration, protect, config_text)
        how = {"options": run.options, "resume": run.resume, "held_out": data.held_out, "meter": meter}
        with explain_out_of_memory(smaller_step(arguments), run.folder.kept):
            return method.train(run, model, tokenizer, data, **how, **({"base": base} if base else {}))


def _begin(run: Run, model, data: Encoded, calibration, protect, config_text: Any) -> None:
    """Attach the adapter to the model, record its prompt and training, and write the options into the output folder."""
    options, ranks = run.options, this_rank()
    placed = any(getattr(model, name, None) is not None for name in ("hf_quantizer", "hf_device_map"))
    placed = placed or model_is_spread(model) or not has_weights(model)
    if not placed and (trains_whole_models(run.arguments) or calibration is not None or protect is not None):
        model.to(run.arguments.device)  # before the Trainer does, since trials are made where the training is
    load_below(model, options.on_top, options.name)
    if options.init_adapter is None:
        report = s2ft.attach(model, run.config, options.name, calibration, protect=protect, on_top=bool(options.on_top))
    else:
        report = s2ft.load_adapter(model, options.init_adapter, options.name, trainable=True)
    run = run.with_rate(model, data.rows)
    apply_kernels(model, options.kernels)
    add_info(model, {"prompt": data.prompt.to_dict(), "training": _told(run, data.rows)})
    # Statistics may round differently on different devices.
    check_all_ranks_agree("selection", record_of(model).selection.digest)
    if run.is_first:
        contents = {TRAINING_ROWS: hash_of_rows(data.rows)}
        if data.held_out is not None:
            contents[HELD_OUT_ROWS] = hash_of_rows(data.held_out_rows)
        run.folder.begin(
            {**run.determining(), "rows": len(data.rows)},
            bool(run.resume),
            config_text(run),
            contents=contents,
            may_change=() if run.keeps_best else (HELD_OUT_ROWS,),
        )
        print(replace(report, untested=""), flush=True)  # the first line of the run has said it
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
    names: list[str] = []
    for folder in folders:
        adapter = read_adapter(folder)
        chosen = adapter.name if adapter.name not in (name, *names) else Path(folder).name
        is_packed = adapter.config.codec != "none" and files_of(model) is not None
        try:
            s2ft.load_adapter(model, adapter, chosen, trainable=is_packed, active=False)
            if is_packed:
                s2ft.freeze_adapter(model)  # so that it is what the file will hold
        except ValueError as error:
            raise ValueError(f"on_top {folder}: {error}") from error
        names.append(chosen)
    if names:
        s2ft.set_adapter(model, dict.fromkeys(names, 1.0))


def _told(run: Run, rows) -> dict:
    """What an adapter tells of its training. Names of data sets on the hub are told, and no paths."""
    data, arguments = run.data, run.arguments
    names = [*data.data, *filter(None, [data.dataset_name]), *(entry["path"] for entry in data.datasets)]
    return {
        "method": run.method.name,
        "rows": len(rows),
        "data": [name for name in names if "/" in name and not Path(name).expanduser().exists()],
        "epochs": arguments.num_train_epochs,
        "max_steps": arguments.max_steps if arguments.max_steps > 0 else None,
        "batch_size": rows_of_update(arguments),
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
    }


def _finish(run: Run, result: Finetuned, uploads: bool) -> None:
    """Print the summary, write the model card, and upload the adapter if that was asked for."""
    folder, arguments = run.folder, run.arguments
    path = shlex.quote(str(folder.path))
    steps = f"{result.steps} step{'s' * (result.steps != 1)}"
    quality = f"loss {result.loss:.4f}" if result.reward is None else f"reward {result.reward:.3f}"
    print(
        f"{steps}, {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s, {quality} "
        "(mean of the last tenth of the logged steps)"
    )
    lines = read_log(folder.log)
    preferred = [line["rewards/accuracies"] for line in lines if "rewards/accuracies" in line]
    if preferred:
        print(
            f"chosen above rejected: {preferred[0]:.0%} of the first logged pairs, {preferred[-1]:.0%} of the last ones"
        )
    losses = [line["loss"] for line in lines if "loss" in line]
    first = next(iter(losses), result.loss)
    if result.reward is None and len(losses) > 1 and UNCHANGED * first < result.loss <= RISEN * first:
        logger.warning(
            "warning: the loss has hardly changed, from %.4f to %.4f: train longer, with a higher --learning-rate than "
            "%g, or more weights",
            first,
            result.loss,
            arguments.learning_rate,
        )
    if result.reward is None and not result.loss <= RISEN * first:  # NaN has risen too
        logger.warning(
            "warning: the loss has risen from %.4f to %.4f: lower --learning-rate, which was %g",
            first,
            result.loss,
            arguments.learning_rate,
        )
    if result.drift is not None:
        where = "" if result.kept_step is None else f", step {result.kept_step} of the {result.stopped_at} trained"
        print(f"{result.drift}{where}")
    if not result.finished:
        command = f"s2ft {run.method.name} --config {shlex.quote(str(folder.config))} --output {path} --resume"
        print(f"stopped before the end; go on with\n  {command}", flush=True)
        return
    with log_errors("the model card was not written"):
        write_card(read_adapter(result.adapter), result.adapter)
    print(f"adapter: {result.adapter}")
    if result.comparison is not None:
        print(f"\n{result.comparison}")
    merged = "my-model.gguf" if gguf_files(Path(run.model.model_name_or_path).expanduser()) else "my-model"
    below = [shlex.quote(one) for one in run.options.on_top]  # without these it was never trained
    whole = shlex.quote(f"{folder.path}-whole") if below else path
    commands = [f"s2ft combine {' '.join(below)} {path} --output {whole}"] if below else []
    commands += [f"s2ft chat --adapter {whole}", f"s2ft merge --adapter {whole} --output {merged}"]
    print("\nnext:", *commands, sep="\n  ")
    if uploads:
        try:
            place = push_to_hub(
                folder.adapter,
                arguments.hub_model_id or folder.path.absolute().name,
                token=arguments.hub_token,
                revision=arguments.hub_revision,
                private=arguments.hub_private_repo,
            )
            print(f"uploaded: {place}")
        except Exception as error:
            raise OSError(f"the adapter was not uploaded: {error}; {folder.kept()}") from error


# ---- parts of it ---------------------------------------------------------------------------------------


def set_batches(arguments: Any, options: RunOptions, given: Mapping[str, Any]) -> str:
    """Set the rows of a forward pass and the number of passes of an update.

    Without any of the three options, an update has 64 rows. `batch_size` alone is divided among the devices. The other
    two mean what they mean in transformers.

    Args:
        arguments: Arguments of a trainer, which are changed.
        options: The options of the run, with `batch_size`.
        given: The options that the user has set, by name.

    Returns:
        The line that says how many rows an update has.

    Raises:
        ValueError: The rows can't be divided, or the three options contradict each other.
    """
    shared, total = devices_of(arguments), options.batch_size
    devices = shared.groups
    micro = arguments.per_device_train_batch_size if MICRO in given else None
    passes = arguments.gradient_accumulation_steps if PASSES in given else None
    if total is None and micro is None and passes is None:
        total = max(1, round(DEFAULT_BATCH / devices)) * devices
    if total is not None:
        if micro and passes and micro * passes * devices != total:
            raise ValueError(
                f"batch_size {total} contradicts {MICRO} {micro} × {PASSES} {passes} × {shared} = "
                f"{micro * passes * devices} rows: leave one of them out"
            )
        micro, passes = divide_batch(total, devices, micro, passes)
        arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = micro, passes
    micro, passes = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    return (
        f"{micro * passes * devices} rows an update: {micro} rows × {passes} forward pass{'es' * (passes != 1)} × "
        f"{shared}"
    )


def fitting_batch(run: Run, rows: int) -> int | None:
    """Return the rows of an update for data that would make too few updates of the default; None for the default.

    If that is not enough, the run also gets more epochs, unless the user has set their number.

    Args:
        run: The options. A run that names the rows of an update or of a forward pass has none of its own.
        rows: Number of training rows.
    """
    arguments = run.arguments
    if not run.method.fits_batch or MICRO in run.given or PASSES in run.given:
        return None
    passed = rows * arguments.num_train_epochs
    most = rows if arguments.max_steps > 0 else passed / FEWEST_UPDATES
    if most >= DEFAULT_BATCH:
        return None
    devices = devices_of(arguments).groups
    size = max(4 * devices, 2 ** int(math.log2(max(most, 1))) // devices * devices)
    if arguments.max_steps <= 0:
        if "num_train_epochs" not in run.given and passed < size * FEWEST_UPDATES:
            arguments.num_train_epochs = math.ceil(size * FEWEST_UPDATES / rows)
        epochs = arguments.num_train_epochs
        run.say(
            f"{DEFAULT_BATCH} rows an update would make {passed / DEFAULT_BATCH:.0f} updates of {rows} rows, which are "
            f"few: {size} rows and {epochs:g} epochs make {rows * epochs / size:.0f}; --batch-size and --epochs set "
            "other numbers"
        )
    return size


def other_text(run: Run) -> tuple[Any, Any]:
    """Read the files of `--forgetting-data` and `--protect`, before a model is loaded."""
    options, data = run.forgetting, run.data

    def rows(names: list[str], most: int) -> Any:
        own = DataOptions(data=names, skip_bad_rows=data.skip_bad_rows)  # `field` names those of the training rows
        return read_texts(own, most, run.config.seed) if names else None

    return rows(options.forgetting_data, options.meter_rows), rows(options.protect, options.protect_rows)


def meter_of(run: Run, other, model, tokenizer, data: Encoded) -> ForgettingMeter | None:
    """Make the meter of a run, or return None if nothing is to be measured."""
    options, seed = run.forgetting, run.config.seed
    if not options.measures:
        return None
    held_out = data.held_out_rows
    texts = None if other is None else text_rows(other, tokenizer, longest_other_row(model), options.meter_rows, seed)
    prompts: Any = None
    if options.measures_kl:
        drawn = some(data.rows if held_out is None else held_out, options.meter_rows, seed)
        rows = [run.method.token_row(tokenizer, row) for row in drawn]
        answered = partial(answer_rows, tokenizer=tokenizer, max_new_tokens=run.options.max_new_tokens)
        # The answers are those of the base, when the meter measures it.
        prompts = partial(answered, prompts=prompts_of(rows)) if options.kl_on == "answers" else prompt_rows(rows)
    return ForgettingMeter(
        other=texts,
        prompts=prompts,
        every=options.meter_steps,
        stop_at_forgetting=options.stop_at_forgetting,
        stop_at_kl=options.stop_at_kl,
    )


def _belongs(name: str, best: bool = False) -> bool:
    return (best and name in EVALUATION) or not (name in NOT_IN_RUN or name.startswith(NOT_OF_A_RUN))


def _plain(value: Any) -> Any:
    """A value as JSON holds it."""
    return json.loads(json.dumps(value, default=lambda one: getattr(one, "value", str(one))))


# ---- this process and its packages ----------------------------------------------------------------------


def this_rank():
    """Join the launched processes and return accelerate's state, which has the rank of this one.

    Without a GPU, accelerate needs `cpu=True`. Otherwise each process would have rank 0, and all would write to the
    same folder.
    """
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def smaller_step(arguments) -> str:
    """Return the options with which a step of a run takes less memory.

    Args:
        arguments: The arguments of a Trainer.
    """
    if not is_checkpointed(arguments):
        return "--gradient-checkpointing"
    batch, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    if batch == 1:
        return "--load-in-4bit or a smaller --max-length"
    half = batch // 2 if batch % 2 == 0 else 1
    return f"--per-device-train-batch-size {half} --gradient-accumulation-steps {accumulation * (batch // half)}"
