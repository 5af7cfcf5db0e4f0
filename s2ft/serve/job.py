"""One sequence in the engine, and the events that its client gets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from s2ft.serve.errors import ApiError
from s2ft.serve.registry import Version
from s2ft.text.running_batch import Row
from s2ft.text.sampling import Score
from s2ft.text.streams import TextStream


@dataclass(frozen=True)
class Event:
    """News of a sequence: more text, its end, or an error.

    Attributes:
        text: New text.
        finish: "stop" or "length" at the end of the sequence, else None.
        error: The error that ended the sequence, or None.
        score: The log probabilities of the new token, if they were requested and the token is part of the answer.
    """

    text: str = ""
    finish: str | None = None
    error: ApiError | None = None
    score: Score | None = None

    @property
    def last(self) -> bool:
        """Whether no event follows."""
        return self.finish is not None or self.error is not None


class Job(Row):
    """A sequence with its limits and the callback for its events.

    Args:
        prompt: Token ids of the prompt.
        max_tokens: Longest answer in tokens.
        sampler: Chooses the tokens.
        text: Converts the tokens to text and finds stop strings.
        ends: Tokens that end the answer.
        emit: Called with each event in the engine's thread. It must not block.
        adapter: The acquired adapter, which the engine releases. None is the base.
        logprobs: How many of the likeliest tokens are scored at each place; None: no log probabilities.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampler,
        text: TextStream,
        ends: frozenset[int],
        emit: Callable[[Event], None],
        adapter: Version | None = None,
        logprobs: int | None = None,
    ) -> None:
        super().__init__(prompt, sampler, None if adapter is None else adapter.bank_name, logprobs)
        self.max_tokens, self.text, self.ends, self.emit, self.version = max_tokens, text, ends, emit, adapter
        self.cancelled = self.released = False

    def event(self) -> Event:
        """Return the event of the newest token."""
        if self.failed:
            return Event(error=ApiError(500, "model_failed", self.failed))
        if self.tokens[-1] in self.ends:
            return Event(self.text.flush(), "stop")
        score = self.scores[-1] if self.scores else None
        text = self.text.push(self.tokens[-1])
        if self.text.stopped:
            return Event(text, "stop", score=score)
        if len(self.tokens) < self.max_tokens:
            return Event(text, score=score)
        text += self.text.flush()
        return Event(text, "stop" if self.text.stopped else "length", score=score)
