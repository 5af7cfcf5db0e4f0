"""Runs the tables of model types with another release of transformers: python tests/support/releases.py 5.0.0."""

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ("tests/test_model_types.py", "tests/test_attach.py", "tests/test_families.py")


def environment(name: str, *install: str) -> Path:
    """Make an environment beside this one, which takes all other packages from this one.

    Args:
        name: Name of its folder.
        install: Arguments of `pip install`: the packages that it has itself.

    Returns:
        Its Python.
    """
    folder = Path(sys.prefix) / "releases" / name
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    # after those of the environment; s2ft itself too, because an editable install is not seen through such a file
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *install], check=True)
    return python


def main(release: str) -> int:
    python = environment(release, f"transformers=={release}")
    return subprocess.run([python, "-m", "pytest", "-n", "auto", "-m", "not slow", *TESTS], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
