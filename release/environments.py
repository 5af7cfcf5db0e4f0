"""Virtual environments of the scripts in this folder."""

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheel"
ARCHS = "7.5;8.0;9.0;10.0;12.0+PTX"  # unless TORCH_CUDA_ARCH_LIST names others
TORCH_LIBRARIES = ("libtorch_cpu.so", "libtorch.so", "libc10.so")  # those of the PyTorch beside which it is installed


def packages_of(python: Path) -> Path:
    """The folder site-packages of a Python."""
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())


def environment(
    name: str, packages: tuple[str, ...], interpreter: Path = Path(sys.executable), shares: bool = False
) -> Path:
    """Make a virtual environment in build/wheel, or take the one that an earlier call has made.

    Args:
        name: Its folder.
        packages: What is installed there.
        interpreter: Its Python.
        shares: Whether it also sees the packages of the Python that runs this.

    Returns:
        Its Python.
    """
    python, done = WORK / name / "bin" / "python", WORK / name / ".complete"
    wanted = "\n".join((str(interpreter), *packages))
    if not done.exists() or done.read_text() != wanted:
        print(f"making the environment {WORK / name} …", flush=True)
        subprocess.run([interpreter, "-m", "venv", "--clear", WORK / name], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *packages], check=True)
        if shares:
            (packages_of(python) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        done.write_text(wanted)
    return python
