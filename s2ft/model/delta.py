"""The trained update of one projection in the base model's own coordinates."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Delta:
    """Effective weight = base, with ``values`` added at ``index`` along ``dim``."""

    dim: int  # 0: rows (outputs), 1: columns (inputs)
    index: Tensor  # [n] int64, ascending, elements in original order
    values: Tensor  # [n, I] if dim == 0 else [O, n]
