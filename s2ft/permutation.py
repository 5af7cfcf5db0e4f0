"""The order that makes selected units contiguous, and its application to weights and biases."""
from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from s2ft.coupling import Coupling
from s2ft.ops import permute_


def coupling_order(count: int, producers: Sequence[Tensor], consumer: Optional[Tensor]) -> Tensor:
    """New order of a coupling's units: selected ones first, each projection's in one run.

    The sequence is producer-only, both, consumer-only (paper, section 3.2). Several producers whose
    selections are nested (as every built-in metric's are) come out contiguous each: outermost first
    before the consumer's part, innermost first within it. Unselected units only make room: at most
    twice as many units change place as are selected, whatever the width.

    Args:
        count: units of the coupling.
        producers: unit numbers [n] of every producer with a selection.
        consumer: unit numbers [n], or None.
    Returns: order [count] int64; position i takes the unit order[i].
    """
    depth = torch.zeros(count, dtype=torch.int64)   # in how many producers' selections a unit is
    for units in producers:
        depth[units] += 1
    consumed = torch.zeros(count, dtype=torch.bool)
    if consumer is not None:
        consumed[consumer] = True
    wide = len(producers)
    rank = torch.where(consumed, torch.where(depth > 0, 2 * wide - depth, 2 * wide), depth - 1)
    chosen = (consumed | (depth > 0)).nonzero().squeeze(1)
    chosen = chosen[rank[chosen].argsort(stable=True)]
    return place_first(count, chosen)


def place_first(count: int, chosen: Tensor) -> Tensor:
    """Order [count] that starts with `chosen`; a unit that has to make room takes a vacated place."""
    order = torch.arange(count)
    size = chosen.numel()
    is_chosen = torch.zeros(count, dtype=torch.bool)
    is_chosen[chosen] = True
    displaced = order[:size][~is_chosen[:size]]
    vacated = order[size:][is_chosen[size:]]
    order[:size] = chosen
    order[vacated] = displaced
    return order


def inverse(order: Tensor) -> Tensor:
    """position[unit], given order[position]; both [count] int64."""
    positions = torch.empty_like(order)
    positions[order] = torch.arange(order.numel())
    return positions


def contiguous_range(positions: Tensor) -> Optional[Tuple[int, int]]:
    """(start, end) where positions [n] fill one range, else None."""
    start, end = int(positions.min()), int(positions.max()) + 1
    return (start, end) if end - start == positions.numel() else None


def expand(units: Tensor, unit: int) -> Tensor:
    """Element indices [n * unit] of units [n] that span `unit` elements each."""
    return (units[:, None] * unit + torch.arange(unit)).reshape(-1)


@torch.no_grad()
def permute_linear(linear: nn.Module, order: Tensor, unit: int, dim: int) -> None:
    """Put the units of a linear's outputs (dim 0, bias too) or inputs (dim 1) in a new order, in place."""
    elements = expand(order, unit).to(linear.weight.device)
    permute_(linear.weight.detach(), elements, dim)
    if dim == 0 and linear.bias is not None:
        permute_(linear.bias.detach(), elements, 0)


@torch.no_grad()
def permute_coupling(model: nn.Module, coupling: Coupling, order: Tensor) -> None:
    """Put a coupling's units in a new order on both sides, in place."""
    for projection in coupling.projections:
        permute_linear(model.get_submodule(projection.path), order, projection.unit, projection.dim)
    for vector in coupling.vectors:
        parameter = model.get_parameter(vector.path).detach()
        permute_(parameter, expand(order, vector.unit).to(parameter.device), 0)
