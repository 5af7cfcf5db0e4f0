"""The learning rate of S²FT by the width of the model, for a run that names none.

AdamW moves each trained weight by about the learning rate in a step. An output is a sum over the trained units, whose
number grows with the width, so the same rate moves the outputs of a wider model more. Hence ``rate = 0.8 / width``.
Models below 576 dimensions get the rate of 576, because nothing is known about them. These are all good rates that are
known:

| model | width | task | good rate | rule | source |
|---|--:|---|--:|--:|---|
| SmolLM2-135M | 576 | word problems | 1e-3 | 1.4e-3 | this project, `make evidence`: the best of 4 rates |
| Llama-3.2-3B | 3072 | MetaMathQA | 3e-4 | 2.6e-4 | PEFT's comparison, SHiRA (1) |
| LLaMA-3-8B | 4096 | commonsense | 2e-4 | 2.0e-4 | S²FT paper, arXiv 2412.06289 |
| LLaMA-3-8B | 4096 | arithmetic | 1e-3 | 2.0e-4 | S²FT paper |

1. SHiRA trains single weights, at random places. Only this rate was tried.

Four points do not prove a rule. It does not know the task (the two of the paper differ by a factor of five), the
number of steps, the batch, and how much forgetting is allowed: a higher rate learns more of the task, and forgets more.
Of two good rates of a model the rule is near the lower one for this reason.
"""

from dataclasses import dataclass
from typing import Any

FACTOR = 0.8  # rate × width
NARROWEST = 576  # width of the narrowest model with a known rate
SPREAD = 5.2  # the good rates lie within this factor of the rule


@dataclass(frozen=True)
class Rate:
    """A learning rate to start with.

    Attributes:
        rate: The rate of the rule, with one significant digit.
        lowest: The lower end of a search.
        highest: The upper end of a search.
    """

    rate: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.rate:g}, and a search from {self.lowest:g} to {self.highest:g}"


def suggested_rate(width: int) -> Rate:
    """Return a learning rate with which to start a search, for AdamW and S²FT's slices.

    Args:
        width: Hidden size of the model.

    Returns:
        The rate, and the range in which the good rates of comparable runs were.

    Raises:
        ValueError: The width is not above 0.

    Example:
        >>> from s2ft.train.rates import suggested_rate
        >>> print(suggested_rate(4096))
        0.0002, and a search from 4e-05 to 0.001
    """
    if width < 1:
        raise ValueError(f"width must be above 0, got {width!r}")
    rate = FACTOR / max(width, NARROWEST)
    return Rate(*(float(f"{value:.0e}") for value in (rate, rate / SPREAD, rate * SPREAD)))


def width_of(model: Any) -> int | None:
    """Return the hidden size of a model's language model.

    Args:
        model: A model. One of transformers has a config.

    Returns:
        The width, or None if the config does not name one.

    Example:
        >>> from s2ft.train.rates import width_of
        >>> width_of(model)
        64
    """
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    width = getattr(config, "hidden_size", None)
    return width if isinstance(width, int) else None
