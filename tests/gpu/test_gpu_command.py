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
import cuda_toolkit
import kernel_driver
import pytest
from gpu_report import FAILED, NOT_RUN, PARTLY, PASSED, GpuReport, GpuStage, acceptance
from kernel_driver import SCHEDULES, KernelRun, MissingTool, build_for_cpu, build_for_gpu, runs_on_cpu
from limited import LEAST, NO_TIME, Done, run_limited

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


def step_run(shape, liger=False, **ms):
    results = {method: {"ms": value, "peak_bytes": 10 * value, "base_as_before": True} for method, value in ms.items()}
    return {"shape": shape, "liger": liger, "results": results}


def steps(liger=False, **ms):
    """A stage with steps at the largest shape: milliseconds by method."""
    return GpuStage("steps", PASSED, data={"runs": [step_run("llama-3-8b", liger, **ms)]})


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


def test_the_largest_shape_that_ran_is_judged():
    """A GPU of 24 GB has no room for the frozen 8B model, and none for LoRA on 3B."""
    runs = [
        step_run("llama-3-8b"),
        step_run("llama-3.2-1b", s2ft=150, frozen=100, lora7=100),
        step_run("llama-3.2-3b", s2ft=102, frozen=100),
    ]
    lines = acceptance({"steps": GpuStage("steps", PASSED, data={"runs": runs})}, True)
    judged = {
        line.what.partition(":")[0]: line.holds for line in lines if "to frozen" in line.what or "time" in line.what
    }
    assert judged["time of a step, llama-3.2-3b, without Liger"] is True
    assert judged["time of a step, llama-3.2-1b, without Liger"] is False
    assert judged["time of a step, llama-3-8b, with Liger"] is None


# ---- what a stage did ----------------------------------------------------------------------------------


def ended(text=""):
    return Done(None, text, "ended after 240 seconds")


@pytest.mark.parametrize(
    "done,state",
    (
        (Done(0, ""), PASSED),
        (Done(1, "Traceback"), FAILED),
        (ended("half of the table"), PARTLY),
        (ended(), PARTLY),
        (Done(None, "", NO_TIME), NOT_RUN),
    ),
)
def test_an_ended_stage_has_run_in_part(done, state):
    assert check_gpu.outcome("kernels", done).state == state


@pytest.mark.parametrize(
    "alone,others,state,words",
    (
        (Done(0, "3 passed in 9s"), Done(0, "40 passed, 2 skipped in 60s"), PASSED, "43 tests passed, 2 skipped"),
        (Done(0, "3 skipped in 9s"), Done(0, "40 passed in 60s"), PASSED, "40 tests passed, 3 skipped"),
        (Done(1, "1 failed, 2 passed in 9s"), Done(0, "40 passed in 60s"), FAILED, "a test failed"),
        (Done(0, "3 passed in 9s"), Done(2, "1 error in 60s"), FAILED, "could not be collected"),
        (Done(0, "3 passed in 9s"), Done(3, "INTERNALERROR", "exit status 3"), FAILED, "exit status 3"),
        (Done(0, "3 skipped in 9s"), Done(0, "40 skipped in 60s"), FAILED, "no test ran"),
        (Done(0, "3 passed in 9s"), ended("....s [ 26%]\n..."), PARTLY, "ended after 240"),
        (Done(0, "3 passed in 9s"), ended("..F.s [ 26%]\n..."), FAILED, "before the time ended"),
        (Done(0, "3 passed in 9s"), ended("....s [ 26%]\n..E"), FAILED, "before the time ended"),
        (ended(), Done(None, "", NO_TIME), PARTLY, "ended after 240"),
        (Done(None, "", NO_TIME), Done(None, "", NO_TIME), NOT_RUN, NO_TIME),
    ),
)
def test_two_runs_of_tests_are_one_stage(alone, others, state, words):
    stage = check_gpu.tests_stage([alone, others])
    assert stage.state == state and words in stage.reason


@pytest.mark.parametrize(
    "done,state,holds",
    ((Done(0, ""), PASSED, True), (Done(9, "", "exit status 9"), FAILED, False), (ended(), PARTLY, None)),
)
def test_a_slow_sanitizer_is_no_error(done, state, holds):
    stage = check_gpu.sanitizer_stage([KernelRun("plain", Done(0, "")), KernelRun("memcheck", done)], 2)
    (line,) = (line for line in acceptance({"sanitizers": stage}, True) if "kernel driver" in line.what)
    assert (stage.state, line.holds) == (state, holds)


def test_sanitizers_without_time_for_all_have_run_in_part():
    assert check_gpu.sanitizer_stage([KernelRun("plain", Done(0, ""))], 2).state == PARTLY


@pytest.mark.parametrize(
    "cores,gib,workers",
    ((16, 78, 6), (16, 139, 8), (4, 78, 4), (16, 46, 3), (16, 23, 1), (16, 6, 1), (2, None, 2), (64, None, 8)),
)
def test_no_more_workers_than_a_gpu_has_memory_for(cores, gib, workers):
    assert check_gpu.worker_count(cores, None if gib is None else gib << 30) == workers


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


@pytest.fixture
def without_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))


def test_an_nvcc_that_is_not_there_is_no_failure(without_nvcc, monkeypatch, tmp_path):
    """A PyTorch from a wheel runs without a toolkit, so a machine with a GPU may well have none."""
    with pytest.raises(MissingTool, match="no nvcc"):
        build_for_gpu(tmp_path, "9.0", 1, 60)
    monkeypatch.setattr(check_gpu.torch.cuda, "get_device_capability", lambda: (9, 0))
    work = check_gpu.Work(tmp_path, time.monotonic() + 600, cpu=False)
    for stage in (check_gpu.build(work), check_gpu.sanitizers(work)):
        assert stage.state == NOT_RUN and "no nvcc" in stage.reason, stage


def test_an_nvcc_that_fails_is_a_failure(monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'error: this is no C++'; exit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(check_gpu.torch.cuda, "get_device_capability", lambda: (9, 0))
    stage = check_gpu.sanitizers(check_gpu.Work(tmp_path, time.monotonic() + 600, cpu=False))
    assert stage.state == FAILED and "this is no C++" in stage.text


def test_the_driver_is_built_with_the_nvcc_of_the_packages(monkeypatch, tmp_path):
    """pip's nvidia-cuda-nvcc is in site-packages, where nvcc itself does not find the runtime to link with."""
    home = tmp_path / "packages" / "nvidia" / "cu13"
    for name in ("bin/nvcc", "lib/libcudart_static.a"):
        (home / name).parent.mkdir(parents=True)
        (home / name).write_text("")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    calls = []
    monkeypatch.setattr(kernel_driver, "compile_all", lambda *arguments: calls.append(arguments))
    build_for_gpu(tmp_path, "9.0", 1, 60)
    (compiler, *_), link, *_ = calls[0]
    assert compiler == link[0] == str(home / "bin" / "nvcc") and f"-L{home / 'lib'}" in link


def test_other_tools_are_looked_for_beside_that_nvcc(monkeypatch, tmp_path):
    """compute-sanitizer is in no package of pip; a toolkit has it in a folder of its own."""
    place = tmp_path / "compute-sanitizer" / "compute-sanitizer"
    for path in (place, tmp_path / "bin" / "nvcc"):
        path.parent.mkdir()
        path.write_text("")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    assert cuda_toolkit.find_tool("compute-sanitizer") == str(place)


def test_the_tests_of_a_gpu_are_found_by_their_mark():
    files = check_gpu.cuda_test_files()
    assert "tests/gpu/test_graphs.py" in files and "tests/ops/test_linear.py" in files


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_the_kernel_driver_in_the_simulator(tmp_path):
    """All kernels are right under every schedule, and the sanitizer sees the access that is wrong on purpose."""
    runs = list(runs_on_cpu(build_for_cpu(tmp_path, 1, 1200), 600))
    assert len(runs) == 1 + len(SCHEDULES) and all(run.state == PASSED for run in runs), "\n".join(map(str, runs))
