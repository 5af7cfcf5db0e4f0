"""The suggested learning rate, against the rates that are known to have been good."""

import pytest
import torch
from support.inside import rates, record_of
from support.models import model_of
from support.states import with_adapter, with_loaded
from torch import nn

import s2ft

TABLES = [line.split("|")[1:-1] for line in rates.__doc__.splitlines() if line.startswith("| ")]
ROWS, OF_FILES = ([cells for cells in TABLES if len(cells) == columns][1:] for columns in (8, 6))


@pytest.mark.parametrize(
    "width, share, size, task, good, rule", ([cell.strip(" ?") for cell in row[1:7]] for row in ROWS)
)
def test_each_known_rate_is_near_the_rule(width, share, size, task, good, rule):
    found = rates.rate_by_rule(int(width), float(share), float(size), 16 if "16 updates" in task else 32)
    assert found == float(rule) and all(0.1 <= found / float(one) <= 10 for one in good.split(" to "))


def test_a_wider_model_a_larger_slice_or_smaller_weights_get_a_lower_rate():
    assert [rates.rate_by_rule(width, 0.02, 0.02) for width in (64, 576, 4096)] == [6e-4, 2e-4, 7e-5]
    assert [rates.rate_by_rule(576, share, 0.19) for share in (0.001, 0.02, 0.5)] == [1e-2, 2e-3, 8e-5]
    assert [rates.rate_by_rule(576, 0.02, size) for size in (0.2, 0.02)] == [2e-3, 2e-4]


def test_a_short_run_gets_up_to_twice_the_rate():
    found = [rates.rate_by_rule(576, 0.075, 0.19, updates) for updates in (1, 16, 24, 32, 10_000)]
    assert found == [1e-3, 1e-3, 7e-4, 5e-4, 5e-4]


@pytest.mark.parametrize("layout", ("permuted", "indexed"))
def test_the_rate_of_an_adapter_follows_from_its_share_and_the_size_of_its_weights(layout):
    model = with_adapter(model_of("llama"), s2ft.S2FTConfig(d_ratio=0.5, q_ratio=0.5, layout=layout))
    record = record_of(model)
    weights = [model.get_submodule(one.path).weight for one in record.projections.values()]
    trained = [model.get_submodule(record.projections[name].path).weight for name in record.selection.units]
    share = sum(p.numel() for p in model.parameters() if p.requires_grad) / sum(one.numel() for one in weights)
    size = torch.stack([one.double().square().mean().sqrt() for one in trained]).quantile(0.5)
    assert s2ft.suggested_rate(model, 32) == rates.rate_by_rule(model.config.hidden_size, share, float(size))
    with torch.no_grad():
        list(map(torch.Tensor.zero_, trained))
    assert s2ft.suggested_rate(model, 32) > 0


def test_a_loop_of_ones_own_asks_for_the_rate_of_a_trainable_adapter():
    model = model_of("llama")
    with pytest.raises(ValueError, match="call s2ft.attach"):
        s2ft.suggested_rate(model)
    adapter = s2ft.get_adapter(with_adapter(model, s2ft.S2FTConfig(d_ratio=0.5), "math"), "math")
    assert s2ft.suggested_rate(model, 16) > s2ft.suggested_rate(model)
    assert s2ft.suggested_rate(torch.compile(model)) == s2ft.suggested_rate(model)
    with pytest.raises(ValueError, match="updates must be a whole number of at least 1, got 0"):
        s2ft.suggested_rate(model, 0)
    with pytest.raises(ValueError, match="no adapter of math is trainable"):
        s2ft.suggested_rate(with_loaded(s2ft.detach(model), adapter))


def test_a_model_without_a_config_gets_a_rate():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    mlp = s2ft.Coupling.ffn(0, up="0", down="2", channels=16)
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.5), couplings=[mlp], example=torch.randn(2, 8))
    assert s2ft.suggested_rate(model) > 0


def test_a_model_whose_config_names_no_width_gets_a_rate():
    model = with_adapter(model_of("llama"), s2ft.S2FTConfig(d_ratio=0.5))
    del model.config.hidden_size
    assert s2ft.suggested_rate(model, 32) > 0


@pytest.mark.parametrize("share, updates, rate, halves, found, source", OF_FILES)
def test_a_file_learns_with_the_rate_of_the_rule_or_a_higher_one(share, updates, rate, halves, found, source):
    half_step, has_learned = 0.026, "right" in found or "without rounding" in found
    assert float(rate) * int(updates) / 2 / half_step == pytest.approx(float(halves), abs=0.1)
    assert (float(rate) >= rates.rate_for_file(half_step, int(updates))) == has_learned
