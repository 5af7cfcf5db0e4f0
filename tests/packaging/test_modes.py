"""S2FT_BUILD: what each value builds, and what happens when it cannot."""
import json

import pytest

SHOW = "import json, s2ft; print(json.dumps(s2ft.build_info()))"


def build(run, source, check=True, **variables):
    return run(["setup.py", "-q", "build", "--build-lib", "built"], cwd=source, check=check, **variables)


def show(run, source):
    """build_info() of what was built, and what importing it wrote to stderr."""
    result = run(["-c", SHOW], PYTHONPATH=source / "built")
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


def broken_compiler(source):
    """A source file that no compiler takes."""
    (source / "csrc" / "cpu" / "broken.cpp").write_text("this is no C++\n")


def test_an_unknown_value_is_an_error_that_lists_the_known(run, source):
    result = build(run, source, check=False, S2FT_BUILD="yes")
    assert result.returncode != 0
    assert "S2FT_BUILD must be one of auto, cuda, cpu, none; got 'yes'" in result.stderr


def test_none_builds_no_module_and_does_not_warn(run, source):
    build(run, source, S2FT_BUILD="none")
    assert not list((source / "built" / "s2ft").glob("_C.*"))
    info, stderr = show(run, source)
    assert info["compiled"] is False and "S2FT_BUILD=none" in info["reason"]
    assert "RuntimeWarning" not in stderr


def test_none_removes_what_an_earlier_build_left(run, source):
    stale = source / "built" / "s2ft" / "_C.cpython-311-x86_64-linux-gnu.so"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    build(run, source, S2FT_BUILD="none")
    assert not stale.exists()


def test_cuda_without_nvcc_is_an_error(run, source, tmp_path):
    result = build(run, source, check=False, S2FT_BUILD="cuda", CUDA_HOME=tmp_path)
    assert result.returncode != 0
    assert "S2FT_BUILD=cuda needs nvcc" in result.stderr


def test_auto_falls_back_with_a_warning_when_the_compiler_is_missing(run, source):
    result = build(run, source, CXX="/nowhere/c++", CC="/nowhere/cc")
    assert "WARNING: s2ft is installed without compiled kernels" in result.stderr
    info, stderr = show(run, source)
    assert info["compiled"] is False and info["cuda"] is False and info["reason"]
    assert stderr.count("RuntimeWarning: s2ft:") == 1
    assert all(devices == [] for devices in info["ops"].values())


@pytest.mark.slow
def test_auto_falls_back_when_a_file_does_not_compile(run, source):
    broken_compiler(source)
    result = build(run, source)
    assert "WARNING: s2ft is installed without compiled kernels" in result.stderr
    assert not list((source / "built" / "s2ft").glob("_C.*"))
    info, _ = show(run, source)
    assert info["reason"].startswith("compiling the kernels failed")


@pytest.mark.slow
def test_cpu_fails_when_a_file_does_not_compile(run, source):
    broken_compiler(source)
    assert build(run, source, check=False, S2FT_BUILD="cpu").returncode != 0


@pytest.mark.slow
def test_cpu_builds_the_cpu_kernels(run, source):
    build(run, source, S2FT_BUILD="cpu")
    info, stderr = show(run, source)
    assert info["compiled"] is True and info["cuda"] is False and info["archs"] == []
    assert info["ops"]["sliced_linear"] == ["CPU"] and info["ops"]["permute_"] == ["CPU"]
    assert "RuntimeWarning" not in stderr


@pytest.mark.slow
def test_auto_keeps_the_cpu_kernels_when_nvcc_fails(run, source, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    as_cuda_pytorch = ("import runpy, sys, torch; torch.version.cuda = '13.0'; "
                       "sys.argv[1:] = ['-q', 'build', '--build-lib', 'built']; runpy.run_path('setup.py')")
    result = run(["-c", as_cuda_pytorch], cwd=source, CUDA_HOME=tmp_path)
    assert "WARNING: s2ft is installed without CUDA kernels" in result.stderr
    info, _ = show(run, source)
    assert info["compiled"] is True and info["cuda"] is False
    assert "compiling the CUDA kernels failed" in info["reason"]
