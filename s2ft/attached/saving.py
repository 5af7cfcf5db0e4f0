"""Saves the adapters of a model, in folders and on the Hugging Face hub."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from torch import Tensor, nn

from s2ft.adapter import native
from s2ft.adapter.adapter import Adapter
from s2ft.adapter.folders import CARD, card_of
from s2ft.attached.active import extra_parameters, extra_values, mounted_deltas
from s2ft.attached.record import Record, check_known, on_unwrapped, record_of, unwrapped
from s2ft.config import S2FTConfig
from s2ft.distributed import full_tensors, ranks_sharing, reshard_all, run_on_first_rank
from s2ft.files.reading import adapter_folder, is_patched
from s2ft.model.checkpoint import packed_hash
from s2ft.selection import Selection


@on_unwrapped
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
        RuntimeError: A rank did not take part within the timeout of the process group.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> half = 0.5 * s2ft.get_adapter(model, "math")
        >>> _ = s2ft.load_adapter(model, half, "half", active=False)
    """
    record = record_of(model)
    check_known(record, name)
    if name != record.trainable:
        return record.loaded[name]
    reshard_all(model)
    deltas = mounted_deltas(record, state)
    return Adapter(
        name,
        cast(S2FTConfig, record.config),
        cast(Selection, record.selection),
        cast("dict[str, Any]", record.fingerprint),
        deltas,
        dict(record.info),
        couplings=record.custom_couplings,
        extra_weights=extra_values(model, record, state),
        structure=record.structure,
    )


# ---- the base ------------------------------------------------------------------------------------------------


def model_info(model: nn.Module) -> dict[str, Any]:
    """Return what an adapter stores about its base in `info`: name, model type, dtype, and the hash of packed files.

    The dtype is the one in which base + delta is rounded, so a merge must use it too.
    """
    config = getattr(model, "config", None)
    base = getattr(config, "_name_or_path", None) or None
    info = {"base_model": base, "model_type": getattr(config, "model_type", None)}
    if base and not is_patched(base) and (found := packed_hash(base)):  # it may have been patched since it was loaded
        info["base_sha256"] = found
    dtype = getattr(model, "dtype", None)
    return info if dtype is None else {**info, "base_dtype": str(dtype).removeprefix("torch.")}


# ---- saving ------------------------------------------------------------------------------------------------


@on_unwrapped
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
        TypeError: `info` has something that JSON does not have.
        ValueError: No adapter has this name, or a delta is empty or not finite. Nothing is written.
        RuntimeError: Another rank failed to write, or did not take part within the timeout of the process
            group.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> s2ft.save_adapter(model, "math", info={"data": "gsm8k"})
        >>> s2ft.read_adapter("math").info["data"]
        'gsm8k'
    """
    with_saved("saving an adapter", model, name, partial(native.write, folder=directory), info, state)


def with_saved(
    what: str,
    model: nn.Module,
    name: str | None,
    act: Callable[[Adapter], None],
    info: dict[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Do something with an adapter as it is saved: on the first rank of a sharded model, while the others wait.

    Args:
        what: Name of the call, for messages.
        model: The model.
        name: Name of the adapter, as for :func:`save_adapter`.
        act: What is done.
        info: As for :func:`save_adapter`.
        state: As for :func:`save_adapter`.

    Raises:
        ValueError: As :func:`save_adapter`.
        RuntimeError: As :func:`save_adapter`.
    """
    model = unwrapped(model)
    record = record_of(model)
    name = record.default_name if name is None else name
    adapter = get_adapter(model, name, state)
    ranks = _ranks_to_wait_for(model, record) if name == record.trainable and state is None else None
    # a copy, for the loaded one stays; on the first rank alone, because the base may be hashed
    run_on_first_rank(
        what, ranks, lambda: act(replace(adapter, info={**model_info(model), **adapter.info, **(info or {})}))
    )


@on_unwrapped
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
    record = record_of(model)
    if record.trainable is None:
        raise ValueError(f"the model trains no adapter; it has {', '.join(record.names)}: call s2ft.attach first")
    try:
        record.add_info(json.loads(json.dumps(info, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"info must have values that JSON can hold: {error}") from None


@on_unwrapped
def gather_trained(model: nn.Module) -> dict[str, Tensor]:
    """Return all trained parameters in full, by their names in the model, for `state` of :func:`save_adapter`.

    Every rank of a sharded model must call this.

    Raises:
        RuntimeError: A rank did not take part within the timeout of the process group.
    """
    reshard_all(model)
    return full_tensors(trained_tensors(model, record_of(model)))


def _ranks_to_wait_for(model: nn.Module, record: Record) -> list[int] | None:
    """The ranks that must save together, so that one of them writes; None if this one can save by itself."""
    ranks = ranks_sharing(trained_tensors(model, record).values())
    if ranks is None:
        return None
    # those of tensor parallelism too
    return sorted({*ranks, *(ranks_sharing(mount.layer.weight for mount in record.mounts.values()) or ())})


def trained_tensors(model: nn.Module, record: Record) -> dict[str, Tensor]:
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
        The address of the commit; empty on the other ranks of a sharded model, which all call this.

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
        return _upload(adapter_folder(Path(model_or_folder).expanduser()), repo_id, revision, private, token, message)
    addresses: list[str] = []

    def upload(adapter: Adapter) -> None:
        with TemporaryDirectory() as folder:
            native.write(adapter, folder)
            addresses.append(_upload(Path(folder), repo_id, revision, private, token, message))

    with_saved("uploading an adapter", model_or_folder, name, upload)
    return addresses[0] if addresses else ""


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
