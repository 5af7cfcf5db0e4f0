"""Kinds of layers and their trainable layers, with one file for each kind.

A new kind is one file, with its trainable layers and a subclass of :class:`Kind`, and its row in `KINDS`.
"""

from typing import Any

from torch import nn

from s2ft.files.plain_text import by_key
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
from s2ft.layers.kind import OTHER, Kind, Split, split_of
from s2ft.layers.linear import CONV1D, LINEAR, SPLIT_LINEAR, S2ColumnLinear, S2RowLinear, S2SplitLinear, is_intercepted
from s2ft.layers.quantized import NO_FUSE, QUANTIZED, PackedLinear

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
    "Split",
    "TRANSPOSED_EXPERTS",
    "act_mul_of",
    "forward_of",
    "is_intercepted",
    "kind_of",
    "split_of",
]

# The first kind that matches is used: a layer that torchao has quantized is an nn.Linear too, and layers of derived
# classes are of the last kinds.
KINDS: tuple[Kind, ...] = (*QUANTIZED, SPLIT_LINEAR, LINEAR, CONV1D, CONVOLUTION, EXPERTS, *DERIVED)
_BY_CLASS = by_key((name, kind) for kind in KINDS for name in kind.classes)


def kind_of(found: Any) -> Kind:
    """Find the kind of a module or parameter.

    Args:
        found: A plain layer, a parameter with the weights of experts, or a trainable layer, which has the kind of the
            plain layer that it replaces.

    Returns:
        The kind. For a module that S²FT does not train, its `layers` is None.
    """
    if type(found) is nn.Linear and type(found.weight) is nn.Parameter:  # most are; a quantized tensor is not
        return LINEAR
    if isinstance(found, S2Layer):
        return found.kind
    for one in type(found).__mro__:
        for kind in _BY_CLASS.get(one.__name__, ()):
            if kind.matches(found):
                return kind
    return OTHER
