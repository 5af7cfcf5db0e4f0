"""Saves the adapters of a model, also where transformers' save_pretrained is called.

While a model of transformers trains an adapter, save_pretrained writes the adapter alone. The Trainers of transformers
and TRL can resume from these checkpoints without changes.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.adapter import native
from s2ft.adapter.adapter import Adapter
from s2ft.adapter.folders import CARD, adapter_folder, card_of, write_card
from s2ft.attached.active import (
    check_same_extra,
    extra_parameters,
    extra_values,
    mounted_deltas,
    set_extra,
    set_mounted_deltas,
)
from s2ft.attached.checks import check_extra_fits
from s2ft.attached.hosts import remove_hooks
from s2ft.attached.record import Attachment, attachment_of, check_known, of_compiled
from s2ft.attached.report import print_trainable_parameters
from s2ft.distributed import full_tensors, is_partitioned, ranks_sharing, reshard_all, run_on_first_rank
from s2ft.files.plain_text import replace_file
from s2ft.files.reading import json_entry
from s2ft.model.weights import Delta


@of_compiled
def get_adapter(model: nn.Module, name: str, state: Mapping[str, Tensor] | None = None) -> Adapter:
    """Return a loaded adapter, or a copy of the trainable one as it is now.

    Adapters support arithmetic: ``a + b``, ``0.5 * a``, ``-a``. The trainable adapter of a sharded model is gathered:
    every rank must call this.

    Args:
        model: Model with adapters.
        name: Name of the adapter.
        state: A gathered state_dict that has every s2 of the trainable adapter. Default: the model's own.

    Returns:
        The adapter, with deltas in the base's own order.

    Raises:
        ValueError: No adapter has this name, or the state lacks an s2.
        RuntimeError: A rank did not take part within ten minutes.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> half = 0.5 * s2ft.get_adapter(model, "math")
        >>> s2ft.load_adapter(model, half, "half", active=False)
    """
    record = attachment_of(model)
    check_known(record, name)
    if name != record.name:
        return record.loaded[name]
    reshard_all(model)
    deltas = mounted_deltas(record, state)
    return Adapter(
        name,
        record.config,
        record.selection,
        record.fingerprint,
        deltas,
        dict(record.info),
        couplings=record.custom_couplings,
        extra_weights=extra_values(model, record, state),
        structure=record.structure,
    )


# ---- the base ------------------------------------------------------------------------------------------------


def model_info(model: nn.Module) -> dict[str, Any]:
    """Return what an adapter stores about its base in `info`: name, model type, and dtype.

    The dtype is the one in which base + delta is rounded, so a merge must use it too.
    """
    config = getattr(model, "config", None)
    info = {
        "base_model": getattr(config, "_name_or_path", None) or None,
        "model_type": getattr(config, "model_type", None),
    }
    dtype = getattr(model, "dtype", None)
    return info if dtype is None else {**info, "base_dtype": str(dtype).removeprefix("torch.")}


@of_compiled
def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    name: str | None = None,
    info: dict[str, Any] | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Save one adapter of a model as s2ft_config.json and a safetensors file, in the base's own order.

    The slices of a sharded model (FSDP2, or ZeRO's optimizers) are gathered: every rank must call this. The first rank
    writes, and the others return when the files are complete. On any other model each rank that calls this writes.

    Args:
        model: Model with at least one adapter.
        directory: Folder to write to, created if needed. An adapter in it is replaced in one step.
        name: Adapter to save. Default: the trainable one, else an active one, else the first.
        info: JSON values to save with the adapter, for example the name of the base model.
        state: A state_dict that others have gathered (accelerate, Trainer), with every s2. Default: the model's own.

    Raises:
        ValueError: No adapter has this name, or a delta is empty or not finite. Nothing is written.
        RuntimeError: Another rank failed to write, or did not take part within ten minutes.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> s2ft.save_adapter(model, "math", info={"data": "gsm8k"})
        >>> s2ft.read_adapter("math").info["data"]
        'gsm8k'
    """
    record = attachment_of(model)
    name = record.default_name if name is None else name
    adapter = get_adapter(model, name, state)
    adapter.info = {**model_info(model), **adapter.info, **(info or {})}
    ranks = _ranks_to_wait_for(model, record) if name == record.name and state is None else None
    run_on_first_rank("saving an adapter", ranks, lambda: native.write(adapter, directory))


@of_compiled
def add_info(model: nn.Module, info: dict[str, Any]) -> None:
    """Add values to the info of the trainable adapter: every checkpoint and the saved adapter have them.

    Args:
        model: Model with a trainable adapter.
        info: JSON values by name. A name that the adapter has already gets the new value.

    Raises:
        ValueError: The model has no trainable adapter, or a value is not one that JSON can hold.

    Example:
        >>> from s2ft.attached.saving import add_info
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> add_info(model, {"data": "gsm8k"})
        >>> s2ft.save_adapter(model, "math")
        >>> s2ft.read_adapter("math").info["data"]
        'gsm8k'
    """
    record = attachment_of(model)
    if record.name is None:
        raise ValueError(f"the model trains no adapter; it has {', '.join(record.names)}: call s2ft.attach first")
    try:
        record.add_info(json.loads(json.dumps(info, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"info must have values that JSON can hold: {error}") from None


@of_compiled
def gather_trained(model: nn.Module) -> dict[str, Tensor]:
    """Return all trained parameters in full, by their names in the model, for `state` of :func:`save_adapter`.

    Every rank of a sharded model must call this.

    Raises:
        RuntimeError: A rank did not take part within ten minutes.
    """
    reshard_all(model)
    return full_tensors(trained_tensors(model, attachment_of(model)))


def _ranks_to_wait_for(model: nn.Module, record: Attachment) -> list[int] | None:
    """The ranks that must save together, so that one of them writes; None if this one can save by itself."""
    ranks = ranks_sharing(trained_tensors(model, record).values())
    if ranks is None:
        return None
    meshes = ranks_sharing(mount.layer.weight for mount in record.mounts.values())  # those of tensor parallelism too
    return sorted({*ranks, *(meshes or ())})


def trained_tensors(model: nn.Module, record: Attachment) -> dict[str, Tensor]:
    return {**record.slices, **extra_parameters(model, record)}


# ---- uploading ---------------------------------------------------------------------------------------------


def push_to_hub(
    model_or_folder: nn.Module | str | Path,
    repo_id: str,
    name: str | None = None,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    message: str = "S²FT adapter",
) -> str:
    """Upload one adapter to a repository on the Hugging Face hub.

    The two files of the adapter are uploaded in one commit. A model card is added, unless the folder or the repository
    has one. The repository is created if it does not exist. :func:`s2ft.load_adapter` loads the adapter by `repo_id`.

    Args:
        model_or_folder: A model with adapters, or a folder that :func:`s2ft.save_adapter` wrote.
        repo_id: The repository, as "org/name". A name without owner is one of your own.
        name: The adapter of the model; default as in :func:`s2ft.save_adapter`.
        revision: The branch, which is created if it does not exist; default: the repository's main branch.
        private: Whether a repository that is created now is private.
        token: A token of the hub; default: the one of `hf auth login`.
        message: The commit's message.

    Returns:
        The address of the commit.

    Raises:
        ValueError: The files of the adapter are damaged, or `name` is given with a folder. Nothing has been uploaded.
        FileNotFoundError: The folder has no adapter.
        huggingface_hub.errors.HfHubHTTPError: The hub has refused the upload.

    Example:
        >>> # Skipped, because it needs a network and an account.
        >>> s2ft.push_to_hub(model, "org/math", private=True)  # doctest: +SKIP
        'https://huggingface.co/org/math/commit/...'
    """
    if not isinstance(model_or_folder, nn.Module):
        if name is not None:
            raise ValueError("name selects an adapter of a model, but a folder holds one adapter: leave name out")
        return _upload(adapter_folder(Path(model_or_folder)), repo_id, revision, private, token, message)
    with TemporaryDirectory() as folder:
        save_adapter(model_or_folder, folder, name)
        return _upload(Path(folder), repo_id, revision, private, token, message)


def _upload(folder: Path, repo_id: str, revision, private, token, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi  # not at the top: it takes long

    adapter, files = native.read_files(folder)
    card = card_of(adapter).encode()
    if (folder / CARD).exists() and (folder / CARD).read_bytes() != card:  # A card that was written by hand.
        files[CARD] = (folder / CARD).read_bytes()
    api = HfApi(token=token)
    # with the owner, if only a name was given
    repo_id = getattr(api.create_repo(repo_id, private=private, exist_ok=True), "repo_id", repo_id)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if CARD not in files and not api.file_exists(repo_id, CARD, revision=revision):
        files[CARD] = card
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    return str(api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url)


# ---- a model of transformers while it trains an adapter -------------------------------------------------------------

logger = logging.getLogger(__name__)
# Trainer resumes from this file, or from one with all weights: it passes the tensors of the files that it names to
# load_state_dict.
INDEX = "model.safetensors.index.json"
ATTRIBUTES = ("save_pretrained", "print_trainable_parameters", "_keys_to_ignore_on_save")
NOT_GATHERED = (
    "%s gets no adapter: ZeRO-3 has spread it over the ranks, and this rank saves alone. DeepSpeed's own checkpoint "
    "there has it, with the base. Use S2FTTrainer, call s2ft.save_adapter(model, folder) on every rank after the "
    "training, or set stage3_gather_16bit_weights_on_model_save, which gathers the base too"
)
WHOLE_MODELS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json")


def save_pretrained(
    self: nn.Module,
    save_directory,
    is_main_process: bool = True,
    state_dict=None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Save the trainable adapter, not the model: the model's weights alone would be a checkpoint of the base.

    To save the whole model, call :func:`s2ft.merge` first.

    Args:
        self: Model with a trainable adapter.
        save_directory: Folder to write to, created if needed.
        is_main_process: Whether this rank writes.
        state_dict: A gathered state_dict. Default: the model's own.
        push_to_hub: Must be False: :func:`s2ft.push_to_hub` uploads adapters.
        options: Further options of transformers, which are ignored.

    Raises:
        ValueError: `push_to_hub` is True, or the folder contains a whole model.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> model.save_pretrained("checkpoint")
        >>> s2ft.read_adapter("checkpoint").name
        'default'
    """
    if push_to_hub:
        raise ValueError("push_to_hub must be False while an adapter is trained: use s2ft.push_to_hub(model, repo_id)")
    if not is_main_process:
        return
    directory, record = Path(save_directory), attachment_of(self)
    if state_dict == {} and any(map(is_partitioned, record.slices.values())):  # the plain Trainer, which did not gather
        logger.warning(NOT_GATHERED, directory)
        return
    _check_no_model(directory)
    save_adapter(self, directory, record.name, state=state_dict)
    write_card(native.read(directory), directory)
    layers = dict.fromkeys([*record.slices, *extra_parameters(self, record)], native.TENSORS)
    replace_file(
        directory / INDEX, json.dumps({"metadata": {"format": "s2ft"}, "weight_map": layers}, indent=1).encode()
    )


def _check_no_model(directory: Path) -> None:
    """Check that the folder has no model, which would load with random weights after its index was replaced.

    Raises:
        ValueError: The folder contains a whole model's weights, or an index that s2ft did not write.
    """
    found = [name for name in WHOLE_MODELS if (directory / name).exists()]
    if (directory / INDEX).exists() and json_entry(directory / INDEX, "metadata", "format") != "s2ft":
        found.append(INDEX)
    if found:
        raise ValueError(
            f"save_directory {directory} holds another model ({found[0]}), which would load with random "
            "weights after an adapter was saved there: give another folder, or call s2ft.merge first to save the whole "
            "model"
        )


def _load_deltas(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Pre-hook of load_state_dict: copy the tensors of an adapter's file into the trainable layers.

    Raises:
        ValueError: They are of another selection. Nothing has changed.
    """
    record = attachment_of(model)
    marked = prefix + native.EXTRA
    found = {
        key.removeprefix(prefix).rpartition(".")[0]
        for key in state
        if key.startswith(prefix) and key.endswith(".delta") and not key.startswith(marked)
    }
    if not found:
        return  # the state has the layers' s2, not the tensors of an adapter's file
    if found != record.parts.keys():
        raise ValueError(
            "the adapter to load trains other projections than this model: "
            f"{', '.join(sorted(found ^ record.parts.keys())[:3])}"
        )
    deltas = {name: _delta(record, name, state, prefix + name) for name in found}
    values = {key.removeprefix(marked): value for key, value in state.items() if key.startswith(marked)}
    check_same_extra(model, record, values)
    check_extra_fits(model, record, record.name, values)
    reshard_all(model)
    set_mounted_deltas(record, deltas)
    set_extra(model, record, values)
    for name in found:
        del state[f"{prefix}{name}.delta"], state[f"{prefix}{name}.index"]
    for name in values:
        del state[marked + name]
    _ignore_base_weights(model, values)


def _ignore_base_weights(model: nn.Module, extra_names: Iterable[str]) -> None:
    """List the base's weights as not saved, so that Trainer does not warn that a checkpoint lacks them."""
    model._keys_to_ignore_on_save = set(model.state_dict(keep_vars=True)) - {*attachment_of(model).slices, *extra_names}


def _delta(record: Attachment, name: str, state: dict[str, Tensor], key: str) -> Delta:
    """Check and return the delta of one projection from the tensors of an adapter's file."""
    mount, part = record.parts[name]
    index, values = state.get(f"{key}.index"), state[f"{key}.delta"]
    if index is None or not torch.equal(index.long().cpu(), part.elements):
        raise ValueError(f"the adapter to load has other units of {name} than the ones this model trains")
    shape = list(mount.layer.s2.shape)
    shape[mount.layer.dim] = part.elements.numel()
    if list(values.shape) != shape:
        raise ValueError(f"the adapter to load has shape {tuple(values.shape)} for {name}, expected {tuple(shape)}")
    return Delta(mount.layer.dim, part.elements, values)


def add_to_host(model: nn.Module, record: Attachment) -> None:
    """Give a model of transformers the functions that save and load its trainable adapter."""
    if not hasattr(type(model), "save_pretrained"):
        return
    record.replaced_attributes = {name: model.__dict__[name] for name in ATTRIBUTES if name in model.__dict__}
    # partial objects: torch.load could not make bound methods of a model that it is still loading
    model.save_pretrained = partial(save_pretrained, model)
    model.print_trainable_parameters = partial(print_trainable_parameters, model)
    _ignore_base_weights(model, ())
    model.register_load_state_dict_pre_hook(_load_deltas)


def remove_from_host(model: nn.Module, record: Attachment) -> None:
    """Undo :func:`add_to_host`, whether all, some or none of it was done."""
    remove_hooks(model._load_state_dict_pre_hooks, _load_deltas)
    for name in ATTRIBUTES if record.replaced_attributes is not None else ():
        model.__dict__.pop(name, None)
    model.__dict__.update(record.replaced_attributes or {})
