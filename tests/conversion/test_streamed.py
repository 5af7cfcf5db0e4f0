"""Merging from a checkpoint, one weight at a time, gives the files of merging in memory, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.composites import composite_of
from support.inside import (
    StoredWeights,
    export,
    keep_in_float32,
    load_model,
    merged,
    open_checkpoint,
    stored_tensors,
    streamed,
    temporary_folder,
    write_merged,
)
from support.models import ALL_RATIOS, CASES, model_of, ratios_for
from support.pairs import rest_slow
from support.states import flip, same, tensors_of
from train.tiny import save_random_adapter, save_tiny, tiny_tokenizer

import s2ft

WEIGHTS = "model.safetensors"
# dense, biases, tied, Conv1D, fused experts and weights, transposed experts, an encoder and a decoder
FAST = ("llama-biased", "qwen2-grouped-tied", "gpt2", "mixtral", "phi3", "deepseek-v3", "t5-gated", "whisper")
ALL = rest_slow(CASES, FAST)
SHARDS = "20KB"


def check_equal(folder, expected):
    """Check that two folders have the same tensors and settings."""
    ours, theirs = tensors_of(folder), tensors_of(expected)
    assert same(ours, theirs) and all(ours[name].dtype == theirs[name].dtype for name in ours)
    for file in Path(expected).glob("*config.json"):
        assert json.loads((Path(folder) / file.name).read_text()) == json.loads(file.read_text())


def without_values(model, dtype):
    """The same model on the meta device."""
    with torch.device("meta"):
        hollow = type(model)._from_config(type(model.config)(**model.config.to_dict()), dtype=dtype)
    keep_in_float32(hollow)
    return hollow.eval()


def both_ways(model, folder, dtype=torch.float32, max_shard_size=None, **config):
    """Merge an adapter of a model in memory and from the disk, into folder/memory and folder/disk."""
    model.save_pretrained(folder / "base", max_shard_size=max_shard_size or "50GB")
    base = type(model).from_pretrained(folder / "base", dtype=dtype)
    save_random_adapter(folder / "adapter", base, 0.05, **config)
    s2ft.merge(base).save_pretrained(folder / "memory", max_shard_size=max_shard_size or "50GB")
    hollow = without_values(model, dtype)
    weights = StoredWeights(hollow, open_checkpoint(folder / "base"))
    (folder / "disk").mkdir()
    compare = write_merged(folder / "disk", hollow, weights, s2ft.read_adapter(folder / "adapter"), max_shard_size)
    streamed.give_generation_config(hollow, folder / "base")
    streamed.write_config(folder / "disk", hollow)
    compare()
    return folder / "disk", folder / "memory"


@pytest.mark.parametrize("case", ALL)
def test_every_family_is_merged_as_in_memory(case, tmp_path):
    disk, memory = both_ways(model_of(case), tmp_path, torch.bfloat16, **ratios_for(case, ALL_RATIOS), layout="indexed")
    check_equal(disk, memory)
    assert (disk / WEIGHTS).read_bytes() == (memory / WEIGHTS).read_bytes()
    base, written = tensors_of(tmp_path / "base"), tensors_of(disk)
    changed = [name for name in base if not torch.equal(base[name].to(written[name].dtype), written[name])]
    assert 0 < len(changed) < len(base)  # else the test would compare bases


@pytest.mark.parametrize("model_type", ("llava_next", pytest.param("gemma3", marks=pytest.mark.slow)))
def test_models_whose_files_have_other_names_are_merged(model_type, tmp_path):
    check_equal(*both_ways(composite_of(model_type), tmp_path, d_ratio=0.2, o_ratio=0.5))


@pytest.mark.parametrize("case", ("llama", "mixtral"))
def test_files_have_at_most_the_size_that_is_asked_for(case, tmp_path):
    disk, memory = both_ways(model_of(case), tmp_path, max_shard_size=SHARDS, d_ratio=0.2)
    check_equal(disk, memory)
    sizes = [sum(one.bytes for one in stored_tensors(file).values()) for file in disk.glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) <= 20_000
    ours, theirs = (json.loads((folder / f"{WEIGHTS}.index.json").read_text()) for folder in (disk, memory))
    assert ours["metadata"] == theirs["metadata"] and ours["weight_map"].keys() == theirs["weight_map"].keys()


# ---- bases that transformers did not write -----------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base with a tokenizer and an adapter for it."""
    work = tmp_path_factory.mktemp("work")
    save_tiny(work / "model")
    model = save_random_adapter(work / "adapter", load_model(str(work / "model"))[0], d_ratio=0.2, o_ratio=0.25)
    s2ft.merge(model).save_pretrained(work / "expected")
    return work


def changed_base(work, folder, change):
    """Copy the base, with tensors that `change` changes in place."""
    shutil.copytree(work / "model", folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def test_a_tied_weight_that_the_base_has_twice_is_written_once(work, tmp_path):
    twice = lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})  # noqa: E731
    export(str(changed_base(work, tmp_path / "base", twice)), work / "adapter", tmp_path / "out")
    check_equal(tmp_path / "out", work / "expected")


def test_tensors_that_the_model_does_not_use_are_kept(work, tmp_path):
    extra = torch.arange(10).to(torch.float8_e4m3fn)
    base = changed_base(work, tmp_path / "base", lambda tensors: tensors.update({"mtp.layers.0.scale": extra}))
    export(str(base), work / "adapter", tmp_path / "out")
    found = stored_tensors(tmp_path / "out" / WEIGHTS)["mtp.layers.0.scale"].read()
    assert found.dtype == extra.dtype and torch.equal(found.view(torch.uint8), extra.view(torch.uint8))
    assert type(load_model(str(work / "model"))[0]).from_pretrained(tmp_path / "out").num_parameters()


def as_pickle(work, folder):
    shutil.copytree(work / "model", folder)
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize(
    "make, reason",
    [
        (as_pickle, f"has no {WEIGHTS}"),
        (
            lambda work, folder: changed_base(
                work, folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(259, 32)})
            ),
            "are one weight by its config and differ",
        ),
    ],
)
def test_what_cannot_be_streamed_is_merged_in_memory_and_the_log_says_why(make, reason, work, tmp_path, caplog):
    make(work, tmp_path / "base")
    caplog.set_level("INFO")
    export(str(tmp_path / "base"), work / "adapter", tmp_path / "out")
    assert "merging in memory, which has to hold the whole model: " in caplog.text and reason in caplog.text
    found, expected = tensors_of(tmp_path / "out"), tensors_of(work / "expected")
    assert same({name: found[name] for name in expected}, expected)


def test_an_ordinary_base_is_not_loaded(work, tmp_path, monkeypatch):
    monkeypatch.delattr(merged, "load_model")
    shutil.copytree(work / "model", tmp_path / "base")
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"pieces")  # llama.cpp's converter may need it
    export(str(tmp_path / "base"), work / "adapter", tmp_path / "out", max_shard_size=SHARDS)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
    check_equal(tmp_path / "out", work / "expected")
    assert tiny_tokenizer()("12+3=").input_ids == load_model(str(tmp_path / "out"))[1]("12+3=").input_ids


def test_a_base_in_a_hub_cache_is_read_there(work, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--org--name"
    shutil.copytree(work / "model", cache / "blobs")
    (cache / "refs").mkdir(), (cache / "snapshots").mkdir()
    (cache / "refs" / "main").write_text("0123")
    (cache / "snapshots" / "0123").symlink_to("../blobs")
    import huggingface_hub.constants
    import transformers.utils.hub

    for module, name in ((huggingface_hub.constants, "HF_HUB_CACHE"), (transformers.utils.hub, "HF_HUB_CACHE")):
        monkeypatch.setattr(module, name, str(tmp_path / "hub"), raising=False)
    monkeypatch.delattr(merged, "load_model")
    export("org/name", work / "adapter", tmp_path / "out")
    check_equal(tmp_path / "out", work / "expected")


# ---- what goes wrong leaves nothing ------------------------------------------------------------------------


@pytest.mark.parametrize("case", ("llama", "mixtral"))
def test_files_that_are_not_what_was_meant_are_an_error(case, tmp_path, monkeypatch):
    write = streamed.write_weights

    def write_badly(folder, *args):
        compare = write(folder, *args)
        flip(folder / WEIGHTS)
        return compare

    monkeypatch.setattr(merged, "write_weights", write_badly)
    with pytest.raises(RuntimeError, match="the saved checkpoint is not the merged model: .* differ"):
        both_ways(model_of(case), tmp_path, d_ratio=0.2)


def test_a_conversion_that_its_inverse_does_not_undo_is_an_error(tmp_path, monkeypatch):
    """The weights are read again as transformers would load them, and compared with those that were converted."""
    from transformers.core_model_loading import Chunk

    convert = Chunk.convert

    def swapped(self, *args, **options):
        made = convert(self, *args, **options)
        return dict(zip(made, reversed(made.values())))

    both_ways(model_of("mixtral"), tmp_path, d_ratio=0.2, u_ratio=0.2)
    hollow, adapter = without_values(model_of("mixtral"), torch.float32), s2ft.read_adapter(tmp_path / "adapter")
    weights = StoredWeights(hollow, open_checkpoint(tmp_path / "base"))
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Chunk, "convert", swapped)
    with pytest.raises(RuntimeError, match="the saved checkpoint is not the merged model: .*gate_up_proj"):
        write_merged(tmp_path / "out", hollow, weights, adapter, None)()


def test_the_folder_of_a_killed_process_is_removed_and_that_of_a_running_one_stays(tmp_path):
    for name in (".out.s2ft-abcdefgh", ".out.settings"):
        (tmp_path / name).mkdir()
    output = tmp_path / "out"
    with pytest.raises(OSError), temporary_folder(output) as first, temporary_folder(output) as second:
        assert {one.name for one in tmp_path.iterdir()} == {".out.settings", first.parent.name, second.parent.name}
        (second / "a").touch()
    assert {one.name for one in tmp_path.iterdir()} == {".out.settings", "out"}
