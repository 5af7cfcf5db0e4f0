"""s2ft: fine-tune large models by structured sparsity (S²FT, NeurIPS 2024, arXiv 2412.06289).

The public names below are imported when they are first used, so that ``import s2ft`` and the command's ``--help`` do
not load PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # for type checkers, which can't follow __getattr__; `as` exports a name
    from s2ft import ops as ops
    from s2ft.adapter.adapter import Adapter as Adapter
    from s2ft.api import attach as attach, plan as plan, select as select
    from s2ft.attached.bank import AdapterBank as AdapterBank
    from s2ft.attached.learning_rate import suggested_rate as suggested_rate
    from s2ft.attached.loading import (
        combine_adapters as combine_adapters,
        delete_adapter as delete_adapter,
        disable_adapters as disable_adapters,
        freeze_adapter as freeze_adapter,
        list_adapters as list_adapters,
        load_adapter as load_adapter,
        read_adapter as read_adapter,
        rename_adapter as rename_adapter,
        set_adapter as set_adapter,
    )
    from s2ft.attached.mounting import detach as detach, merge as merge, set_rounding as set_rounding
    from s2ft.attached.report import print_trainable_parameters as print_trainable_parameters, status as status
    from s2ft.attached.saving import (
        get_adapter as get_adapter,
        push_to_hub as push_to_hub,
        save_adapter as save_adapter,
    )
    from s2ft.config import S2FTConfig as S2FTConfig
    from s2ft.estimation import Estimate as Estimate, Strategy as Strategy, estimate as estimate
    from s2ft.export.from_model import save_merged as save_merged
    from s2ft.export.lora import export_lora as export_lora, import_lora as import_lora
    from s2ft.layers import S2ColumnLinear as S2ColumnLinear, S2RowLinear as S2RowLinear
    from s2ft.model.checkpoint import weights_on_disk as weights_on_disk
    from s2ft.model.coupling import Coupling as Coupling
    from s2ft.model.registry import register_architecture as register_architecture
    from s2ft.ops._build import build_info as build_info
    from s2ft.selection import Selection as Selection

# public name -> the module that has it; tests/test_public.py compares it with the imports above
_HOMES = {
    "ops": "s2ft.ops",
    "Adapter": "s2ft.adapter.adapter",
    "AdapterBank": "s2ft.attached.bank",
    "suggested_rate": "s2ft.attached.learning_rate",
    "combine_adapters": "s2ft.attached.loading",
    "delete_adapter": "s2ft.attached.loading",
    "disable_adapters": "s2ft.attached.loading",
    "export_lora": "s2ft.export.lora",
    "freeze_adapter": "s2ft.attached.loading",
    "get_adapter": "s2ft.attached.saving",
    "import_lora": "s2ft.export.lora",
    "list_adapters": "s2ft.attached.loading",
    "load_adapter": "s2ft.attached.loading",
    "push_to_hub": "s2ft.attached.saving",
    "read_adapter": "s2ft.attached.loading",
    "rename_adapter": "s2ft.attached.loading",
    "save_adapter": "s2ft.attached.saving",
    "set_adapter": "s2ft.attached.loading",
    "detach": "s2ft.attached.mounting",
    "merge": "s2ft.attached.mounting",
    "set_rounding": "s2ft.attached.mounting",
    "status": "s2ft.attached.report",
    "attach": "s2ft.api",
    "plan": "s2ft.api",
    "select": "s2ft.api",
    "print_trainable_parameters": "s2ft.attached.report",
    "S2FTConfig": "s2ft.config",
    "Estimate": "s2ft.estimation",
    "Strategy": "s2ft.estimation",
    "estimate": "s2ft.estimation",
    "save_merged": "s2ft.export.from_model",
    "S2ColumnLinear": "s2ft.layers",
    "S2RowLinear": "s2ft.layers",
    "weights_on_disk": "s2ft.model.checkpoint",
    "Coupling": "s2ft.model.coupling",
    "register_architecture": "s2ft.model.registry",
    "build_info": "s2ft.ops._build",
    "Selection": "s2ft.selection",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 's2ft' has no attribute {name!r}")
    module = import_module(_HOMES[name])
    value = module if name == "ops" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
