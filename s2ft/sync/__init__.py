"""Slices of a training run, sent to the engine that generates its answers.

The trainer sends absolute numbers of the trained slices, rounded to the engine's dtype: what merging would write. The
engine writes them into its own weights and keeps the originals, so that it can restore the base bit for bit.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2ft.sync.sender import EngineError as EngineError, Sent as Sent, SliceSender as SliceSender
    from s2ft.sync.slices import TrainedSlices as TrainedSlices
    from s2ft.sync.trl_trainers import with_slices as with_slices

# Imported when they are used: the receiving side needs none of what the sending side imports.
_HOMES = {
    "EngineError": "sender",
    "Sent": "sender",
    "SliceSender": "sender",
    "TrainedSlices": "slices",
    "with_slices": "trl_trainers",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
