"""The compiled module s2ft._C: one build for every Python, and a lock that an interrupt cannot leave behind."""

from pathlib import Path

import pytest
from support.inside import _build

ROOT = Path(__file__).resolve().parents[2]
needs_module = pytest.mark.skipif(_build.load() is None, reason="no compiled kernels")


def run_with_s2ft(run_script, script):
    found = run_script(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}", ROOT)
    return found.stdout.split()


@needs_module
def test_what_the_module_offers():
    module = _build.load()
    assert Path(module.__file__).name.split(".")[0] == "_C"
    info = module.build_info()
    assert info["torch_target"] == "2.11" and info["cxx_standard"] >= 202002
    assert hasattr(module, "register_cuda") is hasattr(module, "cuda_versions") is info["with_cuda"]
    with pytest.raises(TypeError, match="cannot create 's2ft._C.WeightLock' instances"):
        module.WeightLock()


@needs_module
def test_a_second_import_has_the_same_lock(run_script):
    script = """
import importlib, threading
from s2ft import _C as first
del sys.modules["s2ft._C"]
second = importlib.import_module("s2ft._C")
second.weight_lock.acquire()
got = []
thread = threading.Thread(target=lambda: (first.weight_lock.acquire(), got.append(1), first.weight_lock.release()))
thread.start(); thread.join(0.05)
print(second is first, got)
second.weight_lock.release()
thread.join()
print(got)
"""
    assert run_with_s2ft(run_script, script) == ["False", "[]", "[1]"]


@needs_module
def test_leaving_without_entering_is_an_error():
    lock = _build.load().weight_lock
    with pytest.raises(RuntimeError, match="this thread does not hold the lock"):
        lock.__exit__(None, None, None)
    with lock, lock:  # the owner may take it again
        pass
    with pytest.raises(RuntimeError, match="this thread does not hold the lock"):
        lock.release()


@needs_module
def test_an_interrupt_that_arrives_with_the_lock_leaves_it_free(run_script):
    """A signal arrives while the main thread waits for the lock, so Python handles it as soon as the wait has ended.

    That must be inside the block, whose end gives the lock back.
    """
    script = """
import signal, threading
from s2ft.ops._lock import LOCK

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGUSR1, interrupt)
caught = inside = 0
for _ in range(100):
    held, waiting = threading.Event(), threading.Event()

    def hold():
        with LOCK:
            held.set()
            waiting.wait()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        waiting.set()
        with LOCK:
            inside += 1
    except KeyboardInterrupt:
        caught += 1
    thread.join()
    try:
        LOCK.release()
    except RuntimeError:
        continue
    print("the lock stayed taken")
print(caught)
"""
    assert run_with_s2ft(run_script, script) == ["100"]
