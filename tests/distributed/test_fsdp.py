"""FSDP2 on two ranks restores, switches, merges and casts adapters as one process does. Other calls are refused."""

import gc
import warnings
import weakref

import pytest
import torch
from runs import adapters_of_one_process, attached, check_same_files, files, logits, sharded, train
from support.inside import attachment_of
from support.models import model_of
from support.pairs import rest_slow

import s2ft

CASES = ("llama-grouped", "qwen2-grouped-tied", "gpt2", "mixtral", "phi3")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Adapters that one process trained with twice the accumulation, by case and layout."""
    return adapters_of_one_process(tmp_path_factory, attached)


# ---- adapters on a sharded model ---------------------------------------------------------------------------


def restore_and_save(rank, case, saved, directory):
    """Restore after a forward, when the root still holds gathered weights, which the next step discards."""
    model = sharded(attached(case), blocks=False)
    before = logits(model)
    s2ft.adapter.restore_adapter(model, saved)
    model.reshard()
    after = logits(model)
    s2ft.save_adapter(model, directory)
    return before, after


@pytest.mark.parametrize("case", CASES)
def test_restoring_into_a_sharded_model(ranks, alone, case, tmp_path):
    saved = alone(case, "permuted")
    for before, after in ranks(restore_and_save, case, saved, tmp_path):
        model = attached(case)
        assert torch.equal(before, logits(model))
        s2ft.adapter.restore_adapter(model, saved)
        assert torch.equal(after, logits(model)) and not torch.equal(before, after)
    check_same_files(tmp_path, saved, exactly=True)


def switch(model, adapters):
    """The outputs under several settings of the adapters, and the status."""
    seen = []
    for setting in (
        None,
        "a",
        {"a": 0.5, "b": 2.0},
        "default",
        {"default": 0.5, "b": 1.0},
        {"default": 1.0, "b": 1.0},
        None,
    ):
        s2ft.set_adapter(model, setting)
        seen.append(logits(model))
    s2ft.set_adapter(model, {"a": 1.0, "default": 1.0})
    return seen, str(s2ft.status(model))


def loaded(case, saved, before=True):
    """A model with a trainable adapter, and two loaded adapters on other units."""
    model = model_of(case)
    for name in ("a", "b"):
        s2ft.load_adapter(model, saved[name], name, active=False)
    if before:
        s2ft.set_adapter(model, "a")  # written into the full weight and taken off shard by shard
    s2ft.attach(model, s2ft.S2FTConfig(units=s2ft.read_adapter(saved["b"]).selection, layout="permuted"))
    s2ft.adapter.restore_adapter(model, saved["b"])
    if before:
        s2ft.set_adapter(model, {"a": 1.0, "default": 1.0})
    return model


def switch_sharded(rank, case, saved):
    model = sharded(loaded(case, saved))
    seen = switch(model, saved)
    weights = {key: value.full_tensor().detach() for key, value in model.named_parameters()}
    return seen, weights


@pytest.mark.parametrize("case", rest_slow(CASES, ("llama-grouped", "mixtral", "phi3")))
def test_switching_adapters_on_a_sharded_model(ranks, case, tmp_path):
    saved = {}
    for name, seed in (("a", 1), ("b", 2)):
        model = attached(case, seed=seed)
        train(model, steps=2, lr=0.1)
        s2ft.save_adapter(model, saved.setdefault(name, tmp_path / name))
    model = loaded(case, saved)
    expected, expected_status = switch(model, saved)
    for (seen, status), weights in ranks(switch_sharded, case, saved):
        assert status == expected_status and len(seen) == len(expected)
        for one, other in zip(seen, expected):
            assert torch.equal(one, other)
        assert all(torch.equal(value, weights[key]) for key, value in model.named_parameters())
    assert not torch.equal(expected[0], expected[1]) and torch.equal(expected[0], expected[-1])


def load_into_sharded(rank, case, saved):
    """Load an adapter into a model that is sharded and has a trainable adapter."""
    model = sharded(attached(case))
    s2ft.load_adapter(model, saved, "late")
    late = logits(model)
    with s2ft.disable_adapters(model):
        base = logits(model)
    s2ft.delete_adapter(model, "late")
    return late, base, s2ft.list_adapters(model)


def test_loading_into_a_sharded_model(ranks, alone, tmp_path):
    saved = alone("llama-grouped", "permuted")
    model = attached("llama-grouped")
    s2ft.load_adapter(model, saved, "late")
    for late, base, names in ranks(load_into_sharded, "llama-grouped", saved):
        assert torch.equal(late, logits(model)) and names == ["default"]
        assert torch.equal(base, logits(attached("llama-grouped")))


# ---- back to the base, and merging ---------------------------------------------------------------------------------


def undo(rank, saved, way):
    """Load, then detach, merge or delete. Returns the full weights and the adapters that are left."""
    model = sharded(attached("llama-grouped"))
    s2ft.adapter.restore_adapter(model, saved)
    s2ft.load_adapter(model, saved, "other", active=False)
    if way == "merge loaded":
        s2ft.set_adapter(model, {"other": 0.5})
    act = {"detach": s2ft.detach, "merge": s2ft.merge, "merge loaded": s2ft.merge}
    act.get(way, lambda model: s2ft.delete_adapter(model, "default"))(model)
    weights = {key: value.full_tensor().detach() for key, value in model.named_parameters()}
    return weights, s2ft.list_adapters(model)


@pytest.mark.parametrize("way", ("detach", "merge", "merge loaded", "delete"))
def test_adapters_are_taken_off_or_merged_into_the_shards(ranks, alone, way):
    saved = alone("llama-grouped", "permuted")
    expected = model_of("llama-grouped")
    if way.startswith("merge"):
        s2ft.load_adapter(expected, saved, "other")
        s2ft.set_adapter(expected, {"other": 0.5 if way == "merge loaded" else 1.0})
        s2ft.merge(expected)
    expected = dict(expected.named_parameters())
    for weights, names in ranks(undo, saved, way):
        assert weights.keys() == expected.keys() and names == (["other"] if way == "delete" else [])
        assert all(torch.equal(weights[key], value) for key, value in expected.items())


def refuse_to_fuse(rank):
    model = sharded(attached("llama"))
    before = logits(model)
    with pytest.raises(ValueError) as error:
        s2ft.fuse(model)
    return str(error.value), torch.equal(logits(model), before)


def test_a_sharded_model_is_not_fused(ranks):
    for message, same in ranks(refuse_to_fuse):
        assert "s2ft.merge writes it into the shards for good" in message and same


# ---- states ------------------------------------------------------------------------------------------------


def load_states(rank):
    """Load the base's state and the model's own into a sharded model. Returns whether the outputs stay the same."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model = sharded(with_deltas())
    before = logits(model)
    base = model_of("llama", torch.bfloat16).state_dict()
    model.reshard()  # FSDP2 keeps the root's weights gathered after a forward
    set_model_state_dict(model, base, options=StateDictOptions(full_state_dict=True, strict=False))
    same = [torch.equal(logits(model), before)]
    model.reshard()
    model.load_state_dict(model.state_dict())
    same.append(torch.equal(logits(model), before))
    s2ft.set_adapter(model, None)
    return *same, torch.equal(logits(model), logits(sharded(model_of("llama", torch.bfloat16))))


def test_a_state_in_the_bases_order_is_loaded_into_a_sharded_model(ranks):
    assert ranks(load_states) == [(True, True, True)] * 2


# ---- memory and precision ---------------------------------------------------------------------------------


def full_weights_alive(rank, case):
    model = attached(case)
    layers = {path: mount.layer for path, mount in attachment_of(model).mounts.items()}
    whole = {path: weakref.ref(layer.weight.untyped_storage()) for path, layer in layers.items()}
    sharded(model)
    gc.collect()
    return [path for path, storage in whole.items() if storage() is not None]


@pytest.mark.parametrize("case", ("llama", "mixtral"))
def test_no_full_weight_is_kept_beside_the_shards(ranks, case):
    assert ranks(full_weights_alive, case) == [[], []]


def train_cast(rank, way, directory):
    """Train with steps of a fiftieth of the bfloat16 spacing at the deltas. Returns the warnings about s2."""
    from support.inside import _warn_about_cast
    from torch.distributed.fsdp import MixedPrecisionPolicy

    _warn_about_cast.cache_clear()
    policy = {
        "uncast": MixedPrecisionPolicy(),
        "cast": MixedPrecisionPolicy(torch.bfloat16),
        "cast, summed in float32": MixedPrecisionPolicy(torch.bfloat16, torch.float32),
    }[way]
    model = sharded(with_deltas(), mp_policy=policy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, rank, lr=1e-5)
    s2ft.save_adapter(model, directory)
    return [str(warning.message) for warning in caught if "s2 was made as" in str(warning.message)]


def with_deltas():
    """A bfloat16 base with float32 deltas of about 0.1."""
    model, generator = attached("llama", dtype=torch.bfloat16), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for mount in attachment_of(model).mounts.values():
            mount.layer.s2.uniform_(0.08, 0.12, generator=generator)
    return model


@pytest.mark.parametrize("way", ("uncast", "cast", "cast, summed in float32"))
def test_updates_below_bfloat16_are_not_lost(ranks, way, tmp_path):
    warned = ranks(train_cast, way, tmp_path / "two")
    model = with_deltas()
    s2ft.save_adapter(model, tmp_path / "before")
    train(model, lr=1e-5)
    s2ft.save_adapter(model, tmp_path / "one")
    for one_rank in warned:  # once per process, if the forward's weight differs from the merged one
        assert len(one_rank) == (way != "uncast")
        assert all("made as float32 and is bfloat16 in the forward" in one for one in one_rank)
    (before, _), (one, _), (two, _) = (files(tmp_path / name) for name in ("before", "one", "two"))
    for key in (key for key in before if key.endswith(".delta")):
        expected, moved = one[key] - before[key], two[key] - before[key]
        assert (
            two[key].dtype == torch.float32 and 5e-6 < expected.abs().mean() < 4.5e-5
        )  # the bfloat16 spacing is 4.9e-4
        # Two ranks round the bfloat16 gradients differently, and Adam enlarges the smallest differences.
        assert torch.cosine_similarity(moved.flatten(), expected.flatten(), 0) > 0.97, key


# ---- weights that are trained in full ------------------------------------------------------------------------

EXTRA = dict(modules_to_save=["model.norm", "lm_head"])


def switch_extra_weights(rank, folder, unfrozen):
    """unfrozen: when the head is unfrozen by hand, before or after sharding. None: the config names it."""
    model = attached("llama-grouped", **({} if unfrozen else EXTRA))
    base = model.lm_head.weight.detach().clone()
    if unfrozen == "before":
        model.lm_head.requires_grad_(True)
    sharded(model)
    if unfrozen == "after":
        model.lm_head.requires_grad_(True)
    train(model, rank)

    def head():
        return model.lm_head.weight.detach().full_tensor()

    trained = s2ft.get_adapter(model, "default").extra_weights["lm_head.weight"]
    same = [torch.equal(head(), trained), not torch.equal(trained, base)]
    s2ft.set_adapter(model, None)
    same.append(torch.equal(head(), base))
    s2ft.set_adapter(model, "default")
    same.append(torch.equal(head(), trained))
    s2ft.save_adapter(model, folder)
    s2ft.adapter.restore_adapter(model, folder)
    gathered = s2ft.adapter.saving.gather_trained(model)["lm_head.weight"]
    return [*same, torch.equal(head(), trained), torch.equal(gathered, trained)]


@pytest.mark.parametrize("unfrozen", (None, "before", "after"))
def test_extra_weights_of_a_sharded_model_are_switched_and_saved(ranks, unfrozen, tmp_path):
    assert all(all(same) for same in ranks(switch_extra_weights, tmp_path, unfrozen))
