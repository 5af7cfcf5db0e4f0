"""After an exception at any moment of any operation, detach restores the base, bit for bit.

The model also agrees with s2ft.status. A tracer raises it, or a real signal.
"""

import copy
import os
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from support.models import LAYOUTS
from support.sources import ROOT

import s2ft
from state import sweep
from state.models import ratios, tiny_model
from state.tracing import RaiseAt, moments

SLOW = [  # compiled kernels and one exception: the suites `moments` and `interrupts` of release/suites.py
    *(("reference", "--layout", layout, "--stride", "97") for layout in LAYOUTS),
    *(("compiled", "--layout", layout, "--events", "line", "--stride", "97", "--twice") for layout in LAYOUTS),
    ("compiled", "--stride", "700", "--twice"),
]


def test_after_an_exception_at_any_moment_the_model_agrees_with_status(capsys):
    assert sweep.main(["--stride", "6000"]) == 0, capsys.readouterr().out
    assert torch.compiler.set_stance("default").prev.stance == "default"  # torch.compile is not turned off


@pytest.mark.slow
@pytest.mark.parametrize("kernels, options", [(kernels, options) for kernels, *options in SLOW], ids=str)
def test_after_an_exception_at_many_places_the_model_agrees_with_status(kernels, options):
    run(kernels, "sweep", *options)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_each_of_many_sigints_detach_gives_the_base(layout):
    run("reference", "interrupts", "--count", "30", "--layout", layout)


def test_two_exceptions_where_the_adapter_gets_its_name_leave_a_model_that_can_be_detached():
    every = sweep.Sweep("permuted")
    case = next(one for one in every.cases() if one.name == "load_adapter, trainable")
    with RaiseAt() as counter:
        case.operation(copy.deepcopy(case.start))
    chosen = [moment for moment, (code, _) in enumerate(counter.places, 1) if code.co_name == "mount"][-40:]
    assert every.problems(case, chosen, "opcode", twice=True) == []


def run(kernels: str, module: str, *options: str) -> None:
    """Run a program of this folder; its output is the message of a failure."""
    process = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", f"tests.state.{module}", *options],
        cwd=ROOT,
        env={**os.environ, "S2FT_TEST_KERNELS": kernels, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=3600,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.returncode == 0, process.stdout


# ---- the tracer --------------------------------------------------------------------------------------------


def attach_under(tracing: RaiseAt) -> None:
    attach = s2ft.attach  # the first use imports a module, which must not be counted
    with tracing:
        attach(tiny_model("llama"), s2ft.S2FTConfig(**ratios("llama")))


def test_every_moment_is_counted_and_can_be_raised_at():
    attach_under(RaiseAt())  # what runs once, as finalizers of earlier tests, must not be counted
    for tracing in (counter := RaiseAt(), lines := RaiseAt(events="line")):
        attach_under(tracing)
    assert counter.raised is None and counter.seen == len(counter.places) > 10_000
    for moment in (1, counter.seen // 2, counter.seen * 3 // 4):  # finalizers may have been counted after that
        tracing = RaiseAt(moment, MemoryError)
        with suppress(MemoryError):  # Python ignores a finalizer's
            attach_under(tracing)
        assert tracing.seen == moment and tracing.raised
    again = RaiseAt(lines.seen * 3 // 4, events="line", second=1)
    with pytest.raises(KeyboardInterrupt):
        attach_under(again)
    assert again.raised_again


def test_moments_are_the_first_and_the_last_events_of_every_place():
    a, b = ((code, 0) for code in (attach_under.__code__, moments.__code__))
    assert moments([a, b, a, a, a], 1) == [1, 2, 5] and moments([a, b, a, a, a], 2) == [1, 2, 3, 5]
    assert moments([a, b, a], None) == [1, 2, 3]
