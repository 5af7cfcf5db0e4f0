"""Adapters: save, load, switch, add up, and say what is active."""
from s2ft.adapter.adapter import Adapter
from s2ft.adapter.formats.native import read as read_adapter
from s2ft.adapter.overlap import Overlap, overlap
from s2ft.adapter.store import load_adapter, restore_adapter, save_adapter
from s2ft.adapter.switch import (delete_adapter, disable_adapters, fuse_adapters, get_adapter, list_adapters,
                                 rename_adapter, set_adapter, status)

__all__ = ["Adapter", "Overlap", "delete_adapter", "disable_adapters", "fuse_adapters", "get_adapter",
           "list_adapters", "load_adapter", "overlap", "read_adapter", "rename_adapter", "restore_adapter",
           "save_adapter", "set_adapter", "status"]
