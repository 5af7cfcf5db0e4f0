"""`protect`: units that the base needs on other data are never chosen, and what is left decides as before."""

import itertools

import pytest
import torch
from selection.test_metrics import batch_of
from support.inside import METRICS, Calibration, Request, couplings_of, record_of, shared_by_producers
from support.models import ALL_RATIOS, model_of, ratios_for
from support.pairs import in_turn

import s2ft
from s2ft import S2FTConfig

RATIOS = {**ALL_RATIOS, "q_ratio": 0.25, "k_ratio": 0.0, "v_ratio": 0.25, "o_ratio": 0.25}
CASES = ("llama", "llama-grouped", "phi3-grouped", "gpt2", "mixtral", "deepseek-v3")


def data_of(model, seed=5):
    ids = torch.randint(3, model.config.vocab_size, (3, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def needed(model, ratio, ratios):
    """The protected units of each projection, by the scores of the metric and a sort of lists."""
    calibration = Calibration(data_of(model), torch.device("cpu"))
    request = Request(couplings_of(model), S2FTConfig(**ratios), model, calibration)
    found = {}
    for name, values in shared_by_producers(request, METRICS["product"].score(request)).items():
        order = sorted(range(len(values)), key=lambda unit, values=values: -float(values[unit]))
        found[name] = set(order[: int(ratio * len(values))])
    return found


CHOICES = tuple(itertools.product(METRICS, ("uniform", "global"), ("smallest", "largest")))


@pytest.mark.parametrize("case, choice", in_turn(CASES, CHOICES), ids=str)
def test_protected_units_are_never_chosen(case, choice):
    metric, allocation, order = choice
    if metric == "random":
        allocation, order = "uniform", "largest"
    model = model_of(case)
    config = S2FTConfig(**ratios_for(case, RATIOS), selection=metric, allocation=allocation, order=order)
    calibration = [batch_of(model)] if METRICS[metric].calibrated else None
    try:
        free = s2ft.select(model, config, calibration)
        chosen = s2ft.select(model, config, calibration, protect=data_of(model))
    except ValueError as error:  # a projection with two heads or fewer has no half to give
        assert "leave" in str(error) or "selects none" in str(error)
        config = S2FTConfig(d_ratio=0.1, selection=metric, allocation=allocation, order=order)
        free = s2ft.select(model, config, calibration)
        chosen = s2ft.select(model, config, calibration, protect=data_of(model))
    protected = needed(model, 0.5, {f"{key}_ratio": value for key, value in config.ratios.items()})
    assert [name for name, units in chosen.units.items() if protected[name] & set(units.tolist())] == []
    assert sum(map(len, chosen.units.values())) == sum(map(len, free.units.values()))


def test_attach_writes_the_share_into_the_adapter_and_nothing_without_protect(tmp_path):
    model = model_of("llama")
    s2ft.attach(model, S2FTConfig(d_ratio=0.1), protect=data_of(model))
    assert record_of(model).config.protect_ratio == 0.5
    expected = record_of(model).selection
    s2ft.save_adapter(model, tmp_path / "adapter")
    s2ft.detach(model)
    assert s2ft.read_adapter(tmp_path / "adapter").config.protect_ratio == 0.5
    s2ft.load_adapter(model, tmp_path / "adapter", trainable=True)
    assert record_of(model).selection == expected and S2FTConfig(d_ratio=0.1).to_dict()["protect_ratio"] is None
