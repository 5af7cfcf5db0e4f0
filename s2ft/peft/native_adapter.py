"""Converting between adapters of a PeftModel and :class:`s2ft.Adapter`: the same deltas in the same coordinates."""

import json
import os
from collections.abc import Iterator

import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from s2ft.adapter import Adapter, read_adapter
from s2ft.config import S2FTConfig
from s2ft.model.coupling import Coupling
from s2ft.peft.adapter_config import S2FTPeftConfig
from s2ft.peft.units import ModuleUnits
from s2ft.selection import Selection
from s2ft.selection.selection import unit_tensors


def to_native(model: PeftModel, adapter_name: str = "default") -> Adapter:
    """Return an adapter of a PeftModel as an adapter of s2ft.

    Args:
        model: A PeftModel whose base belongs to a family that s2ft knows.
        adapter_name: Name of the adapter.

    Returns:
        The adapter, for :func:`s2ft.load_adapter` and for arithmetic, on the CPU. It shares no memory with the model.

    Raises:
        ValueError: The name is unknown, the base belongs to no known family or is sharded, or the adapter trains
            modules in no coupling, or single tokens.

    Example:
        >>> from peft import get_peft_model
        >>> from s2ft.peft import S2FTPeftConfig, to_native
        >>> peft_model = get_peft_model(model, S2FTPeftConfig(d_ratio=0.1), "math")
        >>> adapter = to_native(peft_model, "math")
        >>> base = peft_model.unload()
        >>> s2ft.load_adapter(base, adapter)
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"no adapter is called {adapter_name!r}; there are {', '.join(model.peft_config)}")
    config, base = model.peft_config[adapter_name], model.get_base_model()
    if config.base_fingerprint is None:
        raise ValueError(
            f"adapter {adapter_name!r} has no fingerprint of its base: {type(base).__name__} does not belong to a "
            "model family that s2ft knows, or its weights are sharded"
        )
    if config.trainable_token_indices is not None:
        raise ValueError(
            f"adapter {adapter_name!r} has embeddings of single tokens (trainable_token_indices), which an adapter of "
            "s2ft can't hold: keep it in PEFT's form, or merge it"
        )
    deltas = {}
    for units, values in _values(base, config, adapter_name):
        deltas.update(units.split(values.detach().cpu()))
    selection = Selection(unit_tensors(config.units, "units"))
    extra_weights = {
        f"{path}.{name}": value.detach().cpu().clone()
        for path, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        for name, value in module.modules_to_save[adapter_name].named_parameters()
    }
    return Adapter(
        adapter_name,
        S2FTConfig(units=config.units, layout="indexed"),
        selection,
        json.loads(config.base_fingerprint),
        deltas,
        {"base_model": config.base_model_name_or_path, **(config.info or {})},
        None if config.couplings is None else [Coupling.from_dict(one) for one in config.couplings],
        extra_weights=extra_weights,
    )


def _values(base: nn.Module, config: S2FTPeftConfig, adapter_name: str) -> Iterator[tuple[ModuleUnits, Tensor]]:
    """The units and the values of an adapter's delta on each weight."""
    for path, units in config.module_units.items():
        deltas = base.get_submodule(path).deltas_of(adapter_name)
        yield from ((one, deltas[weight].values) for weight, one in units.items())


def from_native(
    model: nn.Module | PeftModel, adapter: Adapter | str, adapter_name: str = "default", **config
) -> PeftModel:
    """Add an adapter of s2ft to a PeftModel.

    Args:
        model: A PeftModel, or a plain base, which is wrapped in a new PeftModel.
        adapter: An :class:`s2ft.Adapter`, its folder, or its repository on the hub.
        adapter_name: Name of the adapter in the PeftModel.
        config: Further fields of :class:`S2FTPeftConfig`, for example task_type.

    Returns:
        The PeftModel.

    Raises:
        ValueError: The adapter has another base, or has extra weights.

    Example:
        >>> from s2ft.peft import from_native
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> adapter = s2ft.get_adapter(model, "default")
        >>> model = s2ft.detach(model)
        >>> peft_model = from_native(model, adapter, "math", task_type="CAUSAL_LM")
        >>> peft_model.active_adapter
        'math'
    """
    adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    if adapter.extra_weights:
        raise ValueError(
            f"adapter {adapter.name!r} has {next(iter(adapter.extra_weights))} trained in full, which can't be added "
            "to a PeftModel: load it with s2ft.load_adapter"
        )
    config = {
        "couplings": adapter.couplings,
        "base_fingerprint": json.dumps(adapter.fingerprint),
        "info": adapter.info or None,
        **config,
    }
    settings = S2FTPeftConfig(units=adapter.selection, **config)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, settings)
    else:
        model = get_peft_model(model, settings, adapter_name)
    base = model.get_base_model()
    with torch.no_grad():
        for units, values in _values(base, model.peft_config[adapter_name], adapter_name):
            values.copy_(units.join(adapter.deltas))
    return model


def read_folder(folder: str | os.PathLike, model: nn.Module, name: str) -> Adapter:
    """Read a folder that a PeftModel saved as an adapter of s2ft.

    Args:
        folder: The folder.
        model: The adapter's base. It gets the adapter for the time of the call.
        name: Name of the adapter.

    Returns:
        The adapter.
    """
    modes = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    peft_model = PeftModel.from_pretrained(model, os.fspath(folder), adapter_name=name)
    try:
        return to_native(peft_model, name)
    finally:
        _leave(peft_model, modes)


def write_folder(adapter: Adapter, folder: str | os.PathLike, model: nn.Module) -> None:
    """Save an adapter of s2ft as a PeftModel saves it.

    Args:
        adapter: The adapter.
        folder: The folder.
        model: The adapter's base. It gets the adapter for the time of the call.
    """
    modes = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    peft_model = from_native(model, adapter)
    try:
        peft_model.save_pretrained(os.fspath(folder))
    finally:
        _leave(peft_model, modes)


def _leave(peft_model: PeftModel, modes: list[tuple[nn.Parameter, bool]]) -> None:
    """Take the adapter off the base, which is as before then."""
    base = peft_model.unload()
    for parameter, requires_grad in modes:
        parameter.requires_grad_(requires_grad)
    vars(base).pop("peft_config", None)
