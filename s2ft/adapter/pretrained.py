"""What a model of transformers does while it trains an adapter: save_pretrained writes the adapter alone, and the
Trainers of transformers and TRL, as they are, go on from the checkpoints that this gives."""
import json
from functools import partial
from pathlib import Path
from typing import Any, Dict

import torch
from torch import Tensor, nn

from s2ft.adapter.formats import native
from s2ft.adapter.hub import write_card
from s2ft.adapter.store import save_adapter
from s2ft.delta import Delta
from s2ft.distributed import settle
from s2ft.files import replace_file
from s2ft.active import set_mounted_deltas
from s2ft.checkpointing import remove_hooks
from s2ft.mounting import EXTENSIONS
from s2ft.record import Attachment, attachment_of
from s2ft.report import print_trainable_parameters

# Trainer looks for this name, or for a file of all weights, and hands what the files named in it hold to load_state_dict
INDEX = "model.safetensors.index.json"
ATTRIBUTES = ("save_pretrained", "print_trainable_parameters", "_keys_to_ignore_on_save")


def save_pretrained(self: nn.Module, save_directory, is_main_process: bool = True, state_dict=None,
                    push_to_hub: bool = False, **options: Any) -> None:
    """Save the trainable adapter, not the model: while units are permuted and deltas stand beside the weights, the
    weights alone would be a checkpoint of the base. :func:`s2ft.merge` gives a model that saves itself whole.

    Args:
        is_main_process: whether this rank writes. state_dict: gathered, where this rank's own is not whole.
        push_to_hub: refused, s2ft.push_to_hub does that. options: transformers', which an adapter has no use for.
    """
    if push_to_hub:
        raise ValueError("push_to_hub here would name no repository of an adapter: use s2ft.push_to_hub(model, repo_id)")
    if not is_main_process:
        return
    directory = Path(save_directory)
    save_adapter(self, directory, attachment_of(self).name, state=state_dict)
    write_card(native.read(directory), directory)
    layers = {f"{path}.s2": native.TENSORS for path in attachment_of(self).mounts}
    replace_file(directory / INDEX, json.dumps({"metadata": {"format": "s2ft"}, "weight_map": layers}, indent=1).encode())


def _take_deltas(model: nn.Module, state: Dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before load_state_dict: the tensors of an adapter's file go into the trainable layers, after checks.

    Raises: ValueError where they are another selection's, nothing changed.
    """
    record = attachment_of(model)
    found = {key.removeprefix(prefix).rpartition(".")[0] for key in state
             if key.startswith(prefix) and key.endswith(".delta")}
    if not found:
        return   # a state of the layers' own
    if found != record.parts.keys():
        raise ValueError("the adapter to load trains other projections than this model: "
                         f"{', '.join(sorted(found ^ record.parts.keys())[:3])}")
    deltas = {name: _delta(record, name, state, prefix + name) for name in found}
    settle(model)
    set_mounted_deltas(record, deltas)
    for name in found:
        del state[f"{prefix}{name}.delta"], state[f"{prefix}{name}.index"]


def _delta(record: Attachment, name: str, state: Dict[str, Tensor], key: str) -> Delta:
    mount, part = record.parts[name]
    index, values = state.get(f"{key}.index"), state[f"{key}.delta"]
    if index is None or not torch.equal(index.long().cpu(), part.elements):
        raise ValueError(f"the adapter to load has other units of {name} than the ones this model trains")
    shape = list(mount.layer.s2.shape)
    shape[mount.layer.dim] = part.elements.numel()
    if list(values.shape) != shape:
        raise ValueError(f"the adapter to load has shape {tuple(values.shape)} for {name}, expected {tuple(shape)}")
    return Delta(mount.layer.dim, part.elements, values)


def _come(model: nn.Module) -> None:
    if not hasattr(type(model), "save_pretrained"):
        return
    record = attachment_of(model)
    record.host = {name: model.__dict__[name] for name in ATTRIBUTES if name in model.__dict__}
    # partial objects: torch.load could not make bound methods of a model that it is still loading
    model.save_pretrained = partial(save_pretrained, model)
    model.print_trainable_parameters = partial(print_trainable_parameters, model)
    # Trainer warns of every weight that a checkpoint lacks, but for the ones that a model says it does not save
    trained = {f"{path}.s2" for path in record.mounts}
    model._keys_to_ignore_on_save = set(model.state_dict(keep_vars=True)) - trained
    model.register_load_state_dict_pre_hook(_take_deltas)


def _go(model: nn.Module) -> None:
    record = attachment_of(model)
    remove_hooks(model._load_state_dict_pre_hooks, lambda wrapped: wrapped.hook is _take_deltas)
    if record.host is None:
        return
    for name in ATTRIBUTES:
        if name in record.host:
            model.__dict__[name] = record.host[name]
        else:
            model.__dict__.pop(name, None)


EXTENSIONS.append((_come, _go))
