"""FSDP2 was applied before attach: the same switching and merging as in one process."""

import pytest
import torch
from runs import adapters_of_one_process, attached, check_same_files, config_for, logits, sharded, train
from support.models import model_of

import s2ft


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Adapters that one process trained, by case, layout and changes of the config."""
    return adapters_of_one_process(tmp_path_factory, attached)


def base_of(model):
    return {key: value.full_tensor().detach().clone() for key, value in model.named_parameters()}


def is_base(model, base):
    now = dict(model.named_parameters())
    return now.keys() == base.keys() and all(torch.equal(now[key].full_tensor(), value) for key, value in base.items())


# ---- models that transformers shards -----------------------------------------------------------------------


def from_transformers(rank, folder, layout, directory):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    base = base_of(model)
    report = s2ft.attach(model, config_for("llama-grouped", layout))
    assert "in evaluation mode only" in report.unproved
    train(model, rank)
    s2ft.save_adapter(model, directory / "trained")
    s2ft.detach(model)
    same = is_base(model, base)
    s2ft.load_adapter(model, directory / "trained", trainable=True)
    s2ft.save_adapter(model, directory / "again")
    s2ft.merge(model)
    return same, base_of(model)


@pytest.mark.parametrize("layout", ("permuted", "indexed"))
def test_models_that_transformers_has_sharded(ranks, layout, tmp_path):
    """They train, go on, and merge into the shards, bit for bit the weights that one process merges."""
    model_of("llama-grouped").save_pretrained(tmp_path / "base")
    model = type(model_of("llama-grouped")).from_pretrained(tmp_path / "base")
    s2ft.attach(model, config_for("llama-grouped", layout))
    train(model)
    s2ft.save_adapter(model, tmp_path / "alone")
    answers = ranks(from_transformers, tmp_path / "base", layout, tmp_path)
    check_same_files(tmp_path / "trained", tmp_path / "alone")
    check_same_files(tmp_path / "again", tmp_path / "trained", exactly=True)
    merged = model_of("llama-grouped")
    s2ft.load_adapter(merged, tmp_path / "trained", trainable=True)
    expected = dict(s2ft.merge(merged).named_parameters())
    for same, weights in answers:
        assert same and weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], value) for key, value in expected.items())


# ---- adapters ----------------------------------------------------------------------------------------------


def change_adapters(rank, saved, directory):
    """Load, attach beside, switch and delete. Returns outputs, and whether the base is back after all of it."""
    model = sharded(model_of("llama-grouped"))
    base = base_of(model)
    s2ft.load_adapter(model, saved, "other")
    loaded = logits(model)
    s2ft.attach(model, config_for("llama-grouped", "permuted", seed=5))
    train(model, rank, steps=1)
    s2ft.save_adapter(model, directory)
    s2ft.set_adapter(model, {"default": 1.0, "other": 0.5})
    both = logits(model)
    s2ft.delete_adapter(model, "default")
    s2ft.set_adapter(model, "other")
    again = logits(model)
    s2ft.delete_adapter(model, "other")
    return loaded, both, again, is_base(model, base), s2ft.list_adapters(model)


def test_adapters_on_a_model_that_was_sharded_first(ranks, alone, tmp_path):
    saved = alone("llama-grouped", "permuted")
    answers = ranks(change_adapters, saved, tmp_path)
    model = model_of("llama-grouped")
    s2ft.load_adapter(model, saved, "other")
    loaded = logits(model)
    s2ft.load_adapter(model, tmp_path, trainable=True)
    s2ft.set_adapter(model, {"default": 1.0, "other": 0.5})
    both = logits(model)
    for one_loaded, one_both, again, is_base_again, names in answers:
        assert torch.equal(one_loaded, loaded) and torch.equal(again, loaded)
        assert torch.equal(one_both, both) and not torch.equal(both, loaded)
        assert is_base_again and names == []


def interrupted(rank, error):
    """Fail while layers are mounted, after FSDP2 has been told of them."""
    from support.inside import mounting

    model = sharded(model_of("llama-grouped"))
    base, before = base_of(model), logits(model)
    model.reshard()
    replace = mounting.replace_forward

    def fail(*args):
        raise error

    mounting.replace_forward = fail
    try:
        s2ft.attach(model, config_for("llama-grouped", "permuted"))
    except type(error):
        pass
    finally:
        mounting.replace_forward = replace
    same = is_base(model, base) and torch.equal(logits(model), before)
    model.reshard()
    s2ft.attach(model, config_for("llama-grouped", "permuted"))
    return same and torch.equal(logits(model), logits(attached("llama-grouped")))


def test_an_error_while_layers_are_mounted_leaves_the_sharded_model_as_it_was(ranks):
    assert ranks(interrupted, KeyboardInterrupt()) == [True, True]


# ---- precision ---------------------------------------------------------------------------------------------


def train_in_bfloat16(rank, directory, first):
    """Shard first or attach first, under a policy that gathers bfloat16 and reduces float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy, model = MixedPrecisionPolicy(torch.bfloat16, torch.float32), model_of("llama-grouped")
    if first == "shard":
        sharded(model, mp_policy=policy)
    s2ft.attach(model, config_for("llama-grouped", "permuted"))
    if first == "attach":
        sharded(model, mp_policy=policy)
    train(model, rank)
    s2ft.save_adapter(model, directory / first)


def test_mixed_precision_is_that_of_a_model_that_is_sharded_later(ranks, tmp_path):
    for first in ("shard", "attach"):
        ranks(train_in_bfloat16, tmp_path, first)
    check_same_files(tmp_path / "shard", tmp_path / "attach", exactly=True)
