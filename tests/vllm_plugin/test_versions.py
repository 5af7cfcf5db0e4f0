"""Adapters that are replaced while requests run, without vLLM: the names of contents, and contents that are kept."""

import asyncio
import shutil
import sys

import pytest
import torch
from serve.fleet import save_adapters
from support import vllm_modules
from support.inside import loading

from s2ft import read_adapter


class Request(vllm_modules.Request):
    """Equal to another one of its name, as in vLLM."""

    def __eq__(self, other):
        return self.lora_name == other.lora_name

    __hash__ = None


@pytest.fixture
def folder(tmp_path):
    """An adapter, and beside it another content for the same folder."""
    save_adapters(tmp_path / "made", 2)
    return shutil.copytree(tmp_path / "made" / "a0", tmp_path / "a")


def other(folder):
    return folder.parent / "made" / "a1"


def replace(folder):
    """Put another adapter in place of the one in a folder, by renaming."""
    shutil.copytree(other(folder), folder.parent / "next")
    folder.rename(folder.parent / "old")
    (folder.parent / "next").rename(folder)


def values(folder):
    return torch.cat([delta.values.flatten() for delta in read_adapter(folder).deltas.values()])


def test_the_name_of_a_content_follows_the_content(folder, tmp_path):
    first = loading.with_version(str(folder))
    assert loading.split_version(first)[0] == str(folder) and loading.with_version(first) == first
    shutil.copytree(folder, tmp_path / "copy")
    assert loading.split_version(loading.with_version(str(tmp_path / "copy")))[1] == loading.split_version(first)[1]
    replace(folder)
    assert loading.with_version(str(folder)) != first
    (tmp_path / "adapter_config.json").write_text("{}")
    assert [loading.with_version(str(path)) for path in (tmp_path, tmp_path / "missing", "base#1")] == [None] * 3
    assert loading.split_version("folder#s2ft-1") == ("folder#s2ft-1", None)


@pytest.mark.parametrize("change", (replace, shutil.rmtree))
def test_a_content_is_read_again_after_its_folder_was_replaced_or_deleted(folder, change):
    name, expected, contents = (
        loading.split_version(loading.with_version(str(folder))),
        values(folder),
        loading.Contents(),
    )
    with contents.folder(*name) as found:
        change(folder)  # also while it is read
        assert torch.equal(values(found), expected)
    with contents.folder(*name) as found:
        assert torch.equal(values(found), expected)
    assert not found.exists()
    with pytest.raises(ValueError, match="was replaced while it was loaded"), loading.Contents().folder(*name):
        pass


def test_a_damaged_content_is_not_kept(folder):
    """The config, by which a content is named, may be the same before and after the repair, and in another folder."""
    name, contents = loading.split_version(loading.with_version(str(folder))), loading.Contents()
    tensors = (folder / loading.TENSORS).read_bytes()
    (folder / loading.TENSORS).write_bytes(tensors[:-8])
    with pytest.raises(ValueError), contents.folder(*name) as found:
        read_adapter(found)
    (folder / loading.TENSORS).write_bytes(tensors)
    with contents.folder(*name) as found:
        assert torch.equal(values(found), values(folder))


def test_the_number_of_open_files_is_limited(folder):
    contents = loading.Contents(limit=1)
    names = [loading.split_version(loading.with_version(str(place))) for place in (folder, other(folder))]
    for name in (*names, names[0]):
        with contents.folder(*name):
            assert list(contents._kept) == [name]


@pytest.fixture
def vllm(monkeypatch):
    """Stand-ins of vLLM's classes. Returns the list of requests that the engine gets, and of folders that are loaded."""
    added, loaded = [], []

    class AsyncLLM:
        async def add_lora(self, lora_request):
            added.append(lora_request)

    class WorkerLoRAManager:
        def __init__(self, config):
            pass

        def _load_adapter(self, lora_request):
            loaded.append(lora_request.lora_path)

    kind = type("LoRARequest", (Request,), {})
    found = {loading.SERVER: AsyncLLM, loading.WORKER: WorkerLoRAManager, loading.REQUEST: kind}
    vllm_modules.fake_modules(monkeypatch, {name: {one.__name__: one} for name, one in found.items()})
    monkeypatch.setattr(loading, "NEEDED", ())
    monkeypatch.setattr("s2ft.vllm.served_base.lora_of", lambda manager, request, folder: loaded.append(values(folder)))
    for change in (loading._change_server, loading._change_workers, loading._compare_numbers):
        change()
    return AsyncLLM(), WorkerLoRAManager("config"), added, loaded


def test_every_request_gets_the_content_of_its_adapter(folder, vllm):
    engine, manager, added, loaded = vllm
    first, in_place = Request("a", 1, str(folder)), Request("a", 1, str(folder), load_inplace=True)
    asyncio.run(engine.add_lora(first))
    manager._load_adapter(first)
    before = values(folder)
    replace(folder)
    asyncio.run(engine.add_lora(in_place))
    for request in (in_place, first):
        manager._load_adapter(request)
    assert [len(added), manager.s2ft_vllm_config] == [2, "config"] and not in_place.load_inplace
    assert first.lora_path != in_place.lora_path and first.lora_int_id != in_place.lora_int_id
    assert all(map(torch.equal, loaded, [before, values(folder), before]))
    request = sys.modules[loading.REQUEST].LoRARequest
    assert len({request("a", 1, "x"), request("a", 1, "y"), request("a", 2, "x"), request("b", 2, "x")}) == 3


def test_a_lora_is_left_alone(tmp_path, vllm):
    engine, manager, added, loaded = vllm
    request = Request("a", 1, str(tmp_path), load_inplace=True)
    asyncio.run(engine.add_lora(request))
    manager._load_adapter(request)
    assert loaded == [str(tmp_path)] == [request.lora_path] and request.load_inplace
