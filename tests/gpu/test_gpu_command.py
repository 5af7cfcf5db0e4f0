"""The command of bench/gpu: limits of time, the report, and acceptance lines that can fail."""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import check_gpu
import pytest
from gpu_report import FAILED, NOT_RUN, PASSED, GpuReport, GpuStage, acceptance
from kernel_driver import SCHEDULES, build_for_cpu, runs_on_cpu
from limited import LEAST, Done, run_limited

# ---- limits of time ------------------------------------------------------------------------------------


def test_at_the_limit_the_whole_group_of_processes_is_ended(tmp_path):
    done = run_limited(["sh", "-c", "sleep 1000 & echo $!; wait"], LEAST, tmp_path / "log")
    assert done.status is None and re.match("ended after [2-9]", done.why)
    state = Path(f"/proc/{int(done.text.split()[0])}/stat")
    until = time.monotonic() + 60  # the signal is sent; on a busy machine the process needs a moment to end
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < until, "the child of the command still runs"


def test_without_time_a_command_is_not_started(tmp_path):
    done = run_limited(["touch", str(tmp_path / "made")], LEAST / 2, tmp_path / "log")
    assert done == Done(None, "", "no time was left") and not (tmp_path / "made").exists()


# ---- acceptance ----------------------------------------------------------------------------------------


def steps(liger=False, **ms):
    """A stage with steps at the judged shape: milliseconds by method."""
    results = {method: {"ms": value, "peak_bytes": 10 * value, "base_as_before": True} for method, value in ms.items()}
    return GpuStage("steps", PASSED, data={"runs": [{"shape": "llama-3-8b", "liger": liger, "results": results}]})


def kernels(product=1.0, copy=1.0):
    rows = [
        {"op": "sliced_linear", "case": "4096 × 14336 → 4096", "us": 100 * product, "rivals_us": {"frozen": 100}},
        {"op": "sliced_linear", "case": "64 × 14336 → 4096", "us": 500, "rivals_us": {"frozen": 100}},
        {"op": "act_mul", "case": "silu", "us": 10 * copy, "floor_us": 10},
    ]
    return GpuStage("kernels", PASSED, data={"rows": rows})


def sanitized(*statuses):
    runs = [
        {"name": "a", "status": s, "state": PASSED if s == 0 else NOT_RUN if s is None else FAILED} for s in statuses
    ]
    return GpuStage("sanitizers", PASSED, data={"runs": runs})


@pytest.mark.parametrize(
    "stage,words,holds",
    (
        (kernels(product=1.24), ["F.linear"], [True]),
        (kernels(product=1.26), ["F.linear"], [False]),
        (kernels(copy=1.09), ["act_mul to"], [True]),
        (kernels(copy=1.2), ["act_mul to"], [False]),
        (kernels(), ["act_mul, backward"], [None]),
        (steps(s2ft=102, frozen=100), ["to frozen"], [True, None]),
        (steps(s2ft=104, frozen=100), ["to frozen"], [False, None]),
        (steps(True, s2ft=104, frozen=100), ["to frozen"], [None, False]),
        (steps(s2ft=84, lora7=100), ["time", "to LoRA"], [True, None]),
        (steps(s2ft=86, lora7=100), ["time", "to LoRA"], [False, None]),
        (steps(s2ft=79, lora7=100), ["peak", "to LoRA"], [True, None]),
        (steps(s2ft=84, lora7=100), ["peak", "to LoRA"], [False, None]),
        (steps(s2ft=84), ["to LoRA"], [None, None, None, None]),
        (sanitized(0, 0), ["kernel driver"], [True]),
        (sanitized(0, 9), ["kernel driver"], [False]),
        (sanitized(0, None), ["kernel driver"], [None]),
        (steps(s2ft=1, frozen=1), ["bit for bit"], [True]),
    ),
)
def test_acceptance(stage, words, holds):
    """The lines with these words hold, in order."""
    lines = acceptance({stage.name: stage}, True)
    assert [line.holds for line in lines if all(word in line.what for word in words)] == holds


# ---- the report ----------------------------------------------------------------------------------------


def test_the_report_is_written_after_each_stage(tmp_path):
    report = GpuReport(tmp_path, "s2ft on a test", True)
    report.add(GpuStage("build", PASSED, text="compiled"))
    assert "compiled" in (tmp_path / "report.md").read_text() and report.good
    report.add(GpuStage("ncu", NOT_RUN, "Nsight Compute is not installed"))
    assert "- ncu: NOT RUN, 0 s: Nsight Compute is not installed" in (tmp_path / "report.md").read_text()
    assert report.good
    report.add(kernels(product=2))
    assert not report.good and "**MISSED**" in (tmp_path / "report.md").read_text()
    assert list(json.loads((tmp_path / "report.json").read_text())["stages"]) == ["build", "ncu", "kernels"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command. Returns its exit status and what it printed."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["check_gpu.py", *options])
        monkeypatch.setattr(check_gpu.signal, "signal", Mock())
        with pytest.raises(SystemExit) as leave:
            check_gpu.main()
        return leave.value.code, "".join(capsys.readouterr())

    return run


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="has a GPU")
def test_without_a_gpu_the_command_says_what_to_do(command):
    status, text = command()
    assert status == 2 and "finds no GPU" in text and "--cpu" in text


def test_the_command_ends_within_its_limit_and_names_what_did_not_run(command, tmp_path):
    """Five seconds are kept for the report, so that no stage gets any of these six."""
    begin = time.monotonic()
    status, text = command("--cpu", "--seconds", "6", "--out", str(tmp_path), "--only", "kernels", "switch", "ncu")
    assert status == 0, text
    report = (tmp_path / "report.md").read_text()
    assert all(re.search(f"- {name}: NOT RUN, . s: no time was left", report) for name in ("kernels", "switch"))
    assert "- ncu: NOT RUN, 0 s: " in report and "0 acceptance lines hold" in report and time.monotonic() - begin < 60


# ---- the kernel driver ---------------------------------------------------------------------------------


def test_the_tests_of_a_gpu_are_found_by_their_mark():
    files = check_gpu.cuda_test_files()
    assert "tests/gpu/test_graphs.py" in files and "tests/ops/test_linear.py" in files


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_the_kernel_driver_in_the_simulator(tmp_path):
    """All kernels are right under every schedule, and the sanitizer sees the access that is wrong on purpose."""
    runs = list(runs_on_cpu(build_for_cpu(tmp_path, 1, 1200), 600))
    assert len(runs) == 1 + len(SCHEDULES) and all(run.state == PASSED for run in runs), "\n".join(map(str, runs))
