"""Adapters: saving, loading, switching, combining, mixing in one batch, exporting, and a table of what is active."""

from s2ft.adapter.adapter import Adapter, Overlap, overlap
from s2ft.adapter.bank import AdapterBank
from s2ft.adapter.hub import push_to_hub
from s2ft.adapter.loading import import_lora, load_adapter, read_adapter, restore_adapter
from s2ft.adapter.saving import add_info, export_lora, save_adapter
from s2ft.adapter.switch import (
    combine_adapters,
    delete_adapter,
    disable_adapters,
    freeze_adapter,
    get_adapter,
    list_adapters,
    rename_adapter,
    set_adapter,
)
from s2ft.attached.status import status

__all__ = [
    "Adapter",
    "AdapterBank",
    "Overlap",
    "add_info",
    "delete_adapter",
    "disable_adapters",
    "export_lora",
    "freeze_adapter",
    "combine_adapters",
    "get_adapter",
    "import_lora",
    "list_adapters",
    "load_adapter",
    "overlap",
    "push_to_hub",
    "read_adapter",
    "rename_adapter",
    "restore_adapter",
    "save_adapter",
    "set_adapter",
    "status",
]
