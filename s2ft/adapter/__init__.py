"""Adapters: save, load, switch, and say what is active."""
from s2ft.adapter.adapter import Adapter
from s2ft.adapter.formats.native import read as read_adapter
from s2ft.adapter.store import load_adapter, restore_adapter, save_adapter
from s2ft.adapter.switch import set_adapter, status

__all__ = ["Adapter", "load_adapter", "read_adapter", "restore_adapter", "save_adapter", "set_adapter", "status"]
