"""Where the tools of CUDA are. The toolkit is the one that setup.py builds the kernels with."""

import runpy
import shutil
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@cache
def setup_functions() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "setup.py"))


def cuda_home() -> Path | None:
    """The folder of the CUDA toolkit, or None. It has bin/nvcc."""
    return setup_functions()["cuda_home"]()


def runtime_flags(home: Path) -> list[str]:
    """Flags with which nvcc finds the static runtime, which is not where it looks in the packages of a Python."""
    return [f"-L{folder}" for folder in setup_functions()["static_runtime_folders"](home)[:1]]


def find_tool(name: str) -> str | None:
    """A tool beside nvcc: from PATH, from the toolkit's folder, or from where Nsight Compute is installed."""
    homes = [home for home in (cuda_home(), Path("/usr/local/cuda")) if home]
    places = [home / folder / name for home in homes for folder in ("bin", "compute-sanitizer")]
    places += sorted(Path("/opt/nvidia").glob(f"nsight-compute/*/{name}"), reverse=True)
    return shutil.which(name) or next((str(path) for path in places if path.exists()), None)
