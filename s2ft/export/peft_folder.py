"""The folder that a PeftModel with an S²FT adapter saves, as TRL, Axolotl, ms-swift and LlamaFactory write it.

PEFT reads and writes it, see :mod:`s2ft.peft`. That package is above this one and needs PEFT, so it is imported by its
name, and only for such a folder.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from s2ft.adapter.adapter import Adapter
from s2ft.attached.record import find_record
from s2ft.export.lora import CONFIG
from s2ft.files.reading import json_entry
from s2ft.model.fingerprint import structure_of
from s2ft.model.registry import couplings_of


def matches(folder: Path) -> bool:
    """Whether the folder has the config of an S²FT adapter of PEFT."""
    return json_entry(folder / CONFIG, "peft_type") == "S2FT"


def describe(folder: Path) -> str:
    """What the folder holds."""
    return "S²FT adapter of PEFT"


def read(folder: Path, model: nn.Module | None = None, name: str | None = None) -> Adapter:
    """Read an adapter.

    Args:
        folder: The folder.
        model: The adapter's base, without adapters.
        name: The adapter's name. Default: "default".

    Returns:
        The adapter. The model has not changed.

    Raises:
        ValueError: There is no model or it has adapters, or the files are damaged or of another base.
    """
    if model is None or find_record(model) is not None:
        raise ValueError(
            f"{folder} is an S²FT adapter of PEFT, which is read together with its base: "
            f"s2ft export --from-peft {folder} --model BASE --output ADAPTER makes an adapter of s2ft of it"
        )
    peft, name = import_module("s2ft.peft"), name or "default"
    load = import_module("peft").PeftModel.from_pretrained
    with _in_peft(model, lambda: load(model, folder, adapter_name=name)) as peft_model:
        adapter = peft.to_native(peft_model, name)
    return replace(adapter, structure=structure_of(model, couplings_of(model, adapter.couplings), adapter.deltas))


def write(adapter: Adapter, folder: Path, model: nn.Module | None = None) -> None:
    """Write an adapter.

    Args:
        adapter: The adapter.
        folder: The folder, which is created if it is missing.
        model: The adapter's base, without adapters. It has not changed afterwards.

    Raises:
        ValueError: There is no model, or the adapter has another base or extra weights.
    """
    if model is None:
        raise ValueError(f"{folder}: an S²FT adapter of PEFT is written together with its base: use s2ft export")
    with _in_peft(model, lambda: import_module("s2ft.peft").from_native(model, adapter)) as peft_model:
        peft_model.save_pretrained(folder)


@contextmanager
def _in_peft(model: nn.Module, make: Callable[[], Any]) -> Iterator[Any]:
    """Inside, a base is in the PeftModel that `make` returns. Afterwards it is as before."""
    modes = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    peft_model = make()
    try:
        yield peft_model
    finally:
        base = peft_model.unload()
        for parameter, requires_grad in modes:
            parameter.requires_grad_(requires_grad)
        vars(base).pop("peft_config", None)
