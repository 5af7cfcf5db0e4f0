"""The order that makes selected units contiguous, and its application to weights and biases."""
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from s2ft.coupling import Coupling, Projection
from s2ft.ops import permute_
from s2ft.weights import bias_of, find, matrix_of


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


def element_order(projections: Sequence[Projection], order: Tensor) -> Tensor:
    """The order [extent] of a weight's elements along dim when the units of these projections of it take `order`."""
    elements = torch.arange(projections[0].extent)
    for projection in projections:
        elements[projection.elements(torch.arange(projection.count))] = projection.elements(order)
    return elements


@torch.no_grad()
def permute_coupling(model: nn.Module, coupling: Coupling, order: Tensor) -> None:
    """Put a coupling's units in a new order on both sides, biases and vectors along, in place."""
    sites: Dict[tuple, List[Projection]] = {}
    for projection in coupling.projections:
        sites.setdefault((projection.site, projection.dim), []).append(projection)
    for projections in sites.values():
        matrix, bias = matrix_of(model, projections[0]), bias_of(model, projections[0])
        elements = element_order(projections, order).to(matrix.device)
        permute_(matrix, elements, projections[0].dim)
        if projections[0].dim == 0 and bias is not None:
            permute_(bias.detach(), elements, 0)
    for vector in coupling.vectors:
        tensor = find(model, vector.path).detach()
        moved = Projection("u", vector.path, order.numel(), vector.unit, 0)
        permute_(tensor.view(tensor.shape[0], -1), element_order([moved], order).to(tensor.device), 0)
