"""Trainable layers: one file a kind of plain layer; layers_for says which takes the place of what, and forward_for how
a plain one runs on an effective weight."""

from collections.abc import Callable
from typing import Optional, Tuple, Type

from torch import nn

from s2ft.layers.base import S2Layer
from s2ft.layers.conv import CONVOLUTIONS, S2ColumnConv, S2RowConv, conv_forward
from s2ft.layers.experts import ObservedStack, S2ColumnStack, S2RowStack, S2Stack, experts_forward, gate_of
from s2ft.layers.linear import S2ColumnLinear, S2RowLinear, linear_forward
from s2ft.layers.quantized import NO_FUSE, S2QuantizedColumn, S2QuantizedLinear, S2QuantizedRow, quantized_forward
from s2ft.model.weights import is_conv1d, is_quantized

__all__ = [
    "CONVOLUTIONS",
    "NO_FUSE",
    "ObservedStack",
    "S2ColumnConv",
    "S2ColumnLinear",
    "S2ColumnStack",
    "S2Layer",
    "S2QuantizedColumn",
    "S2QuantizedLinear",
    "S2QuantizedRow",
    "S2RowConv",
    "S2RowLinear",
    "S2RowStack",
    "S2Stack",
    "experts_forward",
    "forward_for",
    "gate_of",
    "layers_for",
]


def layers_for(module: nn.Module) -> tuple[type[S2Layer], type[S2Layer]] | None:
    """The layers that train outputs and inputs of a plain layer; None for a module that has none.

    Subclasses are not taken: what they add to the forward would be lost.
    """
    if is_quantized(module):
        return S2QuantizedColumn, S2QuantizedRow
    if type(module) is nn.Linear or is_conv1d(module):
        return S2ColumnLinear, S2RowLinear
    if type(module) in CONVOLUTIONS and module.groups == 1:
        return S2ColumnConv, S2RowConv
    return None


def forward_for(module: nn.Module) -> Callable:
    """The function (module, x, delta, index, dim) that runs a plain layer, one that :func:`layers_for` knows, on its
    weight with a delta added; see :func:`s2ft.layers.linear.linear_forward`."""
    if is_quantized(module):
        return quantized_forward
    return conv_forward if type(module) in CONVOLUTIONS else linear_forward
