"""Choose the next token of a sequence, independently of the other sequences of its batch."""

import secrets

import torch
from torch import Tensor

GREEDY = 1e-5  # a lower temperature would overflow and choose the likeliest token anyway


class Sampler:
    """Draws the tokens of one sequence with its own generator, so that a seed gives the same tokens in any batch.

    Args:
        temperature: Divisor of the logits. 0 always chooses the likeliest token.
        top_p: Draw among the likeliest tokens whose probabilities sum up to this value, from 0 to 1.
        seed: Seed of the generator. None draws a new seed.

    Example:
        >>> logits = model(input_ids).logits[0, -1]
        >>> from s2ft.text.sampling import Sampler
        >>> Sampler().choose(logits) == int(logits.argmax())
        True
        >>> Sampler(1.0, seed=3).choose(logits) == Sampler(1.0, seed=3).choose(logits)
        True
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None) -> None:
        self.greedy = temperature < GREEDY
        self.temperature, self.top_p = temperature, top_p
        self._generator = (
            None if self.greedy else torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        )

    def choose(self, logits: Tensor) -> int:
        """Choose a token.

        The token is found by inverting the distribution function with one random number. Logits that differ only by
        rounding give the same token, unless the number is next to a border between two tokens.

        Args:
            logits: Logits of the next token, shape [vocabulary].

        Returns:
            The token id.
        """
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
