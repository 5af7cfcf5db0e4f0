"""A model of transformers while it trains an adapter: save_pretrained writes the adapter alone.

The Trainers of transformers and TRL can resume from these checkpoints without changes.
"""

import json
import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.adapter.formats import native
from s2ft.adapter.hub import write_card
from s2ft.adapter.saving import save_adapter
from s2ft.attached import extra_weights
from s2ft.attached.active import set_mounted_deltas
from s2ft.attached.forwards import keep_attributes, restore_attributes
from s2ft.attached.hosts.checkpointing import remove_hooks
from s2ft.attached.record import Attachment, HostHooks, attachment_of
from s2ft.attached.report import print_trainable_parameters
from s2ft.distributed import is_partitioned, reshard_all
from s2ft.files.reading import json_entry
from s2ft.files.replacing import replace_file
from s2ft.model.delta import Delta

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
    layers = dict.fromkeys([*record.slices, *extra_weights.trained_parameters(self, record)], native.TENSORS)
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
    extra_weights.check_same(model, record, values)
    extra_weights.check_fits(model, record, record.name, values)
    reshard_all(model)
    set_mounted_deltas(record, deltas)
    extra_weights.set_trained(model, record, values)
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


def _add_to_host(model: nn.Module, record: Attachment) -> None:
    """Give a model of transformers the functions that save and load its trainable adapter."""
    if not hasattr(type(model), "save_pretrained"):
        return
    keep_attributes(model, record, ATTRIBUTES)
    # partial objects: torch.load could not make bound methods of a model that it is still loading
    model.save_pretrained = partial(save_pretrained, model)
    model.print_trainable_parameters = partial(print_trainable_parameters, model)
    _ignore_base_weights(model, ())
    model.register_load_state_dict_pre_hook(_load_deltas)


def _remove_from_host(model: nn.Module, record: Attachment) -> None:
    """Undo :func:`_add_to_host`, whether all, some or none of it was done."""
    remove_hooks(model._load_state_dict_pre_hooks, _load_deltas)
    restore_attributes(model, record, ATTRIBUTES)


HOST_HOOKS = HostHooks(_add_to_host, _remove_from_host)  # for new_attachment
