"""What the training commands do before and after the training: batches, checks, run.json, and the upload."""

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from s2ft.train.options import DEFAULT_BATCH, ModelOptions, RunOptions, divide_batch
from s2ft.train.output import GROUPS, ROWS, RunFolder
from s2ft.train.parallel import devices_of, rows_of_update

logger = logging.getLogger(__name__)
MICRO, PASSES = "per_device_train_batch_size", "gradient_accumulation_steps"
NOT_OF_A_RUN = ("hub_", "logging_", "log_", "eval_", "save_", "trackio_", "dataloader_", "ddp_",
                "vllm_server_", "vllm_transport", "vllm_take_over", "vllm_group_port")  # fmt: skip # prefixes of names
NOT_IN_RUN = ("output_dir", "push_to_hub", "report_to", "run_name", "project", "disable_tqdm", "resume_from_checkpoint",
              "overwrite", "stop_after", "max_new_tokens", "per_device_eval_batch_size", "debug", "local_rank",
              "batch_eval_metrics", "do_train", "do_eval", "do_predict", "deepspeed", "fsdp",
              "fsdp_config", "parallelism_config")  # fmt: skip
EVALUATION = ("eval_strategy", "eval_steps")  # part of a run whose best checkpoint is kept


def set_batches(arguments: Any, options: RunOptions, given: dict[str, Any]) -> str:
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
        if passes:
            divide_batch(total, devices * passes)
            micro = total // (devices * passes)
        micro, passes = divide_batch(total, devices, micro)
        arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = micro, passes
    micro, passes = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    return (
        f"{micro * passes * devices} rows an update: {micro} rows × {passes} forward pass{'es' * (passes != 1)} × "
        f"{shared}"
    )


def check_upload(arguments: Any) -> None:
    """Check before the training that the adapter can be uploaded after it.

    Raises:
        ValueError: The hub can't be reached, or takes no token.
    """
    if not arguments.push_to_hub:
        return
    from huggingface_hub import HfApi

    try:
        HfApi(token=arguments.hub_token).whoami()
    except Exception as error:  # each error of the network has a class of its own
        first = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        raise ValueError(f"push_to_hub: the hub does not let you write ({first}): run `hf auth login` first") from error


def upload(arguments: Any, folder: RunFolder) -> str:
    """Upload the adapter of a run with its model card.

    Args:
        arguments: Arguments of a trainer, with `hub_model_id` and the other options of the hub. The repository has the
            name of the output folder if there is no `hub_model_id`.
        folder: The output folder.

    Returns:
        The address of the commit.
    """
    from s2ft.adapter.push import push_to_hub

    return push_to_hub(
        folder.adapter,
        arguments.hub_model_id or folder.path.absolute().name,
        revision=arguments.hub_revision,
        private=arguments.hub_private_repo,
        token=arguments.hub_token,
    )


def run_options(command: str, objects: dict[type, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a resumed run must have in common with the run that it continues.

    Args:
        command: Name of the command.
        objects: The options of the run, one object of each dataclass.
        given: The options that the user has set, by name.

    Returns:
        JSON values by name. The names of the selection begin with "adapter.", those of TRL's arguments with
        "training.".
    """
    found: dict[str, Any] = {"command": command}
    for kind, value in objects.items():
        if hasattr(kind, "ratios"):  # the S2FTConfig
            found.update({f"adapter.{key}": entry for key, entry in value.to_dict().items()})
        elif isinstance(value, ModelOptions):
            found["model"] = value.model_name_or_path
            found.update({f"model.{one.name}": getattr(value, one.name) for one in fields(kind)[1:]})
        elif hasattr(value, "output_dir"):
            best = value.load_best_model_at_end
            defaults = {one.name: one.default for one in fields(kind) if one.init and _belongs(one.name, best)}
            changed = [name for name in defaults if given.get(name, defaults[name]) != defaults[name]]
            values = {name: _plain(given[name]) for name in changed}
            values.get("model_init_kwargs", {}).pop("distributed_config", None)  # other devices can go on with the run
            found.update({f"training.{name}": entry for name, entry in values.items() if entry != {}})
            found.update({f"training.{name}": getattr(value, name) for name in (MICRO, PASSES, "seed", "data_seed")})
            found.update({ROWS: rows_of_update(value), GROUPS: devices_of(value).groups})
        else:
            names = [one.name for one in fields(kind) if _belongs(one.name, False) and one.name != "batch_size"]
            found.update({name: _plain(getattr(value, name)) for name in names})
    return found


def _belongs(name: str, best: bool) -> bool:
    if best and name in EVALUATION:
        return True
    return name not in NOT_IN_RUN and not name.startswith(NOT_OF_A_RUN)


def _plain(value: Any) -> Any:
    """A value that JSON can hold."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    value = getattr(value, "value", value)
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def checkpoint_to_resume(value: Any, folder: Path) -> bool | Path:
    """Return what `--resume` asks for.

    Args:
        value: The value of `resume_from_checkpoint`: None, a word for yes or no, or the path of a checkpoint.
        folder: The output folder of the run.

    Returns:
        False, True for the newest valid checkpoint, or the path of the checkpoint.

    Raises:
        FileNotFoundError: There is no such checkpoint in the folder.
    """
    word = str(value).lower()
    if value is None or word in ("false", "no", "none", ""):
        return False
    if word in ("latest", "true", "yes"):
        return True
    path = Path(value).expanduser()
    if not path.is_dir() or path.resolve().parent != folder.resolve():
        raise FileNotFoundError(f"resume_from_checkpoint {value} is no checkpoint in the output folder {folder}")
    return path
