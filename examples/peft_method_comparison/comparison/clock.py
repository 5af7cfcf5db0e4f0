"""Time that is left to a run, and the time that its parts took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfTime(Exception):
    """The time limit is near. The run has saved its state, and goes on when it is started again."""


class Clock:
    """Measures the parts of a run and stops it before its limit.

    Args:
        until: The limit, as `time.time()`; None for no limit.

    Attributes:
        parts: Seconds by part.
    """

    def __init__(self, until: float | None = None) -> None:
        self.parts: dict[str, float] = {}
        self._until = until

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to a part, also if the block raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - start

    def check(self, needed: float) -> None:
        """Check that there is time for what comes next.

        Args:
            needed: Seconds that it may take.

        Raises:
            OutOfTime: It may take longer than what is left.
        """
        if self._until is not None and time.time() + needed > self._until:
            raise OutOfTime
