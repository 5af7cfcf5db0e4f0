"""After an exception at any moment of any operation, detach restores the base, bit for bit.

The model also agrees with s2ft.status. A signal or a tracer raises the exception.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import s2ft
from state.models import LAYOUTS, ratios, tiny_model
from state.tracing import RaiseAt, moments

ROOT = Path(__file__).parents[2]
KERNELS = ("compiled", pytest.param("reference", marks=pytest.mark.slow))
LIMIT = 120  # seconds; a deadlock fails the test instead of stopping the suite


def run(kernels: str, module: str, *arguments: object, limit: int = LIMIT) -> None:
    """Run a program of this folder; its output is the message of a failure."""
    environment = {**os.environ, "S2FT_TEST_KERNELS": kernels, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", f"tests.state.{module}", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        timeout=limit,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(process.stdout)
    assert process.returncode == 0, process.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ("compiled", "reference"))
def test_after_a_sigint_detach_gives_the_base(kernels):
    run(kernels, "interrupts", "--count", 15)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_after_each_of_many_sigints_detach_gives_the_base(kernels, layout):
    run(kernels, "interrupts", "--count", 300, "--layout", layout, limit=900)


@pytest.mark.parametrize("kernels", KERNELS)
def test_after_an_exception_at_any_moment_the_model_agrees_with_status(kernels):
    run(kernels, "sweep", "--stride", 6000)


def test_after_an_exception_at_any_moment_a_model_that_holds_its_slices_agrees_with_status():
    run("compiled", "sweep", "--stride", 6000, "--effective", "step", "--layout", "permuted")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_each_of_many_sigints_a_model_that_holds_its_slices_gives_the_base(layout):
    run("compiled", "interrupts", "--count", 100, "--layout", layout, "--effective", "step", limit=900)


@pytest.mark.slow
def test_after_a_second_exception_in_the_clean_up_too():
    run("compiled", "sweep", "--stride", 700, "--twice")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_after_an_exception_at_every_place_the_model_agrees_with_status(kernels, layout):
    run(kernels, "sweep", "--layout", layout, limit=3600)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_a_second_exception_at_every_line_too(layout):
    run("compiled", "sweep", "--layout", layout, "--events", "line", "--twice", limit=3600)


# ---- the tracer --------------------------------------------------------------------------------------------


def attach_under(tracing: RaiseAt) -> None:
    attach = s2ft.attach  # the first use imports a module, which must not be counted
    with tracing:
        attach(tiny_model("llama"), s2ft.S2FTConfig(**ratios("llama")))


def test_every_moment_is_counted_and_can_be_raised_at():
    counter = RaiseAt()
    attach_under(counter)
    assert counter.raised is None and counter.seen == len(counter.places) > 10_000
    for moment in (1, counter.seen // 2, counter.seen):
        tracing = RaiseAt(moment, MemoryError)
        with pytest.raises(MemoryError, match="raised at"):
            attach_under(tracing)
        assert tracing.seen == moment and tracing.raised
    beyond = RaiseAt(counter.seen + 1)
    attach_under(beyond)
    assert beyond.raised is None and beyond.seen == counter.seen


def test_a_second_exception_is_raised_in_the_clean_up_of_the_first():
    counter = RaiseAt(events="line")
    attach_under(counter)
    again = []
    for moment in range(counter.seen // 2, counter.seen, counter.seen // 40):
        tracing = RaiseAt(moment, events="line", second=1)
        with pytest.raises(KeyboardInterrupt):
            attach_under(tracing)
        again.append(tracing.raised_again)
    assert any(again)


def test_moments_are_the_first_and_the_last_events_of_every_place():
    a, b = ((code, 0) for code in (attach_under.__code__, run.__code__))
    assert moments([a, b, a, a, a], 1) == [1, 2, 5]
    assert moments([a, b, a, a, a], 2) == [1, 2, 3, 5]
    assert moments([a, b, a], None) == [1, 2, 3]
