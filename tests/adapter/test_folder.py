"""An adapter folder is replaced in one step: a reader gets the old adapter or the new one."""

import os

import pytest
from state.models import make_adapter
from support.inside import (
    PENDING,
    AdapterFolderCONFIG as CONFIG,
    AdapterFolderTENSORS as TENSORS,
    has_adapter,
    native,
    stamp_of,
)
from support.models import model_of
from support.states import assert_same_adapters

import s2ft
from s2ft import S2FTConfig, Selection


@pytest.fixture(scope="module")
def adapters():
    configs = (S2FTConfig(d_ratio=0.1, seed=seed) for seed in (0, 1))
    return [make_adapter(model_of("llama"), config, f"seed-{config.seed}", config.seed) for config in configs]


def is_either(found, adapters):
    """Check that `found` equals one of the adapters, bit for bit. Returns the position of that adapter."""
    place = [one.name for one in adapters].index(found.name)
    assert_same_adapters(found, adapters[place])
    return place


class Stop(BaseException):
    """Stops the writer like a kill or a power failure."""


@pytest.mark.parametrize("moment", ("before", "after"))
@pytest.mark.parametrize("call", range(3))
@pytest.mark.parametrize("is_first", (False, True))
def test_a_writer_that_is_stopped_leaves_the_old_or_the_new(is_first, call, moment, adapters, tmp_path, monkeypatch):
    if not is_first:
        native.write(adapters[0], tmp_path)
    calls, replace = [], os.replace

    def stop(source, target):
        calls.append(target)
        if len(calls) <= call or moment == "after":
            replace(source, target)
        if len(calls) > call:
            raise Stop

    monkeypatch.setattr(os, "replace", stop)
    monkeypatch.setattr(os, "unlink", lambda path: None)  # a killed process removes no files
    with pytest.raises(Stop):
        native.write(adapters[1], tmp_path)
    monkeypatch.undo()
    committed = call + (moment == "after") >= 2
    assert has_adapter(tmp_path) == (committed or not is_first)
    if has_adapter(tmp_path):
        assert is_either(s2ft.read_adapter(tmp_path), adapters) == committed
        assert Selection.load(tmp_path) == adapters[committed].selection
    else:
        with pytest.raises(FileNotFoundError):
            s2ft.read_adapter(tmp_path)
    native.write(adapters[1], tmp_path)
    assert is_either(s2ft.read_adapter(tmp_path), adapters) == 1 and not (tmp_path / PENDING).exists()


def test_a_reader_whose_files_are_replaced_meanwhile_gets_one_adapter_whole(adapters, tmp_path, monkeypatch):
    native.write(adapters[0], tmp_path)
    read_bytes, later = native.read_bytes, [adapters[1], adapters[0]]

    def replaced_after_the_config(path, limit):
        content = read_bytes(path, limit)
        if later and path.name == CONFIG:
            native.write(later.pop(0), tmp_path)
        return content

    monkeypatch.setattr(native, "read_bytes", replaced_after_the_config)
    assert is_either(s2ft.read_adapter(tmp_path), adapters) == 0 and not later


def test_every_save_has_a_new_stamp(adapters, tmp_path):
    assert [stamp_of(folder) for folder in (tmp_path, tmp_path / ("a" * 4000), tmp_path / "\0")] == [None] * 3
    stamps = []
    for turn in range(3):
        native.write(adapters[turn % 2], tmp_path)
        stamps.append(stamp_of(tmp_path))
    assert len(set(stamps)) == 3


def test_a_pending_file_with_any_content_changes_nothing(adapters, tmp_path):
    native.write(adapters[0], tmp_path)
    for content in (b"[" * 10**5, b"{}", b"[]", b'{"tensors_sha256": 1}'):
        (tmp_path / PENDING).write_bytes(content)
        assert is_either(s2ft.read_adapter(tmp_path), adapters) == 0
    (tmp_path / CONFIG).unlink()
    with pytest.raises(ValueError):
        s2ft.read_adapter(tmp_path)


def test_the_hub_gets_the_files_that_belong_together(adapters, tmp_path, monkeypatch):
    native.write(adapters[0], tmp_path)
    old = (tmp_path / CONFIG).read_bytes()
    native.write(adapters[1], tmp_path)
    (tmp_path / CONFIG).rename(tmp_path / PENDING)  # stopped before the last rename
    (tmp_path / CONFIG).write_bytes(old)
    found, content = native.read_files(tmp_path)
    assert is_either(found, adapters) == 1 and content[CONFIG] == (tmp_path / PENDING).read_bytes()
    assert content[TENSORS] == (tmp_path / TENSORS).read_bytes()
