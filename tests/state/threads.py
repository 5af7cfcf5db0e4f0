"""Threads and child processes that run a model while the test does something else."""

import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

RANK_TIMEOUT = 60  # seconds until a thread counts as deadlocked
CHILD_LIMIT = 5  # seconds until a child counts as hung


@contextmanager
def repeating(function: Callable[[], object]) -> Iterator[None]:
    """Run `function` repeatedly in another thread until the block ends.

    Raises:
        AssertionError: the function raised, or the thread did not end.
    """
    stop, running, errors = threading.Event(), threading.Event(), []

    def loop() -> None:
        try:
            while not stop.is_set():
                function()
                running.set()
        except BaseException as error:
            errors.append(error)
            running.set()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    assert running.wait(RANK_TIMEOUT), "the thread did not run"
    try:
        yield
    finally:
        stop.set()
        thread.join(RANK_TIMEOUT)
    assert not thread.is_alive(), "the thread hangs"
    assert not errors, f"the thread raised {errors[0]!r}"


def in_child(function: Callable[[], object], limit: int = CHILD_LIMIT) -> object:
    """Fork, run `function` in the child, and return what it returned, or the exception that it raised.

    Raises:
        AssertionError: a signal killed the child. After `limit` seconds this is SIGALRM.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(limit)
        try:
            result: object = function()
        except BaseException as error:
            result = error
        try:
            os.write(send, pickle.dumps(result))  # short enough to fit into the pipe
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        answer = pipe.read()
    status = os.waitpid(child, 0)[1]
    assert not os.WIFSIGNALED(status), f"the child was killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return pickle.loads(answer)
