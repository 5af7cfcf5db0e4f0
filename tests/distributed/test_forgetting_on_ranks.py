"""The meter on two ranks: the values of one process, one decision, and the kept values; protected units on shards."""

from unittest import mock

import pytest
import torch
from runs import attached, sharded, train
from support.inside import DriftMeter, ForgettingMeter, Reference, gather_trained
from support.models import model_of
from support.states import same
from test_trainer import run_trainer, trainer

import s2ft

CONSTANT = dict(lr_scheduler_type="constant")  # so that a shorter run has the same rates


def rows_of_meter():
    generator = torch.Generator().manual_seed(8)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(67, (3, 9), generator=generator).tolist()]


def measured_and_stopped(rank, way, folder):
    """Train to the end, and again with a limit between the second and the third step.

    Returns the values by step, the steps of the stop, and whether the values of the second step are kept.
    """
    meter = ForgettingMeter(other=rows_of_meter(), prompts=rows_of_meter(), every=1)
    run = trainer(way, attached("llama-grouped"), f"{folder}/whole", save_strategy="no", **CONSTANT)
    meter.add_to(run)
    run.train()
    second, third = (meter.measured[step].base_kl for step in (2, 3))
    limited = ForgettingMeter(prompts=rows_of_meter(), every=1, stop_at_kl=(second + third) / 2)
    run = trainer(way, attached("llama-grouped"), f"{folder}/limited", save_strategy="no", **CONSTANT)
    limited.add_to(run)
    run.train()
    kept = gather_trained(run.accelerator.unwrap_model(run.model))
    short = run_trainer(way, attached("llama-grouped"), f"{folder}/short", save_strategy="no", max_steps=2, **CONSTANT)
    expected = gather_trained(short.accelerator.unwrap_model(short.model))
    drifts = {step: drift.to_dict() for step, drift in meter.measured.items()}
    return drifts, (limited.stopped_at, limited.kept_step), same(kept, expected)


@pytest.mark.parametrize("way", ("ddp", pytest.param("fsdp", marks=pytest.mark.slow)))
def test_ranks_measure_the_same_and_stop_together(ranks, way, tmp_path):
    first, second = ranks(measured_and_stopped, way, str(tmp_path))
    assert first == second
    drifts, steps, is_kept = first
    assert sorted(drifts) == [1, 2, 3, 4] and steps == (3, 2) and is_kept
    model = attached("llama-grouped")
    meter = DriftMeter(model, other=rows_of_meter(), prompts=rows_of_meter())
    assert meter.measure(model).to_dict().keys() == drifts[1].keys()
    assert 0 < drifts[1]["base_kl"] < drifts[4]["base_kl"]


def of_the_base(rank):
    """The logits of the base, and those of the reference of a sharded model that also trains a head in full."""
    model, ids = attached("llama-grouped", modules_to_save=["lm_head"]), torch.arange(16).view(2, 8)
    train(sharded(model), rank)
    with torch.no_grad():
        trained = model(ids).logits
        reference = Reference(model)(input_ids=ids).logits
        assert torch.equal(model(ids).logits, trained) and not torch.allclose(trained, reference, atol=1e-3)
        torch.testing.assert_close(reference, model_of("llama-grouped")(ids).logits)
    return True


def test_the_reference_of_a_sharded_model_has_the_bases_head(ranks):
    assert ranks(of_the_base) == [True, True]


def uploaded_and_saved_alone(rank, folder):
    """The address that each rank gets, and a save to a disk of its own."""
    api, model = mock.MagicMock(), sharded(attached("llama-grouped"))
    api.return_value.create_repo.return_value.repo_id = "me/x"
    api.return_value.create_commit.return_value.commit_url = "address"
    with mock.patch("huggingface_hub.HfApi", api):
        address = s2ft.push_to_hub(model, "me/x")
    model.save_pretrained(f"{folder}/{rank}")
    return address, api.return_value.create_commit.call_count


def test_one_rank_uploads_and_disks_need_not_be_shared(ranks, tmp_path):
    assert ranks(uploaded_and_saved_alone, str(tmp_path)) == [("address", 1), ("", 0)]
    assert s2ft.read_adapter(tmp_path / "0").parameters and not (tmp_path / "1" / "s2ft_config.json").exists()


def protected_on_shards(rank):
    config = s2ft.S2FTConfig(d_ratio=0.1, o_ratio=0.25, selection="weight")
    data = [torch.arange(16).view(2, 8)]
    expected = s2ft.select(model_of("llama-grouped"), config, protect=data)
    return s2ft.select(sharded(model_of("llama-grouped")), config, protect=data) == expected


def test_a_sharded_model_protects_the_same_units(ranks):
    assert ranks(protected_on_shards) == [True, True]
