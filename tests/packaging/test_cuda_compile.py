"""nvcc compiles every kernel for every architecture, and the module with CUDA kernels loads without a GPU."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.sources import ROOT

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
HOMES = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
NVCC = next((path for home in HOMES if home and (path := Path(home, "bin", "nvcc")).exists()), shutil.which("nvcc"))
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_torch_header(source):
    """No kernel includes one, directly or through a header of csrc. It would tie the kernels to one PyTorch."""
    seen, queue = set(), [source]
    while queue:
        path = queue.pop()
        if path in seen or not path.exists():  # cuda_on_cpu.h belongs to the tests
            continue
        seen.add(path)
        included = re.findall(r'#include\s*[<"]([^>"]+)[>"]', path.read_text())
        assert not [name for name in included if re.match(r"torch/|c10/|ATen/|pybind11/", name)], path
        queue += [(path.parent / name).resolve() for name in included]


def test_no_macro_that_pytorch_2_11_lacks():
    """TORCH_TARGET_VERSION hides newer functions, but not macros. The oldest supported version must compile the rest."""
    sources = [path.read_text() for path in (ROOT / "csrc").glob("**/*") if path.suffix in (".h", ".cpp")]
    assert not [source for source in sources if "STABLE_TORCH_ERROR_CODE_CHECK" in source]


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("arch", (75, 80, 90, 100, 120))
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_without_warnings_and_spills(source, arch, tmp_path):
    command = [
        str(NVCC),
        "-std=c++20",
        "-O3",
        f"-arch=sm_{arch}",
        "-cubin",
        "-Werror",
        "all-warnings",
        "-Xptxas",
        "-v,-warn-spills,-warn-lmem-usage",
        str(source),
        "-o",
        str(tmp_path / "kernels.cubin"),
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "CUDA_HOME": str(Path(NVCC).parent.parent)}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert not re.search(r"[1-9]\d* bytes (spill|stack)", result.stderr), result.stderr[-3000:]


@pytest.mark.slow
@needs_nvcc
def test_the_cuda_build_loads_and_registers_its_kernels_on_request(run, source):
    """The import does not register them, because it is not known yet whether a GPU can run them."""
    run(
        ["setup.py", "-q", "build", "--build-lib", "built"],
        cwd=source,
        S2FT_BUILD="cuda",
        CUDA_HOME=Path(NVCC).parent.parent,
        TORCH_CUDA_ARCH_LIST="9.0",
        CXXFLAGS="-O0",
    )
    show = (
        "import json, torch, s2ft; from s2ft import _C; print(json.dumps([s2ft.build_info(), _C.cuda_versions(), "
        "_C.register_cuda(), _C.register_cuda(), s2ft.build_info()]))"
    )
    result = run(["-c", show], PYTHONPATH=source / "built")
    before, (driver, built), _, _, after = json.loads(result.stdout.splitlines()[-1])
    assert before["cuda"] is True and before["archs"] == ["9.0"] and "once PyTorch initialises" in before["cuda_reason"]
    assert before["cuda_version"] == f"{built // 1000}.{built % 1000 // 10}" and driver >= 0
    assert {"sliced_linear", "permute_", "multi_adapter_linear"} <= before["ops"].keys()
    for info, expected in ((before, ["CPU"]), (after, ["CPU", "CUDA"])):
        for op, devices in info["ops"].items():
            assert devices == ([] if op == "sliced_linear" else expected), op  # PyTorch multiplies on every device
