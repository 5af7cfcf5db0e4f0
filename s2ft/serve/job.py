"""One sequence on its way through the engine, and what its client is told."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from s2ft.serve.errors import ApiError
from s2ft.serve.registry import Version
from s2ft.text.running_batch import Row
from s2ft.text.streams import TextStream


@dataclass(frozen=True)
class Event:
    """What became of a sequence: more text, its end with a reason, or an error."""

    text: str = ""
    finish: str | None = None  # stop, length
    error: ApiError | None = None

    @property
    def last(self) -> bool:
        return self.finish is not None or self.error is not None


class Job(Row):
    """A sequence, where its events go, and when it ends.

    Args:
        emit: called in the engine's thread; must not block.
        adapter: as the registry gave it; the engine gives it back.
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
    ) -> None:
        super().__init__(prompt, sampler, None if adapter is None else adapter.in_bank)
        self.max_tokens, self.text, self.ends, self.emit, self.version = max_tokens, text, ends, emit, adapter
        self.cancelled = self.over = False

    def event(self) -> Event:
        """What the newest token means for the client."""
        if self.failed:
            return Event(error=ApiError(500, "model_failed", self.failed))
        if self.tokens[-1] in self.ends:
            return Event(self.text.flush(), "stop")
        text = self.text.push(self.tokens[-1])
        if self.text.stopped:
            return Event(text, "stop")
        if len(self.tokens) < self.max_tokens:
            return Event(text)
        text += self.text.flush()
        return Event(text, "stop" if self.text.stopped else "length")
