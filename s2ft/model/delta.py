"""The trained update of one projection in the base model's own coordinates."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Delta:
    """The effective weight is the base with `values` added at `index` along `dim`.

    Attributes:
        dim: 0 for outputs (rows), 1 for inputs (columns).
        index: Elements along `dim` in the base's order, ascending, [n] int64.
        values: [n, inputs] if `dim` is 0, [outputs, n] if `dim` is 1.
    """

    dim: int
    index: Tensor
    values: Tensor
