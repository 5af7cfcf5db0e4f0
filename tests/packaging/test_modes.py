"""S2FT_BUILD: what each value builds, and what happens if that fails."""

import json
import re

import pytest

SHOW = "import json, s2ft; print(json.dumps(s2ft.build_info()))"


def build(run, source, check=True, **variables):
    return run(["setup.py", "-q", "build", "--build-lib", "built"], cwd=source, check=check, **variables)


def build_in_fork(run_script, source, check=True, **variables):
    """The same where nothing is compiled: PyTorch is imported already."""
    script = "import runpy, sys; sys.argv = ['setup.py', '-q', 'build', '--build-lib', 'built']\n"
    return run_script(script + "runpy.run_path('setup.py', run_name='__main__')", source, check, **variables)


def show_in_fork(run_script, source):
    result = run_script(f"import sys; sys.path.insert(0, 'built'); {SHOW}", source)
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


def show(run, source):
    """build_info() of the built package, and what its import wrote to stderr."""
    result = run(["-c", SHOW], PYTHONPATH=source / "built")
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


@pytest.mark.parametrize("value, words", (("yes", "auto cuda cpu none 'yes'"), ("cuda", "S2FT_BUILD=cuda nvcc")))
def test_what_cannot_be_built_is_an_error(run_script, source, tmp_path, value, words):
    result = build_in_fork(run_script, source, check=False, S2FT_BUILD=value, CUDA_HOME=tmp_path)
    assert result.returncode != 0 and all(word in result.stderr for word in words.split())


def test_none_builds_no_module_removes_that_of_an_earlier_build_and_does_not_warn(run_script, source):
    stale = source / "built" / "s2ft" / "_C.cpython-311-x86_64-linux-gnu.so"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    build_in_fork(run_script, source, S2FT_BUILD="none")
    assert not list((source / "built" / "s2ft").glob("_C.*"))
    info, stderr = show_in_fork(run_script, source)
    assert info["compiled"] is False and "S2FT_BUILD=none" in info["reason"] and "RuntimeWarning" not in stderr


def test_auto_falls_back_with_a_warning_when_the_compiler_is_missing(run_script, source, tmp_path):
    # Without CUDA_HOME an nvcc would be found, with a compiler of its own
    result = build_in_fork(run_script, source, CXX="/nowhere/c++", CC="/nowhere/cc", CUDA_HOME=tmp_path)
    assert "WARNING: s2ft is installed without compiled kernels" in result.stderr
    info, stderr = show_in_fork(run_script, source)
    assert info["compiled"] is False and info["cuda"] is False and info["reason"]
    assert stderr.count("RuntimeWarning: s2ft:") == 1 and all(devices == [] for devices in info["ops"].values())


@pytest.mark.slow
def test_a_file_that_does_not_compile_ends_a_cpu_build_and_lets_auto_fall_back(run, source):
    (source / "csrc" / "cpu" / "broken.cpp").write_text("this is no C++\n")
    assert build(run, source, check=False, S2FT_BUILD="cpu").returncode != 0
    assert "WARNING: s2ft is installed without compiled kernels" in build(run, source).stderr
    assert not list((source / "built" / "s2ft").glob("_C.*"))
    info, _ = show(run, source)
    assert info["reason"].startswith("compiling the kernels failed")


def toolkit(folder, version="13.0", codes=("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")):
    """A CUDA toolkit whose nvcc prints its version and architectures, but compiles nothing."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    listed = "\n".join(codes)
    nvcc.write_text(f"""#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.1";;
  --list-gpu-code) echo "{listed}";;
  *) exit 1;;
esac
""")
    nvcc.chmod(0o755)
    return folder


def of_setup(run_script, source, code, torch_cuda="13.0", check=True, **variables):
    """Run `code` with the names of setup.py as `setup`, and a PyTorch with this CUDA version. Returns the process."""
    script = (
        f"import json, runpy, sys, torch; torch.version.cuda = {torch_cuda!r}; sys.argv[1:] = ['--name']\n"
        f"setup = runpy.run_path('setup.py', run_name='__main__')\n{code}"
    )
    return run_script(script, source, check, **variables)


NEWER, NO_NVCC = "of CUDA 13 and PyTorch", "need nvcc to be built: set CUDA_HOME"
# CUDA of nvcc and of PyTorch, S2FT_BUILD, whether CUDA kernels are built, words of the reason
PLANS = [
    ("13.0", "13.0", "auto", True, ""),
    ("12.6", "13.0", "auto", True, ""),
    ("13.1", "13.0", "auto", True, ""),
    ("13.0", "12.8", "auto", False, NEWER),
    ("13.0", None, "auto", False, ""),
    (None, "13.0", "auto", False, NO_NVCC),
    ("13.0", None, "cuda", True, ""),
    ("13.0", "12.8", "cuda", None, f"S2FT_BUILD=cuda: nvcc in .*{NEWER}"),
]


@pytest.mark.parametrize("nvcc, torch_cuda, mode, cuda, words", PLANS)
def test_an_nvcc_is_used_unless_its_major_version_is_newer(
    run_script, source, tmp_path, nvcc, torch_cuda, mode, cuda, words
):
    """The warning is for an nvcc of another version only: most users of a CUDA PyTorch have no nvcc."""
    result = of_setup(
        run_script,
        source,
        "print(json.dumps([setup['PLAN'].cpp, setup['PLAN'].cuda, setup['PLAN'].cuda_reason]))",
        torch_cuda,
        check=False,
        CUDA_HOME=toolkit(tmp_path / "cuda", nvcc) if nvcc else tmp_path,
        S2FT_BUILD=mode,
    )
    if cuda is None:
        assert result.returncode != 0 and re.search(words, result.stderr)
        return
    cpp, found, reason = json.loads(result.stdout.splitlines()[-1])
    assert (cpp, found) == (True, cuda) and words in reason and ("WARNING" in result.stderr) is (words == NEWER)


ALL = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")


@pytest.mark.parametrize(
    "codes, gpus, listed, expected",
    (
        (ALL, [], None, ["7.5", "8.0", "9.0", "10.0+PTX", "12.0+PTX"]),  # 11.0 gets code of 10.0's PTX
        (ALL[:4], [], None, ["7.5", "8.0", "9.0+PTX"]),  # CUDA 12.6
        (ALL[:4], [(8, 6), (8, 0)], None, ["7.5", "8.0", "8.6", "9.0+PTX"]),
        (("sm_75", "sm_80", "sm_90"), [(12, 0)], None, ["7.5", "8.0", "9.0+PTX"]),
        ((), [], None, ["7.5", "8.0", "9.0", "10.0+PTX", "12.0+PTX"]),  # an nvcc that lists nothing
        (ALL, [], "9.0", ["9.0"]),
        (ALL, [], "8.0, 9.0a;10.0f+PTX", ["8.0", "9.0a", "10.0f+PTX"]),
        (ALL, [], "native", ["7.5", "8.0", "9.0", "10.0+PTX", "12.0+PTX"]),
        # As in images of containers: GPUs that the kernels don't support, and PyTorch's names
        (ALL, [], "5.2 6.0 6.1 7.0 7.5 8.0 8.6 9.0 10.0 12.0+PTX", ["7.5", "8.0", "8.6", "9.0", "10.0", "12.0+PTX"]),
        (ALL, [], "Volta;Ampere;Hopper", ["8.0", "8.6+PTX", "9.0+PTX"]),
        (ALL, [], "Blackwell+Tegra;Hopper;9.0+PTX;", ["11.0", "9.0+PTX"]),
        *((ALL, [], wrong, None) for wrong in ("8.0;Ampere+PTX", "hopper", "90", "9.0+ptx")),
    ),
)
def test_architectures(run_script, source, tmp_path, codes, gpus, listed, expected):
    code = (
        f"torch.cuda.device_count = lambda: {len(gpus)}; torch.cuda.get_device_capability = {gpus}.__getitem__\n"
        "print(json.dumps(setup['cuda_archs'](setup['PLAN'].home)))"
    )
    result = of_setup(
        run_script,
        source,
        code,
        check=False,
        CUDA_HOME=toolkit(tmp_path / "cuda", codes=codes),
        **({"TORCH_CUDA_ARCH_LIST": listed} if listed else {}),
    )
    if expected is None:
        assert "is no compute capability such as 9.0 or 10.0+PTX" in result.stderr
    else:
        assert json.loads(result.stdout.splitlines()[-1]) == expected


def test_what_is_left_out_of_a_list_of_architectures_is_said(run_script, source, tmp_path):
    code, home = "print(*setup['cuda_archs'](setup['PLAN'].home))", toolkit(tmp_path / "cuda")
    result = of_setup(run_script, source, code, CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="6.1;7.0+PTX;9.0")
    said, archs = result.stdout.splitlines()[-2:]
    assert "6.1, 7.0+PTX left out" in said and "need 7.5" in said and archs == "9.0"
    old = of_setup(run_script, source, code, check=False, CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="Volta")
    assert old.returncode != 0 and "TORCH_CUDA_ARCH_LIST has 7.0, and the CUDA kernels need 7.5" in old.stderr


def test_a_toolkit_with_a_runtime_is_preferred(run_script, source, tmp_path):
    """nvcc may be a script that starts another one. Its folder then has no runtime to link with."""
    script, complete = toolkit(tmp_path / "script"), toolkit(tmp_path / "whole")
    (complete / "lib64").mkdir()
    (complete / "lib64" / "libcudart_static.a").write_text("")
    code = f"""
for candidates in ([{str(script)!r}, {str(complete)!r}], [None, {str(script)!r}], ["/nowhere", None]):
    print(setup['toolkit_among'](candidates))
"""
    found = of_setup(run_script, source, code, S2FT_BUILD="none").stdout.splitlines()[-3:]
    assert found == [str(complete), str(script), "None"]


def test_nvcc_of_a_package_is_found(run_script, source, tmp_path):
    """nvidia-cuda-nvcc is in site-packages/nvidia/cu13. The newest is taken, and folders of other packages are not."""
    for name in ("cu12", "cu13"):
        (toolkit(tmp_path / "packages" / "nvidia" / name) / "lib").mkdir()
        (tmp_path / "packages" / "nvidia" / name / "lib" / "libcudart_static.a").write_text("")
    (tmp_path / "packages" / "nvidia" / "cudnn").mkdir()
    show = "print(setup['cuda_home'](), *setup['packaged_toolkits']())"
    code = f"sys.path.insert(0, {str(tmp_path / 'packages')!r}); {show}"
    found = of_setup(run_script, source, code, S2FT_BUILD="none", PATH=tmp_path).stdout.split()
    newest = str(tmp_path / "packages" / "nvidia" / "cu13")
    # PyTorch's own may be installed too
    assert [one for one in found if one.startswith(str(tmp_path))] == [newest, newest, newest[:-1] + "2"]
    named = of_setup(run_script, source, code, S2FT_BUILD="none", CUDA_HOME=toolkit(tmp_path / "named"))
    assert next(one for one in named.stdout.split() if one.startswith(str(tmp_path))) == str(tmp_path / "named")


@pytest.mark.slow
@pytest.mark.parametrize("listed", ("", "Fastest"))
def test_auto_keeps_the_cpu_kernels_when_the_cuda_kernels_fail(run, source, tmp_path, listed):
    """They fail because nvcc fails, or because the list of architectures is wrong. A module that is there goes."""
    stale = source / "built" / "s2ft" / "_C.cpython-311-x86_64-linux-gnu.so"  # Python would prefer it
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    as_cuda_pytorch = (
        "import runpy, sys, torch; torch.version.cuda = '13.0'; "
        "sys.argv[1:] = ['-q', 'build', '--build-lib', 'built']; runpy.run_path('setup.py', run_name='__main__')"
    )
    result = run(["-c", as_cuda_pytorch], cwd=source, CUDA_HOME=toolkit(tmp_path / "cuda"), TORCH_CUDA_ARCH_LIST=listed)
    assert "WARNING: s2ft is installed without CUDA kernels" in result.stderr
    assert not stale.exists() and len(list(stale.parent.glob("_C*.so"))) == 1
    info, _ = show(run, source)
    assert info["compiled"] is True and info["cuda"] is False and info["ops"]["permute_"] == ["CPU"]
    assert "compiling the CUDA kernels failed" in info["reason"] and info["cuda_reason"] in info["reason"]
    assert ("'Fastest' is no compute capability" in info["reason"]) is bool(listed)


@pytest.mark.slow
def test_cuda_with_a_wrong_list_of_architectures_is_an_error(run, source, tmp_path):
    result = build(
        run,
        source,
        check=False,
        S2FT_BUILD="cuda",
        CUDA_HOME=toolkit(tmp_path / "cuda"),
        TORCH_CUDA_ARCH_LIST="Fastest",
    )
    assert result.returncode != 0 and "S2FT_BUILD=cuda: TORCH_CUDA_ARCH_LIST: 'Fastest'" in result.stderr
