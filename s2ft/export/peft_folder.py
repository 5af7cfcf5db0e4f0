"""The folder that a PeftModel with an S²FT adapter saves, as TRL, Axolotl, ms-swift and LlamaFactory write it.

PEFT reads and writes it, see :mod:`s2ft.peft`. That package is above this one and needs PEFT, so it is imported by its
name, and only for such a folder.
"""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

from torch import nn

from s2ft.adapter.adapter import Adapter
from s2ft.attached.record import find_attachment
from s2ft.export.lora import has_config
from s2ft.model.fingerprint import structure_of
from s2ft.model.registry import couplings_of


def matches(folder: Path) -> bool:
    """Whether the folder has the config of an S²FT adapter of PEFT."""
    return has_config(folder, "S2FT")


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
    if model is None or find_attachment(model) is not None:
        raise ValueError(
            f"{folder} is an S²FT adapter of PEFT, which is read together with its base: "
            f"s2ft export --from-peft {folder} --model BASE --output ADAPTER makes an adapter of s2ft of it"
        )
    adapter = import_module("s2ft.peft.native_adapter").read_folder(folder, model, name or "default")
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
    import_module("s2ft.peft.native_adapter").write_folder(adapter, folder, model)
