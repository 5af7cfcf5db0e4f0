"""The trained update of one projection in the base model's own coordinates."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


class Positions(NamedTuple):
    """Where the elements of a delta are in a weight.

    Attributes:
        move: The reordering of the weight's units for which they hold; None for the base's order.
        size: Number of elements of the weight along the delta's dimension.
        index: The elements, [n] int64 on the weight's device. They are in range, and none occurs twice.
    """

    move: Any
    size: int
    index: Tensor


@dataclass
class Delta:
    """The effective weight is the base with `values` added at `index` along `dim`.

    Attributes:
        dim: 0 for outputs (rows), 1 for inputs (columns).
        index: Elements along `dim` in the base's order, ascending, [n] int64.
        values: [n, inputs] if `dim` is 0, [outputs, n] if `dim` is 1.
        positions: Where the elements were in the weight that they were written into last; None if they were not.
    """

    dim: int
    index: Tensor
    values: Tensor
    positions: Positions | None = field(default=None, repr=False, compare=False)
