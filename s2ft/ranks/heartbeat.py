"""Signs of life of the ranks, by which a rank that waits tells one that works for long from one that has ended.

Each rank writes a sign to the process group's store every few seconds, from a thread of its own. So a rank may work for
hours while the others wait, and the end of a process is noticed within about a minute.
"""

import atexit
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count

import torch.distributed as dist

INTERVAL = 5.0  # seconds between two signs
SILENCE = 60.0  # seconds without a new sign after which a rank has ended
LONGEST_PAUSE = 0.5  # seconds between two looks at the store
WORKING, ENDED = "working", "ended"
_heartbeats: list["Heartbeat"] = []  # at most one: that of the default process group


class Heartbeat:
    """The thread that writes this rank's sign.

    Args:
        store: Store of the process group.
        rank: This rank.
        interval: Seconds between two signs.
    """

    def __init__(self, store: dist.Store, rank: int, interval: float) -> None:
        self.of, self.interval = store, interval
        self._store = _clone(store)  # the store serves one call at a time, and a call may wait
        self._key, self._count, self._working = _key(rank), count(1), 0
        self._end = threading.Event()
        self.beat()
        self._thread = threading.Thread(target=self._run, daemon=True, name="s2ft heartbeat")
        self._thread.start()

    def beat(self, state: str = "") -> None:
        """Write a new sign."""
        self._store.set(self._key, f"{next(self._count)} {state or (WORKING if self._working else '')}")

    @contextmanager
    def working(self) -> Iterator[None]:
        """Inside, the signs say that this rank works, so that others wait for it as long as it lives."""
        self._working += 1
        self.beat()
        try:
            yield
        finally:
            self._working -= 1
            with suppress(dist.DistError):  # an error of the work itself is worth more
                self.beat()

    def end(self) -> None:
        """Write the last sign and end the thread. Nothing happens if the store has ended."""
        self._end.set()
        self._thread.join(self.interval)
        with suppress(dist.DistError):
            self.beat(ENDED)

    def _run(self) -> None:
        with suppress(dist.DistError):  # the process that has the store has ended
            while not self._end.wait(self.interval):
                self.beat()


def heartbeat(store: dist.Store, rank: int) -> Heartbeat:
    """Return the heartbeat of this rank, which begins with the first call."""
    if not _heartbeats or _heartbeats[0].of is not store:
        end_heartbeat()
        _heartbeats.append(Heartbeat(store, rank, INTERVAL))
    return _heartbeats[0]


@atexit.register
def end_heartbeat() -> None:
    """Tell the other ranks that this one ends."""
    while _heartbeats:
        _heartbeats.pop().end()


class Vigil:
    """Decides how long a rank waits for another one, by the other one's signs.

    A rank that works is waited for as long as it lives. A rank that lives and does something else, and one that never
    gave a sign, is waited for with patience.

    Args:
        patience: Seconds to wait for a rank that does not work.
        silence: Seconds without a new sign after which a rank has ended.
        clock: Returns the time in seconds.
    """

    def __init__(self, patience: float, silence: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.patience, self.silence, self.clock = patience, silence, clock
        self.sign, self.heard, self.began = "", clock(), clock()

    def why_end(self, sign: str) -> str:
        """Return why this rank must not wait any longer, or an empty string.

        Args:
            sign: The newest sign of the other rank, or an empty string if there is none.
        """
        now = self.clock()
        if sign != self.sign:
            self.sign, self.heard = sign, now
        if sign.endswith(ENDED):
            return "its process has ended"
        if sign and now - self.heard > self.silence:
            return f"it has given no sign of life for {self.silence:g} s, so its process has ended"
        if sign.endswith(WORKING):
            self.began = now  # patience begins when the work is done
        if now - self.began > self.patience:
            return f"it did not call this within {self.patience:g} s: every rank must call this, not one alone"
        return ""


def wait_for_key(store: dist.Store, key: str, rank: int, patience: float) -> str:
    """Wait until another rank has set a key.

    Args:
        store: Store of the process group.
        key: The key.
        rank: The rank that sets it.
        patience: Seconds to wait for a rank that lives and does not work.

    Returns:
        An empty string if the key is set, else the reason why this rank must not wait any longer.
    """
    return wait_until(store, lambda: store.check([key]), lambda: rank, patience)


def wait_until(store: dist.Store, is_done: Callable[[], bool], rank: Callable[[], int | None], patience: float) -> str:
    """Wait for something that another rank does. The arguments and the result are those of :func:`wait_for_key`.

    Args:
        store: Store of the process group.
        is_done: Whether it is done.
        rank: Returns the rank that does it, or None if no one knows it yet.
        patience: Seconds to wait for a rank that lives and does not work.
    """
    vigil, start = Vigil(patience, SILENCE), time.monotonic()
    while not is_done():  # store.wait() would print a warning each time that it ends without the key
        why = vigil.why_end(_sign(store, rank()))
        if why and not is_done():
            return why
        time.sleep(min(LONGEST_PAUSE, 0.001 + (time.monotonic() - start) / 10))
    return ""


def _clone(store: dist.Store) -> dist.Store:
    """A second connection to a store. If the process that has it has ended, this fails soon."""
    patience = store.timeout
    store.set_timeout(timedelta(seconds=SILENCE))
    try:
        return store.clone()
    finally:
        store.set_timeout(patience)


def _sign(store: dist.Store, rank: int | None) -> str:
    return store.get(_key(rank)).decode() if rank is not None and store.check([_key(rank)]) else ""


def _key(rank: int) -> str:
    return f"s2ft/sign of life/{rank}"
