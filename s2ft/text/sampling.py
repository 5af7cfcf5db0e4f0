"""How the next token of one sequence is chosen, whatever runs beside it."""

import secrets

import torch
from torch import Tensor

GREEDY = 1e-5  # temperatures below would overflow, and take the likeliest token anyway


class Sampler:
    """Draws with a generator of its own, so that a seed gives the same tokens in every company.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: draw among the likeliest tokens that have so much of the probability together.
        seed: None is a new one.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None) -> None:
        self.greedy = temperature < GREEDY
        self.temperature, self.top_p = temperature, top_p
        self._generator = (
            None if self.greedy else torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        )

    def choose(self, logits: Tensor) -> int:
        """A token by its logits [vocabulary]. By the inverse of the distribution function: one random number a token,
        and logits that differ by rounding give another token only where the number lies next to a border."""
        if self.greedy:
            return int(logits.argmax())
        likely = torch.softmax(logits.detach().cpu().double() / self.temperature, 0)
        order = None
        if self.top_p < 1:
            likely, order = likely.sort(descending=True, stable=True)
            kept = int((likely.cumsum(0) - likely < self.top_p).sum())
            likely = likely[: max(1, kept)]
        up_to = likely.cumsum(0)
        drawn = torch.rand((), generator=self._generator, dtype=torch.float64) * up_to[-1]
        place = min(int(torch.searchsorted(up_to, drawn, right=True)), len(up_to) - 1)
        return place if order is None else int(order[place])
