"""Adapters become LoRAs of vLLM, without vLLM: stand-ins of its layers, and what is refused before anything changes."""

import json
import logging
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from support.inside import Location, MissingInVLLM, compatibility, loading, lora_of, native, private, when_imported
from support.vllm_models import tiny_llama
from support.vllm_modules import MODULES, Layer, PPMissingLayer, Request, engine_of, fake_modules
from train.tiny import save_random_adapter
from transformers import GPT2Config, GPT2LMHeadModel

import s2ft

SHAPE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
RATIOS = dict(d_ratio=0.1, u_ratio=0.05, g_ratio=0.05, q_ratio=0.25, k_ratio=0.5, v_ratio=0.5, o_ratio=0.25)


def small_llama(seed=1, **changes):
    return tiny_llama(seed, **{**SHAPE, "head_dim": 16, **changes})


def saved_adapter(model, folder, **ratios):
    """Attach, fill and save an adapter of a model, which is detached again."""
    save_random_adapter(folder, model, 0.02, "a", **(ratios or RATIOS))
    s2ft.detach(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and an adapter of it."""
    found = tmp_path_factory.mktemp("loading")
    model = small_llama()
    model.save_pretrained(found / "base")
    saved_adapter(model, found / "adapter")
    return found


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    fake_modules(monkeypatch, MODULES)


def load(engine, folder, name="a"):
    return lora_of(engine, Request(name, 1, str(folder)), folder)


def merged(model, folder):
    s2ft.load_adapter(model, folder)
    return s2ft.merge(model)


# ---- the right numbers in the right places -----------------------------------------------------------------


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_an_adapter_adds_what_merging_adds(folder, size, rank):
    before, after = small_llama(), merged(small_llama(), folder / "adapter")
    engine = engine_of(before, folder / "base", size, rank)
    lora = load(engine, folder / "adapter")
    trained = engine_of(after, folder / "base", size, rank)._adapter_manager.modules
    for name, layer in engine._adapter_manager.modules.items():
        torch.testing.assert_close(engine.added(lora, name), trained[name].shard - layer.shard, atol=1e-6, rtol=0)
    assert all(engine.added(lora, name).any() for name in trained if "down" in name or "gate_up" in name)


# ---- names ---------------------------------------------------------------------------------------------------


def test_names_are_renamed_as_vllm_renames_them(folder):
    engine = engine_of(small_llama(), folder / "base")
    manager = engine._adapter_manager
    manager.modules = {f"language_model.{name}": layer for name, layer in manager.modules.items()}
    manager.packed_modules = {
        f"language_model.{name}": [f"language_model.{part}" for part in parts]
        for name, parts in manager.packed_modules.items()
    }
    manager.model.hf_to_vllm_mapper = SimpleNamespace(get_rename_mapper=lambda: lambda name: f"language_model.{name}")
    lora = load(engine, folder / "adapter")
    assert "language_model.model.layers.0.self_attn.q_proj" in lora.loras
    assert engine.added(lora, "language_model.model.layers.0.self_attn.qkv_proj").abs().max() > 0


def test_the_prefix_that_vllm_gives_to_models_of_embeddings(tmp_path):
    base = small_llama().model
    base.save_pretrained(tmp_path / "base")
    saved_adapter(base, tmp_path / "adapter", d_ratio=0.1, q_ratio=0.25)
    engine = engine_of(small_llama(), tmp_path / "base")
    with pytest.raises(ValueError, match="serves no adapter on layers.0.mlp.down_proj"):
        load(engine, tmp_path / "adapter")
    engine._adapter_manager.is_pooling_model = True
    assert engine.added(load(engine, tmp_path / "adapter"), "model.layers.1.mlp.down_proj").abs().max() > 0


def test_a_module_that_vllm_has_not_wrapped_is_an_error(folder):
    engine = engine_of(small_llama(), folder / "base", target_modules=["qkv_proj", "gate_up_proj", "o_proj"])
    for name in [name for name in engine._adapter_manager.modules if name.endswith("down_proj")]:
        del engine._adapter_manager.modules[name]
    with pytest.raises(ValueError, match="down_proj: --lora-target-modules is gate_up_proj o_proj qkv_proj. Add down_"):
        load(engine, folder / "adapter")
    engine.lora_config.target_modules = None
    with pytest.raises(ValueError, match="vLLM serves no adapter on model.layers.0.mlp.down_proj: .* merged"):
        load(engine, folder / "adapter")


def test_a_layer_of_another_pipeline_rank_is_none_of_this_ones_business(folder):
    engine = engine_of(small_llama(), folder / "base")
    for name in [name for name in engine._adapter_manager.modules if ".1." in name]:
        engine._adapter_manager.modules.pop(name), engine._adapter_manager.packed_modules.pop(name, None)
    layers = torch.nn.ModuleList([torch.nn.Identity(), PPMissingLayer()])
    engine._adapter_manager.model.model = torch.nn.Module()
    engine._adapter_manager.model.model.layers = layers
    assert engine.added(load(engine, folder / "adapter"), "model.layers.0.self_attn.o_proj").abs().max() > 0


# ---- what is refused -----------------------------------------------------------------------------------------


def test_a_rank_above_the_limit_names_the_module_its_units_and_the_option(folder):
    engine = engine_of(small_llama(), folder / "base", max_lora_rank=8)
    text = r"'math' .*mlp.down_proj trains 10 rows or columns \(10 units\), and --max-lora-rank is 8: set it to 10 or"
    with pytest.raises(ValueError, match=text + " more, or start .* S2FT_VLLM_SLICES=1"):
        load(engine, folder / "adapter", "math")


def test_another_base_is_refused(folder, tmp_path):
    """One number of one weight that the adapter does not even change makes another base, as does another depth."""
    other = small_llama()
    other.model.layers[1].mlp.gate_proj.weight.data[3, 5] += 1e-3
    for model, word in (
        (other, "1 of 2 layers differ, the first is layer 1"),
        (small_llama(num_hidden_layers=1), "1 layers against this model's 2"),
    ):
        saved_adapter(model, tmp_path, o_ratio=0.25)
        with pytest.raises(ValueError, match=f"another base than the served one: {word}"):
            load(engine_of(small_llama(), folder / "base"), tmp_path)


def test_a_damaged_folder_names_the_adapter_and_the_fault(folder, tmp_path):
    native.write(s2ft.read_adapter(folder / "adapter"), tmp_path)
    config = json.loads((tmp_path / native.CONFIG).read_text())
    config["projections"]["model.layers.0.mlp.down_proj"]["units"][0] += 1
    (tmp_path / native.CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"S²FT adapter 'math' \(.*\): .*units listed are not the ones"):
        load(engine_of(small_llama(), folder / "base"), tmp_path, "math")


def test_what_vllms_adapters_cannot_hold_is_refused(folder, tmp_path):
    adapter, name = s2ft.read_adapter(folder / "adapter"), "model.layers.0.mlp.down_proj"

    def located(location):
        return replace(adapter.structure, locations={**adapter.structure.locations, name: location})

    for change, words in (
        (dict(extra_weights={"model.norm.weight": torch.ones(64)}), "model.norm.weight trained in full.* merged"),
        (dict(structure=located(Location(name, 96, "experts", expert=3))), "weight of experts"),
        (dict(structure=located(Location(name, 96, "other"))), "is no linear layer"),
        (dict(structure=None), "not record where its slices lie: load it into its model and save it again"),
    ):
        native.write(replace(adapter, **change), tmp_path / "other")
        with pytest.raises(ValueError, match=words):
            load(engine_of(small_llama(), folder / "base"), tmp_path / "other")


# ---- the live layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_in_another_order_are_noticed(folder, rank):
    """An engine that keeps the heads in another order would add an adapter to the wrong ones."""
    engine = engine_of(small_llama(), folder / "base", 2, rank, torch.arange(64).view(4, 16).t().reshape(-1))
    with pytest.raises(ValueError, match="keeps the rows or columns of model.layers.0.self_attn.o_proj in another"):
        load(engine, folder / "adapter")


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 1)])
def test_a_quantized_base_is_compared_by_its_live_layers(folder, tmp_path, size, rank):
    rounded = small_llama()
    for parameter in rounded.parameters():
        step = parameter.abs().max() / 7  # four bits
        parameter.data.copy_((parameter / step).round() * step)
    options = dict(size=size, rank=rank, quantization_config={"quant_method": "other"})
    load(engine_of(rounded, folder / "base", **options), folder / "adapter")
    with pytest.raises(ValueError, match="another base than the served one: 2 of 2 layers differ"):
        load(engine_of(small_llama(seed=2), folder / "base", **options), folder / "adapter")


def test_a_base_without_readable_files_is_compared_by_its_live_layers(folder, tmp_path):
    """A relative of the base, such as the same model after more training, is another base."""
    shutil.copy(folder / "base" / "config.json", tmp_path)
    load(engine_of(small_llama(), tmp_path), folder / "adapter")
    relative = small_llama()
    for parameter in relative.parameters():
        parameter.data.mul_(1.05)
    with pytest.raises(ValueError, match="another base than the served one: 2 of 2 layers differ"):
        load(engine_of(relative, tmp_path), folder / "adapter")


# ---- files that are not read by name ---------------------------------------------------------------------------


def test_a_checkpoint_with_other_names_is_read_as_transformers_reads_it(tmp_path):
    """The checkpoint of GPT-2 has no prefix, and its weights are stored as [inputs, outputs]."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=32, vocab_size=99)).eval()
    model.transformer.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    saved_adapter(model, tmp_path / "adapter", q_ratio=0.25, o_ratio=0.25, d_ratio=0.1)
    engine = engine_of(model, tmp_path / "base")
    manager = engine._adapter_manager
    for name, module in model.named_modules():
        if type(module).__name__ == "Conv1D":
            manager.modules[name] = Layer([module.weight.data.t()], name.endswith("c_proj"), 1, 0)
    lora = load(engine, tmp_path / "adapter")
    after = merged(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    for name in ("transformer.h.1.attn.c_attn", "transformer.h.0.mlp.c_proj"):
        change = (after.get_submodule(name).weight - model.get_submodule(name).weight).detach().t()
        torch.testing.assert_close(engine.added(lora, name), change, atol=1e-6, rtol=0)


# ---- folders, and names of vLLM --------------------------------------------------------------------------------


def test_missing_names_say_the_release_the_tested_ones_and_the_way_out(monkeypatch):
    known = type("Known", (), {"method": 1})
    fake_modules(monkeypatch, {"vllm.some": {"Known": known}, "vllm": {"__version__": "9.9"}})
    assert private("vllm.some") is sys.modules["vllm.some"] and private("vllm.some", "Known.method") == 1
    text = "vLLM 9.9 has no vllm.some.Known.gone, .* tested with vLLM 0.32.0.*s2ft export --format lora"
    with pytest.raises(MissingInVLLM, match=text):
        private("vllm.some", "Known.gone")
    with pytest.raises(MissingInVLLM, match=r"has no .*Known\.gone"):
        compatibility.part_of(known(), "gone")
    monkeypatch.setattr(compatibility, "find_spec", lambda name: None)
    with pytest.raises(MissingInVLLM, match="has no vllm.gone,"):
        when_imported("vllm.gone", "feature", print)


def test_an_error_of_a_change_does_not_stop_the_import(tmp_path, monkeypatch, caplog):
    (tmp_path / "changed_later.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    when_imported("changed_later", "some feature", lambda: private("changed_later", "gone"))
    when_imported("changed_later", "another", lambda: sys.modules["changed_later"].__dict__.update(value=2))
    assert "changed_later" not in sys.modules
    with caplog.at_level(logging.WARNING):
        import changed_later
    assert changed_later.value == 2 and "some feature are not available in this vLLM" in caplog.text


def test_waiting_for_a_module_does_not_import_its_packages(tmp_path, monkeypatch):
    (tmp_path / "waited" / "inner").mkdir(parents=True)
    (tmp_path / "waited" / "__init__.py").write_text("")
    (tmp_path / "waited" / "inner" / "__init__.py").write_text("from waited.inner import last")
    (tmp_path / "waited" / "inner" / "last.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    changed = []
    when_imported("waited.inner.last", "feature", lambda: changed.append(1))
    assert not [name for name in sys.modules if name.startswith("waited")]
    with pytest.raises(MissingInVLLM, match="has no waited.inner.gone"):
        when_imported("waited.inner.gone", "feature", print)
    import waited.inner

    assert changed == [1] and waited.inner.last


def test_registering_never_raises_and_happens_once(monkeypatch, caplog):
    import s2ft.vllm

    calls = []
    fake_modules(monkeypatch, {"s2ft_test_good": {"install": lambda: calls.append(1)}})
    monkeypatch.setattr(
        s2ft.vllm, "FEATURES", {"what is gone": "s2ft_no_such_module", "what is there": "s2ft_test_good"}
    )
    s2ft.vllm.register.cache_clear()
    with caplog.at_level(logging.WARNING):
        s2ft.vllm.register()
        s2ft.vllm.register()
    assert calls == [1] and caplog.text.count("what is gone are not available") == 1


# ---- one answer of all ranks -----------------------------------------------------------------------------------


class Executor:
    """Two ranks whose workers answer as the test says."""

    def __init__(self, *workers):
        self.workers, self.calls = workers, []

    def collective_rpc(self, method, args):
        self.calls.append(method if isinstance(method, str) else method.__name__)
        return [method(worker, *args) for worker in self.workers] if callable(method) else None


def worker(error=None):
    return Mock(add_lora=Mock(return_value=True, side_effect=error))


@pytest.fixture
def executors(monkeypatch):
    kind = type("Executor", (Executor,), {"add_lora": None})
    fake_modules(monkeypatch, {loading.EXECUTOR: {"Executor": kind}})
    loading._change_executors()
    return kind


def test_the_engine_hears_all_ranks_before_it_says_why(executors):
    request = Request("a", 7, "folder")
    assert executors(worker(), worker()).add_lora(request) is True
    engine = executors(worker(ValueError("damaged")), worker(ValueError("damaged")))
    with pytest.raises(ValueError, match="^damaged$"):
        engine.add_lora(request)
    assert engine.calls == ["add_on_rank"]


def test_ranks_that_disagree_leave_none_with_the_adapter(executors):
    engine = executors(worker(), worker(OSError("no such disk")))
    with pytest.raises(ValueError, match="no such disk"):
        engine.add_lora(Request("a", 7, "folder"))
    assert engine.calls == ["add_on_rank", "remove_lora"]
