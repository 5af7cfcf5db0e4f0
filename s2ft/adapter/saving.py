"""From a model to adapter folders."""

import json
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from s2ft.adapter.adapter import model_info
from s2ft.adapter.formats import lora, native
from s2ft.adapter.switch import get_adapter
from s2ft.attached import extra_weights
from s2ft.attached.hosts.wrappers import of_compiled
from s2ft.attached.record import Attachment, attachment_of
from s2ft.distributed import full_tensors, ranks_sharing, reshard_all, run_on_first_rank


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
def export_lora(
    model: nn.Module,
    directory: str | os.PathLike,
    name: str | None = None,
    rank: int | None = None,
    rank_pattern: bool | None = None,
) -> None:
    """Save one adapter of a model as a LoRA folder that PEFT and vLLM load.

    The LoRA adds exactly the adapter's numbers to every weight. PEFT and vLLM multiply by the base and by the LoRA
    separately, so outputs differ from this model's by rounding.

    Args:
        model: A model with adapters.
        directory: The folder to write, which is created if it is missing.
        name: The adapter; default: the trainable one, else the active one, else the first one loaded.
        rank: The rank of every module; zeros are appended to reach it. Default: each module has the rank it needs.
        rank_pattern: Whether each module has the rank it needs, which is the default without `rank`. False gives every
            module the rank of the widest one, for programs that read one rank only.

    Raises:
        ValueError: The adapter is unknown, changes experts or convolutions, has extra weights, or needs a higher rank.
            Nothing has been written.

    Example:
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> s2ft.export_lora(model, "math-lora")
        >>> from peft import PeftModel
        >>> peft_model = PeftModel.from_pretrained(s2ft.detach(model), "math-lora")
    """
    adapter = get_adapter(model, attachment_of(model).default_name if name is None else name)
    lora.write(adapter, directory, model, rank=rank, rank_pattern=rank_pattern)


@of_compiled
def add_info(model: nn.Module, info: dict[str, Any]) -> None:
    """Add values to the info of the trainable adapter: every checkpoint and the saved adapter have them.

    Args:
        model: Model with a trainable adapter.
        info: JSON values by name. A name that the adapter has already gets the new value.

    Raises:
        ValueError: The model has no trainable adapter, or a value is not one that JSON can hold.

    Example:
        >>> from s2ft.adapter import add_info
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
    return full_tensors(_trained(model, attachment_of(model)))


def _ranks_to_wait_for(model: nn.Module, record: Attachment) -> list[int] | None:
    """The ranks that must save together, so that one of them writes; None if this one can save by itself."""
    ranks = ranks_sharing(_trained(model, record).values())
    if ranks is None:
        return None
    meshes = ranks_sharing(mount.layer.weight for mount in record.mounts.values())  # those of tensor parallelism too
    return sorted({*ranks, *(meshes or ())})


def _trained(model: nn.Module, record: Attachment) -> dict[str, Tensor]:
    return {**record.slices, **extra_weights.trained_parameters(model, record)}
