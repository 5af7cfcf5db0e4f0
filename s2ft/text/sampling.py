"""Choose the next token of a sequence, independently of the other sequences of its batch."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FEW = 1024  # the likeliest tokens that mostly have the probability of top_p
GREEDY = 1e-5  # a lower temperature would overflow and choose the likeliest token anyway


@dataclass(frozen=True)
class Score:
    """The log probability of a chosen token, and those of the likeliest tokens at its place.

    Attributes:
        token: Id of the chosen token.
        logprob: Its natural log probability under the model, before penalties and temperature.
        top: Id and log probability of the likeliest tokens, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def score(logits: Tensor, token: int, top: int = 0) -> Score:
    """Return the log probabilities at one place.

    Args:
        logits: Logits of the next token, shape [vocabulary].
        token: The chosen token.
        top: Number of the likeliest tokens to return.

    Example:
        >>> import torch
        >>> from s2ft.text.sampling import score
        >>> score(torch.tensor([0.0, 0.0]), token=1, top=1).top[0][1]
        -0.693...
    """
    logprobs = torch.log_softmax(logits.detach().double(), 0)
    values, ids = logprobs.topk(min(top, len(logprobs)))
    return Score(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist())))


class Sampler:
    """Draws the tokens of one sequence with its own generator, so that a seed gives the same tokens in any batch.

    The logits are changed in this order: bias, repetition penalty, frequency and presence penalty, temperature. Then
    `top_k`, `top_p` and `min_p` leave out tokens, in this order.

    Args:
        temperature: Divisor of the logits. 0 always chooses the likeliest token.
        top_p: Draw among the likeliest tokens whose probabilities sum up to this value, from 0 to 1.
        seed: Seed of the generator. None draws a new seed.
        top_k: Draw among so many likeliest tokens. 0 is all.
        min_p: Leave out tokens whose probability is below this share of the likeliest token's, from 0 to 1.
        repetition_penalty: Logits of tokens in the prompt or the answer are divided by this value if they are
            positive, and multiplied by it otherwise. 1 changes nothing.
        presence_penalty: Subtracted from the logit of each token that is in the answer.
        frequency_penalty: Subtracted from the logit of each token as many times as it is in the answer.
        logit_bias: Added to the logits of these tokens.

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
        >>> Sampler(frequency_penalty=2.0).choose(logits, tokens=[best] * 50) == best
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
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
    ) -> None:
        self.greedy = temperature < GREEDY
        self.temperature, self.top_p, self.top_k, self.min_p = temperature, top_p, top_k, min_p
        self.repetition_penalty = repetition_penalty
        self.presence_penalty, self.frequency_penalty = presence_penalty, frequency_penalty
        self.logit_bias = dict(logit_bias or {})
        self.plain = repetition_penalty == 1 and not (presence_penalty or frequency_penalty or self.logit_bias)
        self._generator = (
            None if self.greedy else torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        )

    def choose(self, logits: Tensor, tokens: Sequence[int] = (), prompt: Sequence[int] = ()) -> int:
        """Choose a token.

        The token is found by inverting the distribution function with one random number. Logits that differ only by
        rounding give the same token, unless the number is next to a border between two tokens.

        Args:
            logits: Logits of the next token, shape [vocabulary].
            tokens: The tokens of the answer so far, for the penalties.
            prompt: The tokens of the prompt, for the repetition penalty.

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
        """Return the logits with bias and penalties."""
        if self.plain:
            return logits
        logits = logits.clone()
        for token, bias in self.logit_bias.items():
            logits[token] += bias
        if self.repetition_penalty != 1:
            seen = torch.tensor(sorted({*prompt, *tokens}), dtype=torch.int64)
            found = logits[seen]
            logits[seen] = torch.where(found > 0, found / self.repetition_penalty, found * self.repetition_penalty)
        if tokens and (self.presence_penalty or self.frequency_penalty):
            count = torch.bincount(torch.tensor(tokens), minlength=len(logits))
            logits -= self.frequency_penalty * count + self.presence_penalty * (count > 0)
        return logits

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
