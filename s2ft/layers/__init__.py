"""Kinds of layers, and the trainable layers of each: one file a kind.

A new kind is one file, with its trainable layers and a subclass of :class:`Kind`, and its row in `KINDS`.
"""

from typing import Any

from s2ft.layers.base import S2Layer
from s2ft.layers.conv import CONVOLUTION, S2ColumnConv, S2RowConv
from s2ft.layers.experts import EXPERTS, ObservedExperts, S2ColumnExperts, S2RowExperts, experts_forward, gate_of
from s2ft.layers.kind import OTHER, Kind
from s2ft.layers.linear import CONV1D, LINEAR, S2ColumnLinear, S2RowLinear
from s2ft.layers.quantized import NO_FUSE, QUANTIZED

__all__ = [
    "EXPERTS",
    "KINDS",
    "LINEAR",
    "NO_FUSE",
    "Kind",
    "ObservedExperts",
    "S2ColumnConv",
    "S2ColumnExperts",
    "S2ColumnLinear",
    "S2Layer",
    "S2RowConv",
    "S2RowExperts",
    "S2RowLinear",
    "experts_forward",
    "gate_of",
    "kind_of",
]

# The first that matches counts: a linear layer that torchao quantized is an nn.Linear too.
KINDS: tuple[Kind, ...] = (*QUANTIZED, LINEAR, CONV1D, CONVOLUTION, EXPERTS)


def kind_of(found: Any) -> Kind:
    """The kind of a module or parameter; of a trainable layer the kind of the plain one that it replaces.

    Returns:
        The kind, or for what S²FT does not train one whose `layers` is None.
    """
    if isinstance(found, S2Layer):
        return found.kind
    for kind in KINDS:
        if kind.matches(found):
            return kind
    return OTHER
