"""Kinds of layers and their trainable layers, with a file for each family of kinds.

A new kind is a subclass of :class:`Kind` with its trainable layers, a row in `KINDS`, and its class in `CLASSES`.
"""

from s2ft.layers.base import S2Layer
from s2ft.layers.conv import CONVOLUTION, S2ColumnConv, S2RowConv
from s2ft.layers.derived import DERIVED, S2ColumnOwnForward, S2RowOwnForward
from s2ft.layers.experts import (
    EXPERTS,
    TRANSPOSED_EXPERTS,
    ObservedExperts,
    S2ColumnExperts,
    S2RowExperts,
    act_mul_of,
    forward_of,
)
from s2ft.layers.linear import CONV1D, KINDS, LINEAR, OTHER, Kind, S2ColumnLinear, S2RowLinear, is_intercepted, kind_of
from s2ft.layers.quantized import NO_FUSE, QUANTIZED, PackedLinear
from s2ft.layers.split_linear import SPLIT_LINEAR, S2SplitLinear

__all__ = [
    "EXPERTS",
    "KINDS",
    "LINEAR",
    "NO_FUSE",
    "OTHER",
    "Kind",
    "ObservedExperts",
    "PackedLinear",
    "S2ColumnConv",
    "S2ColumnExperts",
    "S2ColumnLinear",
    "S2ColumnOwnForward",
    "S2Layer",
    "S2RowConv",
    "S2RowExperts",
    "S2RowLinear",
    "S2RowOwnForward",
    "S2SplitLinear",
    "SPLIT_LINEAR",
    "TRANSPOSED_EXPERTS",
    "act_mul_of",
    "forward_of",
    "is_intercepted",
    "kind_of",
]

# The first kind that matches is used. Layers of derived classes are of the last kinds.
KINDS[:] = (LINEAR, SPLIT_LINEAR, CONV1D, *QUANTIZED, CONVOLUTION, EXPERTS, *DERIVED)
