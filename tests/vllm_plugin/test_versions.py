"""Adapters that are replaced while requests run, without vLLM: the names of contents, and contents that are kept."""

import asyncio
import shutil
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from serve.fleet import save_adapters
from support.inside import versions, when_imported

from s2ft import read_adapter


@dataclass
class Request:
    """The fields of vLLM's LoRARequest that are used here."""

    lora_path: str
    lora_int_id: int = 1
    load_inplace: bool = False
    lora_name: str = "a"


@pytest.fixture
def folder(tmp_path):
    """An adapter, and beside it another content for the same folder."""
    save_adapters(tmp_path / "made", 2)
    shutil.copytree(tmp_path / "made" / "a0", tmp_path / "a")
    return tmp_path / "a"


def other(folder):
    return folder.parent / "made" / "a1"


def replace(folder):
    """Put another adapter in place of the one in a folder, by renaming."""
    shutil.copytree(other(folder), folder.parent / "next")
    folder.rename(folder.parent / "old")
    (folder.parent / "next").rename(folder)


def values(adapter):
    return torch.cat([delta.values.flatten() for delta in adapter.deltas.values()])


def test_the_name_of_a_content_follows_the_content(folder, tmp_path):
    first = versions.with_version(str(folder))
    assert versions.split_version(first)[0] == str(folder) and versions.with_version(first) == first
    shutil.copytree(folder, tmp_path / "copy")
    assert versions.split_version(versions.with_version(str(tmp_path / "copy")))[1] == versions.split_version(first)[1]
    replace(folder)
    assert versions.with_version(str(folder)) != first


def test_what_is_no_adapter_has_no_version(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "missing", "no-such-org/no-such-adapter", "base#1"):
        assert versions.with_version(str(path)) is None
    assert versions.split_version("folder#s2ft-1") == ("folder#s2ft-1", None)


@pytest.mark.parametrize("change", (replace, shutil.rmtree))
def test_a_content_is_read_again_after_its_folder_was_replaced_or_deleted(folder, change):
    path, version = versions.split_version(versions.with_version(str(folder)))
    expected, contents = values(read_adapter(folder)), versions.Contents()
    loaded = []
    assert torch.equal(values(contents.load(path, version, read_adapter)), expected)
    change(folder)
    again = contents.load(path, version, lambda place: loaded.append(place) or read_adapter(place))
    assert torch.equal(values(again), expected) and loaded != [path]


def test_a_folder_that_is_replaced_during_the_read_gives_the_content_that_was_named(folder):
    path, version = versions.split_version(versions.with_version(str(folder)))
    expected, reads = values(read_adapter(folder)), []

    def load(place):
        if not reads:
            replace(folder)
        reads.append(place)
        return read_adapter(place)

    assert torch.equal(values(versions.Contents().load(path, version, load)), expected)
    assert len(reads) == 2 and reads[0] == path


def test_another_content_than_the_named_one_is_refused(folder):
    path, version = versions.split_version(versions.with_version(str(folder)))
    replace(folder)
    with pytest.raises(ValueError, match="was replaced while it was loaded"):
        versions.Contents().load(path, version, read_adapter)


def test_errors_of_the_loader_are_its_own(folder):
    path, version = versions.split_version(versions.with_version(str(folder)))

    def fail(place):
        raise KeyError(place)

    with pytest.raises(KeyError, match=path):
        versions.Contents().load(path, version, fail)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        versions.Contents().load(path, version, read_adapter)


def test_the_number_of_open_files_is_limited(folder):
    contents, names = versions.Contents(limit=1), []
    for place in (folder, other(folder)):
        names.append(versions.split_version(versions.with_version(str(place))))
        contents.load(*names[-1], read_adapter)
    assert list(contents._kept) == [names[1][1]]
    contents.load(*names[0], read_adapter)  # it is opened again while the folder has it
    assert list(contents._kept) == [names[0][1]]


@pytest.fixture
def vllm_modules(monkeypatch):
    """Stand-ins of vLLM's classes. Returns the list of requests that the engine gets, and of paths that are loaded."""
    added, loaded = [], []

    class AsyncLLM:
        async def add_lora(self, lora_request):
            added.append(lora_request)

    class WorkerLoRAManager:
        def _load_adapter(self, lora_request):
            loaded.append(lora_request.lora_path)
            return lora_request.lora_int_id

    class LoRARequest(Request):
        """Equal to another one of its name, as in vLLM."""

        def __eq__(self, other):
            return self.lora_name == other.lora_name

        def __hash__(self):
            return hash(self.lora_name)

    for name, kind in (
        ("vllm.v1.engine.async_llm", AsyncLLM),
        ("vllm.lora.worker_manager", WorkerLoRAManager),
        ("vllm.lora.request", LoRARequest),
    ):
        module = ModuleType(name)
        setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, name, module)
    versions.install()
    return AsyncLLM, WorkerLoRAManager, added, loaded


def test_an_adapter_that_is_loaded_in_place_gets_a_number_of_its_own(folder, vllm_modules):
    engine, _, added, _ = vllm_modules
    requests = [Request(str(folder)), *(Request(str(folder), load_inplace=True) for _ in range(2))]
    for request in requests:
        asyncio.run(engine().add_lora(request))
    assert added == requests and {request.lora_path for request in added} == {versions.with_version(str(folder))}
    assert len({request.lora_int_id for request in added}) == 3 and not any(one.load_inplace for one in added)


def test_two_numbers_of_one_name_are_two_adapters_of_a_batch(vllm_modules):
    request = sys.modules["vllm.lora.request"].LoRARequest
    assert len({request("x"), request("y"), request("x", 2), request("x", 2, lora_name="b")}) == 3


def test_a_lora_is_left_alone(tmp_path, vllm_modules):
    engine, manager, added, loaded = vllm_modules
    request = Request(str(tmp_path), load_inplace=True)
    asyncio.run(engine().add_lora(request))
    assert added == [Request(str(tmp_path), load_inplace=True)]
    assert manager()._load_adapter(request) == 1 and loaded == [str(tmp_path)]


def test_a_worker_loads_the_content_that_the_path_names(folder, vllm_modules):
    _, manager, _, loaded = vllm_modules
    request = Request(versions.with_version(str(folder)), 7)
    assert manager()._load_adapter(request) == 7 and loaded == [str(folder)]
    assert request.lora_path.startswith(f"{folder}#")


def test_two_changes_of_one_module_follow_its_import_in_their_order(tmp_path, monkeypatch):
    (tmp_path / "imported_later.py").write_text("names = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in "ab":
        when_imported("imported_later", name, lambda name=name: sys.modules["imported_later"].names.append(name))
    import imported_later

    assert imported_later.names == ["a", "b"]
