"""Between a PeftModel's adapters and s2ft's own: the same deltas, in the same coordinates."""

import json

import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from s2ft.adapter import Adapter, read_adapter
from s2ft.config import S2FTConfig
from s2ft.peft.config import S2FTPeftConfig
from s2ft.selection import Selection
from s2ft.selection.selection import unit_tensors


def to_native(model: PeftModel, adapter_name: str = "default") -> Adapter:
    """An adapter of a model of a known family as s2ft's own, for :func:`s2ft.load_adapter` and arithmetic.

    Raises: ValueError for an unknown name, or a base of no known family, whose adapters s2ft can't name.
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"no adapter is called {adapter_name!r}; there are {', '.join(model.peft_config)}")
    config, base = model.peft_config[adapter_name], model.get_base_model()
    if config.base_fingerprint is None:
        raise ValueError(
            f"adapter {adapter_name!r} has no fingerprint of its base: {type(base).__name__} is of no "
            "model family that s2ft knows, or its weights are sharded"
        )
    deltas = {}
    for path, site in config.sites.items():
        values = base.get_submodule(path).s2ft_delta[adapter_name].values.detach().cpu()
        deltas.update(site.deltas(values))
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
        {"base_model": config.base_model_name_or_path},
        extra_weights=extra_weights,
    )


def from_native(
    model: nn.Module | PeftModel, adapter: Adapter | str, adapter_name: str = "default", **config
) -> PeftModel:
    """A PeftModel with an adapter of s2ft on it: a new one around a plain base, or `model`, if it is one already.

    Args:
        adapter: an :class:`s2ft.Adapter`, or the folder of one.
        config: further fields of :class:`S2FTPeftConfig`, task_type say.
    Raises: ValueError for an adapter of another base, of experts, or with weights that are trained whole.
    """
    adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    if adapter.extra_weights:
        raise ValueError(
            f"adapter {adapter.name!r} has {next(iter(adapter.extra_weights))} trained whole, which is "
            "not put on a PeftModel: load it with s2ft.load_adapter"
        )
    settings = S2FTPeftConfig(units=adapter.selection, base_fingerprint=json.dumps(adapter.fingerprint), **config)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, settings)
    else:
        model = get_peft_model(model, settings, adapter_name)
    base = model.get_base_model()
    with torch.no_grad():
        for path, site in model.peft_config[adapter_name].sites.items():
            base.get_submodule(path).s2ft_delta[adapter_name].values.copy_(site.joined(adapter.deltas))
    return model
