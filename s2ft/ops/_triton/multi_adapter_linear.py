"""Triton kernels of multi_adapter_linear: one program has tokens of one sequence, and so of one adapter.

A few tokens, as in decoding, are computed one by one from memory. Many tokens are tiles of a matrix product, on tensor
cores where the dtype has them. An adapter, an offset or a unit out of range is skipped, because a check would make the
host wait. Sequences with the same adapter read it one after the other, from the GPU's cache if it fits there.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

UNITS = 16  # units of a step, one token
COLUMNS = 128  # inputs or outputs of a step, one token
ROWS = (16, 64)  # tokens of a tile, for few and for many; more than 16 of float32 do not fit into sm_80's registers
TILE_UNITS = 32
TILE_COLUMNS = 64
FEW = 4  # Fewer tokens than this are computed one by one: a tile has at least 16 rows.
PROGRAMS = 1024  # What fills a large GPU. The units of an adapter are divided until there are as many programs.
# Triton's interpreter, which tests use, multiplies tiles of bfloat16 as if their bits were integers.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Numbers that change from batch to batch. By default Triton compiles a kernel again if one is 1 or a multiple of 16.
VARIABLE = ["tokens", "adapters", "units"]


@triton.jit
def _range_of(sequence, adapter, offsets, adapters, units):
    """The first unit of a sequence's adapter, and the end; an empty range if there is none."""
    name = tl.load(adapter + sequence)
    known = (name >= 0) & (name < adapters)
    begin = tl.load(offsets + name, mask=known, other=0)
    end = tl.load(offsets + name + 1, mask=known, other=0)
    sound = (begin >= 0) & (begin <= end) & (end <= units)
    return tl.where(sound, begin, 0), tl.where(sound, end, 0)


@triton.jit
def _widened(value):
    """The value in the dtype of the sums."""
    return value if value.dtype == tl.float64 else value.to(tl.float32)


# ---- one token -------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=VARIABLE)
def _outputs_of_a_token(
    x, y, values, index, offsets, adapter, out, tokens, inputs, outputs, adapters, units,
    UNITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dim 0, after out = y: programs of the second axis take turns over the units."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = _range_of(row // tokens, adapter, offsets, adapters, units)
    step = tl.num_programs(1) * UNITS
    for first in range(begin + tl.program_id(1) * UNITS, end, step):
        unit = first + tl.arange(0, UNITS)
        exists = unit < end
        products = tl.zeros((UNITS, COLUMNS), tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
        for start in range(0, inputs, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < inputs
            factor = tl.load(x + row * inputs + column, mask=inside, other=0.0)
            place = values + unit[:, None] * inputs + column[None, :]
            weight = tl.load(place, mask=exists[:, None] & inside[None, :], other=0.0)
            products += _widened(factor)[None, :] * _widened(weight)
        at = tl.load(index + unit, mask=exists, other=-1)
        inside = (at >= 0) & (at < outputs)
        before = tl.load(y + row * outputs + at, mask=inside, other=0.0)
        after = _widened(before) + tl.sum(products, 1)
        tl.store(out + row * outputs + at, after.to(before.dtype), mask=inside)


@triton.jit(do_not_specialize=VARIABLE)
def _inputs_of_a_token(
    x, y, values, index, offsets, adapter, out, tokens, inputs, outputs, adapters, units,
    UNITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dim 1: a program of the second axis has COLUMNS outputs."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = _range_of(row // tokens, adapter, offsets, adapters, units)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < outputs
    products = tl.zeros((UNITS, COLUMNS), tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    for first in range(begin, end, UNITS):
        unit = first + tl.arange(0, UNITS)
        at = tl.load(index + unit, mask=unit < end, other=-1)
        exists = (at >= 0) & (at < inputs)
        factor = tl.load(x + row * inputs + at, mask=exists, other=0.0)
        place = values + unit[:, None] * outputs + column[None, :]
        weight = tl.load(place, mask=exists[:, None] & here[None, :], other=0.0)
        products += _widened(factor)[:, None] * _widened(weight)
    before = tl.load(y + row * outputs + column, mask=here, other=0.0)
    after = (_widened(before) + tl.sum(products, 0)).to(before.dtype)
    tl.store(out + row * outputs + column, tl.where(begin < end, after, before), mask=here)


# ---- tiles of tokens -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=VARIABLE)
def _outputs_of_a_tile(
    x, y, values, index, offsets, adapter, out, tokens, inputs, outputs, adapters, units,
    ROWS: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr, WIDENED: tl.constexpr,
):  # fmt: skip
    """dim 0, after out = y."""
    tiles = tl.cdiv(tokens, ROWS)
    sequence = tl.program_id(0).to(tl.int64) // tiles
    token = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    row, present = sequence * tokens + token, token < tokens
    begin, end = _range_of(sequence, adapter, offsets, adapters, units)
    step = tl.num_programs(1) * UNITS
    for first in range(begin + tl.program_id(1) * UNITS, end, step):
        unit = first + tl.arange(0, UNITS)
        exists = unit < end
        products = tl.zeros((ROWS, UNITS), tl.float32)
        for start in range(0, inputs, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < inputs
            place = x + row[:, None] * inputs + column[None, :]
            factor = tl.load(place, mask=present[:, None] & inside[None, :], other=0.0)
            place = values + unit[:, None] * inputs + column[None, :]
            weight = tl.load(place, mask=exists[:, None] & inside[None, :], other=0.0)
            if WIDENED:
                factor, weight = factor.to(tl.float32), weight.to(tl.float32)
            products = tl.dot(factor, tl.trans(weight), products, input_precision="ieee")
        at = tl.load(index + unit, mask=exists, other=-1)
        inside = present[:, None] & ((at >= 0) & (at < outputs))[None, :]
        place = row[:, None] * outputs + at[None, :]
        before = tl.load(y + place, mask=inside, other=0.0)
        tl.store(out + place, (before.to(tl.float32) + products).to(before.dtype), mask=inside)


@triton.jit(do_not_specialize=VARIABLE)
def _inputs_of_a_tile(
    x, y, values, index, offsets, adapter, out, tokens, inputs, outputs, adapters, units,
    ROWS: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr, WIDENED: tl.constexpr,
):  # fmt: skip
    """dim 1."""
    tiles = tl.cdiv(tokens, ROWS)
    sequence = tl.program_id(0).to(tl.int64) // tiles
    token = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    row, present = sequence * tokens + token, token < tokens
    begin, end = _range_of(sequence, adapter, offsets, adapters, units)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    here = present[:, None] & (column < outputs)[None, :]
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(begin, end, UNITS):
        unit = first + tl.arange(0, UNITS)
        at = tl.load(index + unit, mask=unit < end, other=-1)
        exists = (at >= 0) & (at < inputs)
        factor = tl.load(x + row[:, None] * inputs + at[None, :], mask=present[:, None] & exists[None, :], other=0.0)
        place = values + unit[:, None] * outputs + column[None, :]
        weight = tl.load(place, mask=exists[:, None] & (column < outputs)[None, :], other=0.0)
        if WIDENED:
            factor, weight = factor.to(tl.float32), weight.to(tl.float32)
        products = tl.dot(factor, weight, products, input_precision="ieee")
    place = row[:, None] * outputs + column[None, :]
    before = tl.load(y + place, mask=here, other=0.0)
    after = (before.to(tl.float32) + products).to(before.dtype)
    tl.store(out + place, tl.where(begin < end, after, before), mask=here)


def rows_of_a_program(x: Tensor, *others: Tensor | int) -> int:
    """The number of tokens that a program computes. Each number is a kernel of its own."""
    tokens = x.shape[1:-1].numel()
    if tokens < FEW or x.dtype is torch.float64:  # tiles are sums in float32
        return 1
    return ROWS[tokens > ROWS[0] and x.dtype is not torch.float32]


def multi_adapter_linear(
    x: Tensor, y: Tensor, values: Tensor, index: Tensor, offsets: Tensor, adapter: Tensor, dim: int
) -> Tensor:
    x, y, values, index, offsets, adapter = (t.contiguous() for t in (x, y, values, index, offsets, adapter))
    units, sequences, outputs = index.numel(), x.shape[0], y.shape[-1]
    if not (units and x.numel() and y.numel()):
        return y.clone()
    out = torch.empty_like(y) if dim == 1 else y.clone()
    tokens, rows = x.shape[1:-1].numel(), rows_of_a_program(x)
    in_tiles = rows > 1
    unit_step, column_step = (TILE_UNITS, TILE_COLUMNS) if in_tiles else (UNITS, COLUMNS)
    programs = sequences * triton.cdiv(tokens, rows)
    if dim == 0:
        kernel = _outputs_of_a_tile if in_tiles else _outputs_of_a_token
        shares = max(1, min(triton.cdiv(min(units, outputs), unit_step), PROGRAMS // programs))
    else:
        kernel = _inputs_of_a_tile if in_tiles else _inputs_of_a_token
        shares = triton.cdiv(outputs, column_step)
    widened = INTERPRETED and x.dtype is torch.bfloat16
    constants = (rows, unit_step, column_step, widened) if in_tiles else (unit_step, column_step)
    kernel[(programs, shares)](
        x, y, values, index, offsets, adapter, out,
        tokens, x.shape[-1], outputs, offsets.numel() - 1, units, *constants, enable_fp_fusion=True,
    )  # fmt: skip
    return out
