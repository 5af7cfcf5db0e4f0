"""PEFT's own tests of decoder and custom models, run on S²FT.

    python tests/peft/upstream/run.py [--peft-tests FOLDER] [-- pytest's options]

takes the tests of the installed PEFT from FOLDER or, without it, from PEFT's source distribution, which pip downloads.
They run in a throwaway folder beside tiny random models of the names that the tests ask for, so that nothing is looked
up on the hub; :mod:`rows` puts S²FT's rows in the place of those of PEFT's methods. At the end it says what passed,
what failed, and what was skipped or left out and why; the exit status is 1 where a test failed, or where one is left
out for no reason that is written down in :mod:`reasons`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULES = ("test_custom_models.py", "test_decoder_models.py")
FILES = (*MODULES, "testing_common.py", "testing_utils.py")


def fetch_tests(folder: Path) -> Path:
    """The tests folder of the installed PEFT's source distribution."""
    from peft import __version__

    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
            "--dest",
            str(folder),
            f"peft=={__version__}",
        ],
        check=True,
    )
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("peft-*/tests"))


def lay_out(source: Path, folder: Path) -> None:
    """The tests as a package, and the models, in `folder`."""
    from models import save_models

    (folder / "tests").mkdir()
    (folder / "tests" / "__init__.py").touch()
    for name in FILES:
        shutil.copy(source / name, folder / "tests")
    save_models(folder)


def run(folder: Path, options: list) -> dict:
    """What :mod:`rows` reports: outcome and reason by test."""
    report = folder / "report.json"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[2])]),
        "HF_HUB_OFFLINE": "1",
        "S2FT_UPSTREAM_REPORT": str(report),
    }
    (folder / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "rows",
            "-q",
            "-W",
            "ignore",
            "--tb=short",
            *(f"tests/{name}" for name in MODULES),
            *options,
        ],
        cwd=folder,
        env=environment,
    )
    if done.returncode not in (0, 1) or not report.exists():
        raise SystemExit("pytest did not come to its end")
    return json.loads(report.read_text())


def summary(report: dict) -> str:
    lines = []
    for outcome in ("skipped", "left out"):
        reasons = Counter(reason for kind, reason in report.values() if kind == outcome)
        lines += [f"{outcome:<9} {count:>5}  {reason}" for reason, count in sorted(reasons.items())]
    lines += [f"failed: {name}{why and f', {why}'}" for name, (kind, why) in report.items() if kind == "failed"]
    counts = Counter(kind for kind, _ in report.values())
    outcomes = ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped", "left out"))
    return "\n".join([*lines, outcomes])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peft-tests", type=Path, help="the tests folder of PEFT's sources; default: pip downloads it")
    parser.add_argument("options", nargs="*", help="pytest's, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, download = Path(temporary) / "run", Path(temporary) / "download"
        folder.mkdir()
        download.mkdir()
        lay_out(arguments.peft_tests or fetch_tests(download), folder)
        report = run(folder, arguments.options)
    print(summary(report))
    return int(any(kind == "failed" for kind, _ in report.values()))


if __name__ == "__main__":
    sys.exit(main())
