"""Two runs never write into one output folder, and a killed run does not block the next one."""

import errno
import fcntl
from multiprocessing import get_context
from unittest.mock import Mock

import pytest
from support.inside import LockLOCK as LOCK, RunFolder, only_run_in


def hold(path, held, end):
    folder = RunFolder(path)
    with folder.reserved(overwrite=True):
        folder.begin({"seed": 1})
        held.set()
        end.wait()


@pytest.fixture
def holder(tmp_path):
    """Another process that locks tmp_path/out, and an event at which it ends. A fork imports nothing again."""
    context = get_context("fork")
    held, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "out", held, end))
    process.start()
    assert held.wait(60)
    yield process, end
    process.kill()
    process.join()


@pytest.mark.parametrize("end", ["kill", "normal"])
def test_a_second_process_is_refused_and_changes_nothing_until_the_first_has_ended(holder, tmp_path, end):
    process, finish = holder
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for how in ({}, {"resume": True}, {"overwrite": True}):
        taken = pytest.raises(FileExistsError, match="output folder .*out is in use")
        with taken, RunFolder(tmp_path / "out").reserved(**how):
            raise AssertionError
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    process.kill() if end == "kill" else finish.set()
    process.join()
    assert (tmp_path / "out" / LOCK).exists() == (end == "kill")
    folder = RunFolder(tmp_path / "out")
    with folder.reserved(resume=True):
        folder.begin({"seed": 1}, resume=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run.json"}


def test_a_new_folder_is_locked_before_the_run_begins_and_removed_if_it_does_not_begin(tmp_path):
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "a/b").reserved():
        with pytest.raises(FileExistsError, match="is in use"), RunFolder(tmp_path / "a/b").reserved():
            raise AssertionError
        1 / 0
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EIO, errno.EPERM])
def test_without_locks_a_warning_says_so(tmp_path, monkeypatch, caplog, error):
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(error, "not supported")))
    with only_run_in(tmp_path / "out"):
        assert "can't be locked here: start no second run in" in caplog.text
    assert not (tmp_path / "out").exists()
