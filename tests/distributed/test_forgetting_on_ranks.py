"""The meter on two ranks: the values of one process, one decision, and the kept values; protected units on shards."""

import pytest
import torch
from runs import attached, sharded
from support.inside import DriftMeter, ForgettingMeter, gather_trained
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


def protected_on_shards(rank):
    config = s2ft.S2FTConfig(d_ratio=0.1, o_ratio=0.25, selection="weight")
    data = [torch.arange(16).view(2, 8)]
    expected = s2ft.select(model_of("llama-grouped"), config, protect=data)
    return s2ft.select(sharded(model_of("llama-grouped")), config, protect=data) == expected


def test_a_sharded_model_protects_the_same_units(ranks):
    assert ranks(protected_on_shards) == [True, True]
