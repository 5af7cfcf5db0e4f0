"""`exclude`: units that must not be selected. `units`: a selection by hand."""

import pytest
import torch
from support.inside import METRICS, record_of
from support.models import ALL_RATIOS, fit, model_of
from support.states import with_adapter

import s2ft
from s2ft import S2FTConfig

DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("allocation", ("uniform", "global"))
@pytest.mark.parametrize("metric", METRICS)
def test_a_second_selection_excludes_the_first(metric, allocation):
    model = model_of("llama")
    data = [torch.arange(16).view(2, 8)] if METRICS[metric].calibrated else None
    options = dict(**ALL_RATIOS, selection=metric, allocation=allocation)
    options["v_ratio"] = 0.5
    first = s2ft.select(model, S2FTConfig(**options), data)
    second = s2ft.select(model, S2FTConfig(**options, exclude=first), data)
    for path, units in second.units.items():
        assert not set(first.units.get(path, torch.tensor([])).tolist()) & set(units.tolist()), path
    assert sum(map(len, second.units.values())) == sum(map(len, first.units.values()))
    for i in range(3):  # the producers are still nested
        up, gate = (
            set(second.units.get(f"model.layers.{i}.mlp.{name}_proj", torch.tensor([])).tolist())
            for name in ("up", "gate")
        )
        assert up >= gate


def test_excluding_an_adapter(tmp_path):
    model = fit(with_adapter(model_of("llama"), S2FTConfig(**ALL_RATIOS)))
    first = record_of(model).selection
    s2ft.save_adapter(model, tmp_path / "first")
    s2ft.detach(model)
    first.save(tmp_path / "first.json")
    chosen = []
    for where in (tmp_path / "first", str(tmp_path / "first.json"), first, first.units, first.to_dict()):
        config = S2FTConfig(d_ratio=0.15, u_ratio=0.2, exclude=where)
        chosen.append(s2ft.select(model, config))
        assert not set(first[DOWN].tolist()) & set(chosen[-1][DOWN].tolist())
    assert all(selection == chosen[0] for selection in chosen)
    s2ft.attach(model, config)
    s2ft.save_adapter(model, tmp_path / "second")
    assert s2ft.read_adapter(tmp_path / "second").config == config
