"""Choose the next token of a sequence, independently of the other sequences of its batch."""

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

FEW = 1024  # the likeliest tokens that mostly have the probability of top_p
GREEDY = 1e-5  # a lower temperature would overflow and choose the likeliest token anyway


class Sampler:
    """Draws the tokens of one sequence with its own generator, so that a seed gives the same tokens in any batch.

    The logits are changed by the repetition penalty, then by the temperature. Then `top_k`, `top_p` and `min_p` leave
    out tokens, in this order.

    Args:
        temperature: Divisor of the logits. 0 always chooses the likeliest token.
        top_p: Draw among the likeliest tokens whose probabilities sum up to this value, from 0 to 1.
        seed: Seed of the generator. None draws a new seed.
        top_k: Draw among so many likeliest tokens. 0 is all.
        min_p: Leave out tokens whose probability is below this share of the likeliest token's, from 0 to 1.
        repetition_penalty: Logits of tokens in the prompt or the answer are divided by this value if they are
            positive, and multiplied by it otherwise. 1 changes nothing.

    Attributes:
        greedy: Whether the likeliest token is chosen.
        plain: Whether the logits are used as they are.

    Example:
        >>> logits = model(input_ids).logits[0, -1]
        >>> from s2ft.text.sampling import Sampler
        >>> Sampler().choose(logits) == int(logits.argmax())
        True
        >>> Sampler(1.0, seed=3).choose(logits) == Sampler(1.0, seed=3).choose(logits)
        True
        >>> best = int(logits.argmax())
        >>> Sampler(repetition_penalty=100.0).choose(logits, tokens=[best]) == best
        False
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> None:
        self.greedy = temperature < GREEDY
        self.temperature, self.top_p, self.top_k, self.min_p = temperature, top_p, top_k, min_p
        self.repetition_penalty = repetition_penalty
        self.plain = repetition_penalty == 1
        self._generator = (
            None if self.greedy else torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        )

    def choose(self, logits: Tensor, tokens: Sequence[int] = (), prompt: Sequence[int] = ()) -> int:
        """Choose a token.

        The token is found by inverting the distribution function with one random number. Logits that differ only by
        rounding give the same token, unless the number is next to a border between two tokens.

        Args:
            logits: Logits of the next token, shape [vocabulary].
            tokens: The tokens of the answer so far, for the repetition penalty.
            prompt: The tokens of the prompt, for it too.

        Returns:
            The token id.
        """
        if self.greedy and self.plain:
            return int(logits.argmax())
        logits = self._adjusted(logits.detach().cpu().double(), tokens, prompt)
        if self.greedy:
            return int(logits.argmax())
        up_to = self._kept(torch.softmax(logits / self.temperature, 0)).cumsum(0)
        drawn = torch.rand((), generator=self._generator, dtype=torch.float64) * up_to[-1]
        last = int(torch.searchsorted(up_to, up_to[-1]))  # the last token that was not left out
        return min(int(torch.searchsorted(up_to, drawn, right=True)), last)

    def _adjusted(self, logits: Tensor, tokens: Sequence[int], prompt: Sequence[int]) -> Tensor:
        """Return the logits with the repetition penalty."""
        if self.plain:
            return logits
        seen = torch.tensor(sorted({*prompt, *tokens}), dtype=torch.int64)
        found = logits[seen]
        return logits.index_copy(
            0, seen, torch.where(found > 0, found / self.repetition_penalty, found * self.repetition_penalty)
        )

    def _kept(self, likely: Tensor) -> Tensor:
        """Return the probabilities with 0 for the tokens that are left out. The likeliest token stays."""
        if 0 < self.top_k < len(likely):
            likely = likely.where(likely >= likely.topk(self.top_k).values[-1], 0)
        if self.top_p < 1:
            kept = _likeliest(likely, self.top_p * likely.sum())
            likely = torch.zeros_like(likely).index_copy(0, kept, likely[kept])
        return likely.where(likely >= self.min_p * likely.max(), 0) if self.min_p else likely


def _likeliest(likely: Tensor, total: Tensor) -> Tensor:
    """Return the fewest tokens, at least one, whose probabilities sum up to a total."""
    ordered, order = likely.topk(min(FEW, len(likely)))
    if ordered.sum() < total:  # seldom; sorting all tokens takes much longer
        ordered, order = likely.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    return order[: max(1, int((before < total).sum()))]
