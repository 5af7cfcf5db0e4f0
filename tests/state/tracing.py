"""Raise an exception at a chosen moment inside the Python code of s2ft."""

import sys
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType

from support.inside import WRITING

import s2ft

PACKAGE = str(Path(s2ft.__file__).parent)
EVENTS = ("opcode", "line")


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(PACKAGE)


class RaiseAt:
    """Context manager: raise `error` just before the `moment`-th opcode or line that s2ft runs, counted from 1.

    An exception before an opcode has the same effect as a signal that arrives during the previous call. So the opcodes
    cover every moment at which Python can deliver a signal, and more. `second` raises again at the n-th call from s2ft,
    or return to it, after the first exception, which is in its clean-up. A profile function raises the second one,
    because Python switches tracing off when a trace function raises.

    Args:
        moment: when to raise; None only counts.
        error: class of the exception.
        events: "opcode" or "line".
        second: when to raise again, counted from 1; None: never.
    """

    def __init__(
        self,
        moment: int | None = None,
        error: type[BaseException] = KeyboardInterrupt,
        *,
        events: str = "opcode",
        second: int | None = None,
    ) -> None:
        assert events in EVENTS
        self.moment, self.error, self.events, self.second = moment, error, events, second
        self.seen = 0
        self.places: list[tuple[CodeType, int]] = []  # place of each event; filled if moment is None
        self.raised: str | None = None  # file and line of the exception
        self.raised_again = False
        self.ignored = False  # Python ignored an exception in a finalizer
        self._calls = 0

    def __enter__(self) -> "RaiseAt":
        self._before = sys.gettrace(), sys.getprofile(), sys.unraisablehook
        sys.unraisablehook = self._note_ignored
        if self.second is not None:
            sys.setprofile(self._count_call)
        sys.settrace(self._enter_frame)
        return self

    def __exit__(self, *_) -> None:
        sys.settrace(self._before[0])
        sys.setprofile(self._before[1])
        sys.unraisablehook = self._before[2]
        # No signal arrives between the end of a `with` block and its release, but this class raises there too. The
        # lock would stay with this thread, and other threads of later tests would wait for ever.
        with suppress(RuntimeError):
            while True:
                WRITING.release()

    def _note_ignored(self, _) -> None:
        self.ignored = True

    def _enter_frame(self, frame: FrameType, event: str, _):
        if not _is_ours(frame):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = self.events == "opcode", self.events == "line"
        return self._count_event

    def _count_event(self, frame: FrameType, event: str, _):
        if event == self.events:
            self.seen += 1
            if self.moment is None:
                self.places.append((frame.f_code, frame.f_lasti))
            elif self.seen == self.moment:
                self.raised = f"{frame.f_code.co_filename.removeprefix(PACKAGE + '/')}:{frame.f_lineno}"
                raise self.error(f"raised at {self.raised}")
        return self._count_event

    def _count_call(self, frame: FrameType, event: str, _) -> None:
        if self.raised is None or self.raised_again or event not in ("call", "c_return") or not _is_ours(frame):
            return
        self._calls += 1
        if self._calls == self.second:
            self.raised_again = True
            raise self.error(f"raised again at {frame.f_code.co_filename}:{frame.f_lineno}")


def moments(places: list[tuple[CodeType, int]], occurrences: int | None) -> list[int]:
    """Numbers of the first `occurrences` events and of the last event of each place; None: all events."""
    if occurrences is None:
        return list(range(1, len(places) + 1))
    found: dict[tuple[CodeType, int], list[int]] = {}
    for number, place in enumerate(places, 1):
        found.setdefault(place, []).append(number)
    return sorted({number for numbers in found.values() for number in (*numbers[:occurrences], numbers[-1])})
