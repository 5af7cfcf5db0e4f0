"""FSDP2 was applied before attach: the same training, selection, switching and merging as in one process."""

import pytest
import torch
from runs import adapters_of_one_process, batches, check_same_files, logits, sharded, train
from support.models import ALL_RATIOS, model_of, ratios_for

import s2ft
from s2ft.distributed import is_sharded

WAYS = {
    "blocks": {},
    "root": {"blocks": False},
    "kept": {"reshard_after_forward": False},
    "offloaded": {"offload": True},
}
CASES = ("llama-grouped", "qwen2-grouped-tied", "gpt2", "mixtral", "phi3")


def config_for(case, layout, **changes):
    return s2ft.S2FTConfig(**{**ratios_for(case, ALL_RATIOS), "layout": layout, **changes})


def calibration_for(config, model):
    return batches(model, 2) if config.selection in ("activation", "product", "gradient") else None


def attach_to(model, case, layout, **changes):
    config = config_for(case, layout, **changes)
    report = s2ft.attach(model, config, calibration=calibration_for(config, model))
    assert ("in evaluation mode only" in report.unproved) == is_sharded(next(model.parameters()))
    return model


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Adapters that one process trained, by case, layout and changes of the config."""
    return adapters_of_one_process(
        tmp_path_factory, lambda case, layout, **changes: attach_to(model_of(case), case, layout, **changes)
    )


def base_of(model):
    return {key: value.full_tensor().detach().clone() for key, value in model.named_parameters()}


def is_base(model, base):
    now = dict(model.named_parameters())
    return now.keys() == base.keys() and all(torch.equal(now[key].full_tensor(), value) for key, value in base.items())


def train_and_save(rank, case, layout, way, directory, ran=False, checkpointing=None, changes={}):
    """Shard, attach, train and save, then detach. Returns whether the base is unchanged, bit for bit."""
    model = sharded(model_of(case), **WAYS[way])
    if ran:
        logits(model)
        model.reshard()
    base = base_of(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    attach_to(model, case, layout, **changes)
    train(model, rank)
    s2ft.save_adapter(model, directory)
    s2ft.detach(model)
    return is_base(model, base)


@pytest.mark.parametrize(
    "case, way, layout",
    [
        ("llama-grouped", "blocks", "permuted"),
        ("llama-grouped", "root", "indexed"),
        ("qwen2-grouped-tied", "kept", "permuted"),
        ("mixtral", "blocks", "permuted"),
        pytest.param("gpt2", "blocks", "indexed", marks=pytest.mark.slow),
        pytest.param("mixtral", "blocks", "indexed", marks=pytest.mark.slow),
        pytest.param("phi3", "offloaded", "permuted", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_and_save_the_adapter_of_one_process(ranks, alone, case, way, layout, tmp_path):
    assert ranks(train_and_save, case, layout, way, tmp_path) == [True, True]
    check_same_files(tmp_path, alone(case, layout))


@pytest.mark.parametrize(
    "selection, case", [("weight", "mixtral"), ("activation", "mixtral"), ("gradient", "qwen2-grouped-tied")]
)
def test_ranks_select_the_units_of_one_process(ranks, alone, selection, case, tmp_path):
    """A forward has been run, so that FSDP2 has made its gathered parameters before they are frozen."""
    changes = dict(selection=selection)
    assert ranks(train_and_save, case, "permuted", "blocks", tmp_path, True, None, changes) == [True, True]
    check_same_files(tmp_path, alone(case, "permuted", **changes))


@pytest.mark.parametrize("reentrant", (False, True))
def test_with_gradient_checkpointing_and_extra_weights(ranks, alone, reentrant, tmp_path):
    changes = dict(modules_to_save=["model.norm", "lm_head"])
    layout = "permuted" if reentrant else "indexed"
    assert ranks(train_and_save, "llama-grouped", layout, "blocks", tmp_path, False, reentrant, changes) == [True, True]
    check_same_files(tmp_path, alone("llama-grouped", layout, **changes))


# ---- models that transformers shards -----------------------------------------------------------------------


def from_transformers(rank, folder, layout, directory):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    base = base_of(model)
    s2ft.attach(model, config_for("llama-grouped", layout))
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
    from s2ft.attached import mounting

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
    return same and torch.equal(logits(model), logits(attached_alone()))


def attached_alone():
    model = model_of("llama-grouped")
    s2ft.attach(model, config_for("llama-grouped", "permuted"))
    return model


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


# ---- four ranks --------------------------------------------------------------------------------------------


def train_on_four(rank, case, layout, mesh, directory):
    """Two ranks for each half of a batch, on one mesh of four or on two copies of two shards."""
    from torch.distributed.device_mesh import init_device_mesh

    model = sharded(
        model_of(case, torch.float64),
        mesh=init_device_mesh("cpu", mesh, mesh_dim_names=("copy", "shard")[-len(mesh) :]),
    )
    base = base_of(model)
    attach_to(model, case, layout, selection="weight")
    train(model, rank // 2)
    s2ft.save_adapter(model, directory)
    s2ft.detach(model)
    return is_base(model, base)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, layout, mesh",
    [("llama-grouped", "permuted", (4,)), ("mixtral", "permuted", (2, 2)), ("gpt2", "indexed", (4,))],
)
def test_four_ranks(four_ranks, case, layout, mesh, tmp_path):
    """In float64, because AdamW enlarges the rounding of a sum over four ranks where a gradient is nearly zero."""
    assert four_ranks(train_on_four, case, layout, mesh, tmp_path / "four") == [True] * 4
    model = attach_to(model_of(case, torch.float64), case, layout, selection="weight")
    train(model)
    s2ft.save_adapter(model, tmp_path / "alone")
    check_same_files(tmp_path / "four", tmp_path / "alone", rtol=1e-9, atol=1e-9)
