"""What a command prints and returns: helps, suggestions, errors of the disk, and one line for a user's mistake.

The mistakes themselves are in tests/test_mistakes.py.
"""

import json
import logging
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
from support.commands import files_of

import s2ft
from s2ft.cli.main import COMMANDS, main, set_up_logging

WITH_TRL = ("sft", "dpo", "grpo", "compare")  # the help of these lists TRL's options


def test_version_and_help_list_every_command(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == f"s2ft {s2ft.__version__}"
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


def test_a_terminal_without_unicode_gets_the_rest():
    command, environment = [sys.executable, "-m", "s2ft", "--help"], {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert b"S\\xb2FT: " in subprocess.run(command, env=environment, capture_output=True, check=True).stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as leave:
        main([command, "--help"])
    assert leave.value.code == 0 and f"example: s2ft {command} " in " ".join(capsys.readouterr().out.split())


def test_no_help_imports_pytorch():
    code = f"""
import contextlib, io, sys
from s2ft.cli.main import main
for words in (["--version"], ["--help"], *([name, "--help"] for name in {[*set(COMMANDS) - set(WITH_TRL)]})):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(words)
print([name for name in ("torch", "transformers", "numpy", "matplotlib", "accelerate") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")


def test_only_errors_of_other_libraries_are_shown():
    code = """
import logging, sys
from s2ft.cli.main import set_up_logging
set_up_logging(sys.argv[1] == "all")
for name in ("torchao", "bitsandbytes.backends", "torch.utils._pytree", "s2ft.train"):
    logging.getLogger(name).warning(name + " warns")
    logging.getLogger(name).error(name + " fails")
logging.getLogger("s2ft.train").info("s2ft tells")
"""
    for everything, warnings in (("all", 4), ("few", 1)):
        done = subprocess.run([sys.executable, "-c", code, everything], capture_output=True, text=True, check=True)
        lines = done.stderr.splitlines()
        assert sum(line.endswith(" fails") for line in lines) == 4 and "s2ft tells" in lines
        assert sum(line.endswith(" warns") for line in lines) == warnings and "s2ft.train warns" in lines


def test_what_begins_with_dashes_and_has_blanks_is_a_value(capsys):
    assert main(["generate", "--model", "./nowhere", "--prompt", "--- a line"]) == 2
    assert "./nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("words, variable", [(["--traceback"], "0"), ([], "1")])
def test_the_traceback_option_raises_the_error(words, variable, tmp_path, monkeypatch):
    monkeypatch.setenv("S2FT_TRACEBACK", variable)
    with pytest.raises(FileNotFoundError):
        main(["info", str(tmp_path), *words])


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at x] . PytorchStreamWriter failed writing file data/0"),
        RuntimeError("Error while serializing: I/O error: No space left on device"),
    ],
)
def test_a_file_that_can_not_be_written_is_one_line_and_exit_1(capsys, tmp_path, monkeypatch, error):
    monkeypatch.setattr("s2ft.cli.adapters.describe", Mock(side_effect=error))
    assert main(["info", str(tmp_path)]) == 1 and capsys.readouterr().err.startswith("s2ft info: error: ")
    monkeypatch.setattr("s2ft.cli.adapters.describe", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["info", str(tmp_path)])


def sft(work, output, *more):
    return ["sft", *files_of(work, output), *more]


@pytest.mark.parametrize("name", ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"))
def test_fsdp_without_a_gpu(name, capsys, work, tmp_path, monkeypatch):
    monkeypatch.setenv(name, "true")
    assert main(sft(work, tmp_path / "out", "--use-cpu")) == 2
    assert "ddp.yaml" in capsys.readouterr().err and not (tmp_path / "out").exists()


LESS_THAN_A_CHECKPOINT = 16_000  # bytes, and more than run.json and the rows of the data
FULL = """
import contextlib, io, json, resource, sys
from s2ft.cli.main import main
for size, arguments in json.loads(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))   # as on a full disk
    words = io.StringIO()
    with contextlib.redirect_stderr(words), contextlib.redirect_stdout(io.StringIO()):
        status = main(arguments)
    print(json.dumps([status, words.getvalue().splitlines()[-1:]]))
"""


@pytest.mark.slow
def test_the_error_of_a_full_disk_in_training_names_the_kept_checkpoint(work, tmp_path):
    options = "--max-steps 4 --batch-size 2 --micro-batch-size 2 --save-steps 2 --d-ratio 1"
    train = sft(work, tmp_path / "out", *options.split())
    runs = [
        (LESS_THAN_A_CHECKPOINT, train),
        (1 << 30, [*train, "--resume", "--stop-after", "2"]),
        (LESS_THAN_A_CHECKPOINT, [*train, "--resume"]),
    ]
    done = subprocess.run([sys.executable, "-c", FULL, json.dumps(runs)], capture_output=True, text=True)
    (first, (words,)), (stopped, _), (last, (resumed,)) = map(json.loads, done.stdout.splitlines())
    assert (first, stopped, last) == (1, 0, 1) and "Traceback" not in done.stderr
    assert words.startswith("s2ft sft: error: ") and "no checkpoint was written" in words
    assert "checkpoint-2 is kept" in resumed and "--resume" in resumed


def test_an_error_is_one_line_and_exit_2(tmp_path):
    done = subprocess.run([sys.executable, "-m", "s2ft", "info", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and json.dumps(str(tmp_path))[1:-1] in done.stderr


def test_bars_of_other_libraries_are_off_in_a_log(monkeypatch):
    """tqdm reads its variable once, when it is imported. A bar that a library draws itself would be one endless line."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    for imported, expected in ((True, None), (False, "1")):
        monkeypatch.delenv("TQDM_DISABLE", raising=False)
        (monkeypatch.setitem if imported else monkeypatch.delitem)(sys.modules, "tqdm", *([sys] if imported else []))
        set_up_logging(False)
        assert os.environ.get("TQDM_DISABLE") == expected
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert logging.getLogger("s2ft").level == logging.NOTSET
