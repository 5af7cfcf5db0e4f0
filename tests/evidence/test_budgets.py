"""The search for a division of the budget: what moves do, what is trained, and that it finds a known best division."""

import json
import math

import pytest
import torch
from support.models import model_of
from train.tiny import save_tiny, tiny_model, tiny_tokenizer

import s2ft
from bench.evidence import budgets
from bench.evidence.budgets import Search, _config, _limits, _moved, search, short_run, table
from s2ft.model.coupling import projections_of
from s2ft.model.registry import couplings_of
from s2ft.train.arguments import SFTArguments
from s2ft.train.demo import problem_set, token_rows

BUDGET = 4000


def loss_of_shares(model, best):
    """A run whose loss is the distance of the trained shares from given ones."""

    def run(config):
        projections = {p.name: p for p in projections_of(couplings_of(model))}
        trained = dict.fromkeys(best, 0)
        for name, units in s2ft.select(model, config).units.items():
            p = projections[name]
            trained[p.key] = trained.get(p.key, 0) + units.numel() * budgets.unit_parameters(model, p)
        total = sum(trained.values())
        assert total <= config.budget
        seen.append(total)
        return sum(abs(trained[key] / total - best.get(key, 0.0)) for key in trained), 1.0

    seen = []
    run.seen = seen
    return run


def test_the_search_finds_a_known_division():
    model = tiny_model()
    best = {"d": 0.5, "u": 0.25, "g": 0.25}
    run = loss_of_shares(model, best)
    found = search(model, run, BUDGET, runs=40, checks=1)
    assert found.divisions[0].shares == {"d": 1.0} and found.divisions[0].loss == pytest.approx(1.0)
    assert found.best.loss < 0.15 and found.best.loss == min(one.loss for one in found.divisions)
    assert len({tuple(one.shares.items()) for one in found.divisions}) == len(found.divisions) <= 40
    assert [one.seed for one in (*found.checks_of_first, *found.checks_of_best)] == [1, 1]
    assert found.checks_of_first[0].shares == {"d": 1.0}
    fall, deviation = found.gain()
    assert fall == pytest.approx(found.divisions[0].loss - found.best.loss, abs=0.02) and deviation < 0.02
    assert min(run.seen) > 0.95 * BUDGET  # all divisions train equally many parameters


def test_the_ratios_of_a_division_give_its_units():
    model = tiny_model()
    found = search(model, loss_of_shares(model, {"d": 0.4, "o": 0.6}), BUDGET, runs=20, checks=0)
    assert set(found.best.ratios) == {"d_ratio", "o_ratio"} and math.isnan(found.gain()[1])
    planned = s2ft.plan(model, s2ft.S2FTConfig(**found.best.ratios)).trainable
    assert abs(planned - found.best.trained) <= 32 * 2  # ratios are the same in each layer, a budget's units may not be


def test_it_stops_after_its_runs():
    model = tiny_model()
    run = loss_of_shares(model, {"k": 1.0})
    assert len(search(model, run, BUDGET, runs=3, checks=2).divisions) == 3 and len(run.seen) == 3 + 4


def test_moves_keep_whole_units_and_sums():
    limits = {"d": (0.01, 2.0), "o": (0.3, 1.5), "k": (0.3, 0.4)}
    only = (("d", 1.0),)
    assert _moved(only, "o", 0.125, limits) == (("d", 0.7), ("o", 0.3))  # one head in every layer is more than the step
    assert _moved(only, "d", 0.25, limits) is None and _moved(only, "o", -0.25, limits) is None
    assert _moved((("d", 0.7), ("o", 0.3)), "o", -0.125, limits) == only
    assert _moved((("d", 0.7), ("o", 0.3)), "d", 0.125, limits) == only  # no head would be left
    assert _moved((("d", 0.6), ("k", 0.4)), "k", 0.25, limits) is None  # it has no more heads
    assert _moved((("d", 0.7), ("o", 0.3)), "d", -0.25, limits) == (("d", 0.45), ("o", 0.55))
    assert _moved((("o", 1.0),), "d", 0.99999, limits) == only


def test_what_does_not_fit_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="budget=10 does not fit"):
        search(model, loss_of_shares(model, {}), 10)
    with pytest.raises(ValueError, match="runs must be at least 2"):
        search(model, loss_of_shares(model, {}), BUDGET, runs=1)
    assert set(_limits(model, 70)) == {"d", "u", "g"}  # a head in each of two layers has 8 * 32 * 2 weights
    assert _config(model, (("d", 0.5), ("o", 0.5)), BUDGET, 3).budget == BUDGET


def test_projections_in_one_weight_count_apart():
    model = model_of("phi3-grouped")
    limits = _limits(model, 20_000)
    assert set(limits) == {"d", "o", "u", "v", "g", "q", "k"} and limits["q"][1] > limits["k"][1]


def test_a_short_run_measures_the_held_out_loss_and_leaves_the_base(tmp_path):
    from s2ft.text.divergence import mean_loss

    model, tokenizer = tiny_model(), tiny_tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = token_rows(tokenizer, problem_set(8, False, 0))
    arguments = SFTArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=0
    )
    run = short_run(model, tokenizer, rows.select(range(6)), rows.select(range(6, 8)), arguments)
    config = s2ft.S2FTConfig(d_ratio=1.0, budget=BUDGET)
    loss, seconds = run(config)
    assert run(config)[0] == loss < mean_loss(model, rows.select(range(6, 8))) and seconds > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_command_prints_the_table_and_writes_the_runs(tmp_path, capsys):
    save_tiny(tmp_path / "model")
    budgets.main(
        ["--model", str(tmp_path / "model"), "--dtype", "float32", "--budget", "4K", "--steps", "2", "--batch", "2"]
        + ["--held-out", "2", "--runs", "3", "--checks", "1", "--output", str(tmp_path / "found.json")]
    )
    printed = capsys.readouterr().out
    assert "held-out loss" in printed and "first" in printed and "best: " in printed and "2 seeds" in printed
    written = json.loads((tmp_path / "found.json").read_text())
    assert len(written["divisions"]) == 3 and written["best"] in written["divisions"] and written["budget"] == "4K"


def test_the_table_shows_losing_divisions_too():
    model = tiny_model()
    found = search(model, loss_of_shares(model, {"d": 0.5, "u": 0.5}), BUDGET, runs=6, checks=0)
    assert isinstance(found, Search) and len(table(found).splitlines()) == 1 + 6 + 2
