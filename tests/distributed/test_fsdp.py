"""What FSDP2 alone has: states, casts, memory, weights trained in full, and models that were sharded before attach."""

import gc
import weakref
from unittest import mock

import pytest
import torch
from runs import EXTRA, attached, base_is, check_same_files, config_for, files, logits, sharded, train
from support.inside import record_of
from support.models import model_of
from support.tolerances import GEMM

import s2ft

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
    expected = logits(sharded(model_of("llama", torch.bfloat16)))  # its units are in another order
    return *same, torch.allclose(logits(model), expected, *GEMM[torch.bfloat16])


def test_a_state_in_the_bases_order_is_loaded_into_a_sharded_model(ranks):
    assert ranks(load_states) == [(True, True, True)] * 2


# ---- memory and precision ---------------------------------------------------------------------------------


def full_weights_alive(rank, case):
    model = attached(case)
    layers = {path: mount.layer for path, mount in record_of(model).mounts.items()}
    whole = {path: weakref.ref(layer.weight.untyped_storage()) for path, layer in layers.items()}
    sharded(model)
    gc.collect()
    return [path for path, storage in whole.items() if storage() is not None]


@pytest.mark.parametrize("case", ("llama", "mixtral"))
def test_no_full_weight_is_kept_beside_the_shards(ranks, case):
    assert ranks(full_weights_alive, case) == [[], []]


def train_cast(rank, way, directory):
    """Train with steps of a fiftieth of the bfloat16 spacing at the deltas."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = {
        "uncast": MixedPrecisionPolicy(),
        "cast": MixedPrecisionPolicy(torch.bfloat16),
        "cast, summed in float32": MixedPrecisionPolicy(torch.bfloat16, torch.float32),
    }[way]
    s2ft.save_adapter(train(sharded(with_deltas(), mp_policy=policy), rank, lr=1e-5), directory)


@torch.no_grad()
def with_deltas():
    """A bfloat16 base with float32 deltas of about 0.1."""
    model, generator = attached("llama", dtype=torch.bfloat16), torch.Generator().manual_seed(3)
    for mount in record_of(model).mounts.values():
        mount.layer.s2.uniform_(0.08, 0.12, generator=generator)
    return model


@pytest.mark.parametrize("way", ("uncast", "cast", "cast, summed in float32"))
def test_updates_below_bfloat16_are_not_lost(ranks, way, tmp_path):
    ranks(train_cast, way, tmp_path / "two")
    model = with_deltas()
    s2ft.save_adapter(model, tmp_path / "before")
    train(model, lr=1e-5)
    s2ft.save_adapter(model, tmp_path / "one")
    (before, _), (one, _), (two, _) = (files(tmp_path / name) for name in ("before", "one", "two"))
    for key in (key for key in before if key.endswith(".delta")):
        expected, moved = one[key] - before[key], two[key] - before[key]
        assert (
            two[key].dtype == torch.float32 and 5e-6 < expected.abs().mean() < 4.5e-5
        )  # the bfloat16 spacing is 4.9e-4
        # Two ranks round the bfloat16 gradients differently, and Adam enlarges the smallest differences.
        assert torch.cosine_similarity(moved.flatten(), expected.flatten(), 0) > 0.97, key


# ---- weights that are trained in full ------------------------------------------------------------------------


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
    s2ft.attached.loading.restore_adapter(model, folder)
    gathered = s2ft.attached.saving.gather_trained(model)["lm_head.weight"]
    return [*same, torch.equal(head(), trained), torch.equal(gathered, trained)]


@pytest.mark.parametrize("unfrozen", (None, "before", "after"))
def test_extra_weights_of_a_sharded_model_are_switched_and_saved(ranks, unfrozen, tmp_path):
    assert all(all(same) for same in ranks(switch_extra_weights, tmp_path, unfrozen))


# ---- sharded before the adapter --------------------------------------------------------------------------------


def interrupted(rank, error):
    """Fail while layers are mounted, after FSDP2 has been told of them."""
    from support.inside import mounting

    model = sharded(model_of("llama-grouped"))
    before = logits(model)
    model.reshard()
    with mock.patch.object(mounting, "replace_forward", side_effect=error), pytest.raises(type(error)):
        s2ft.attach(model, config_for("llama-grouped"))
    same = base_is(model, "llama-grouped") and torch.equal(logits(model), before)
    model.reshard()
    s2ft.attach(model, config_for("llama-grouped"))
    return same and torch.equal(logits(model), logits(attached("llama-grouped")))


def test_an_error_while_layers_are_mounted_leaves_the_sharded_model_as_it_was(ranks):
    assert ranks(interrupted, KeyboardInterrupt()) == [True, True]


def train_in_bfloat16(rank, directory, first):
    """Shard first or attach first, under a policy that gathers bfloat16 and reduces float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy, model = MixedPrecisionPolicy(torch.bfloat16, torch.float32), model_of("llama-grouped")
    if first == "shard":
        sharded(model, mp_policy=policy)
    s2ft.attach(model, config_for("llama-grouped"))
    if first == "attach":
        sharded(model, mp_policy=policy)
    train(model, rank)
    s2ft.save_adapter(model, directory / first)


def test_mixed_precision_is_that_of_a_model_that_is_sharded_later(ranks, tmp_path):
    for first in ("shard", "attach"):
        ranks(train_in_bfloat16, tmp_path, first)
    check_same_files(tmp_path / "shard", tmp_path / "attach", exactly=True)
