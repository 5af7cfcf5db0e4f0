"""One-sided couplings: layers that share their units with no other layer are trained in place."""

import copy
import json

import pytest
import torch
from support.inside import CONFIG, describe, record_of
from support.models import LAYOUTS, inputs_of, model_of, train as fit
from support.nets import seeded
from support.pairs import pairs
from support.states import same
from support.tolerances import relative_difference
from torch import nn

import s2ft
from s2ft import Coupling, S2FTConfig

SIDES = ("inputs", "outputs")


class Net(nn.Module):
    """An FFN, and two layers that are in no coupling with it."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.down, self.last = (
            nn.Linear(*size) for size in ((12, 20), (20, 30), (30, 20), (20, 12))
        )

    def forward(self, x, labels=None):
        x = torch.tanh(self.first(x))
        x = self.last(x + self.down(torch.relu(self.up(x))))
        return {"logits": x, **({} if labels is None else {"loss": (x - labels).square().mean()})}


def net():
    return seeded(Net).eval()


def couplings(side="inputs", unit=1):
    alone = [
        Coupling.one_sided(0, path=path, count=size[side == "inputs"] // unit, unit=unit, side=side)
        for path, size in {"first": (20, 12), "last": (12, 20)}.items()
    ]
    return [*alone, Coupling.ffn(0, up="up", down="down", channels=30)]


def batch():
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(3, 5, 12, generator=generator), "labels": torch.randn(3, 5, 12, generator=generator)}


def attached(layout="permuted", side="inputs", selection="random", unit=1, **options):
    model = net()
    config = S2FTConfig(
        **{"l_ratio": 0.25, "u_ratio": 0.1, "d_ratio": 0.2, **options}, layout=layout, selection=selection
    )
    calibration = [batch()] if selection in ("activation", "product", "gradient") else None
    return model, s2ft.attach(model, config, calibration=calibration, couplings=couplings(side, unit), example=batch())


@pytest.mark.parametrize(
    ("selection", "side", "layout"), pairs(("random", "weight", "activation", "product", "gradient"), SIDES, LAYOUTS)
)
def test_the_chosen_units_are_trained_in_place(selection, side, layout):
    base, (model, report) = net(), attached(layout, side, selection)
    assert report.couplings == {"movable": 1, "one-sided": 2}
    assert not [move for move in record_of(model).moves if move.coupling.is_one_sided]
    assert not model.first.bias.requires_grad and not model.first.weight.requires_grad
    fit(model, 2, loss_of=lambda model: model(**batch())["loss"])
    assert all(parameter.any() for parameter in model.parameters() if parameter.requires_grad)
    changed = (s2ft.merge(model).first.weight != base.first.weight).any(0 if side == "inputs" else 1)
    assert int(changed.sum()) == report.rows[0].parameters // base.first.weight.shape[side == "outputs"]


def test_units_of_several_elements():
    model, report = attached(side="outputs", unit=4)
    assert [row.units for row in report.rows][:2] == ["1 of 5 groups of 4 outputs", "1 of 3 groups of 4 outputs"]
    assert model.first.s2.shape == (4, 12)
    _, report = attached(l_ratio=0.01)  # one ratio is for layers of very different sizes
    assert [row.units for row in report.rows][:2] == ["1 of 12 inputs", "1 of 20 inputs"]


@pytest.mark.parametrize("options", [dict(budget=900), dict(match_lora_rank=2), dict(allocation="global")])
def test_plan_and_estimate_count_them(options):
    model, report = attached(selection="weight" if "allocation" in options else "random", **options)
    config = record_of(model).config
    plan = s2ft.plan(net(), config, couplings=couplings())
    assert plan.trainable == report.trainable and plan.rows == report.rows and plan.couplings == report.couplings
    options = dict(optimizer="sgd", example=batch(), couplings=couplings())
    assert s2ft.estimate(net(), config, **options).trained == report.trainable


def test_inputs_of_a_file_of_units_are_trained_again(tmp_path):
    selection = s2ft.select(net(), S2FTConfig(i_ratio=0.25), couplings=couplings())
    selection.save(tmp_path / "units.json")
    for units in (selection, str(tmp_path / "units.json")):
        again = S2FTConfig(units=units)
        assert s2ft.select(net(), again, couplings=couplings()) == selection
        assert s2ft.estimate(net(), again, optimizer="sgd", example=batch(), couplings=couplings()).trained > 0


def test_two_layers_of_one_size_get_different_units():
    pair = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    alone = [Coupling.one_sided(0, path=path, count=64) for path in "01"]
    selection = s2ft.select(pair, S2FTConfig(l_ratio=0.25), couplings=alone)
    assert selection["0"].tolist() != selection["1"].tolist()


def test_status_and_adapter_file(tmp_path):
    model, _ = attached()
    rows = {row.path: row.units for row in s2ft.status(model).rows}
    assert rows["first"] == "3 of 12 inputs" and rows["down"] == "6 of 30 channels"
    s2ft.save_adapter(model, tmp_path)
    header = json.loads((tmp_path / CONFIG).read_text())
    assert header["schema"] == 1 and header["config"]["l_ratio"] == 0.25 and header["couplings"][0]["producers"] == []
    assert s2ft.read_adapter(tmp_path).couplings == couplings() and "3 inputs" in describe(tmp_path)


@pytest.mark.parametrize("side", SIDES)
def test_one_side_of_experts(side):
    """An expert stack of which only one side is known."""
    base = model_of("qwen3-moe").eval()
    inputs = inputs_of(base)
    path = "model.layers.0.mlp.experts.down_proj"
    experts, *shape = base.get_parameter(path).shape
    alone = [
        Coupling.one_sided(0, path=path, count=shape[side == "inputs"], side=side, expert=expert)
        for expert in range(experts)
    ]
    model = copy.deepcopy(base)
    report = s2ft.attach(model, S2FTConfig(l_ratio=0.25), couplings=alone, example=dict(inputs))
    assert report.rows[0].units.endswith(f"{side}, {experts} experts")
    assert relative_difference(model(**inputs).logits, base(**inputs).logits) <= 1e-5
    model(**inputs).logits.square().sum().backward()
    (trained,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    assert bool(trained.grad.any()) and same(s2ft.detach(model), base)


def test_verification_needs_no_run_of_a_one_sided_layer():
    """Nothing is claimed about it. A coupling that the example does not reach is an error."""
    model = net()
    model.unused = nn.Linear(4, 4)
    alone = Coupling.one_sided(1, path="unused", count=4)
    config = S2FTConfig(u_ratio=0.1)
    s2ft.attach(model, config, couplings=[*couplings(), alone], example=batch())
    s2ft.detach(model)
    wrong = Coupling.ffn(0, up="first", down="last", channels=20)
    with pytest.raises(ValueError, match="attach would change what the model computes"):
        s2ft.attach(model, config, couplings=[couplings()[2], alone, wrong], example=batch())
    assert not s2ft.list_adapters(model)


REFUSED = [  # what is done with a spoilt or fitting file, or a config; and key words
    (lambda header: Coupling.one_sided(0, path="last", count=20, side="rows"), "'rows'"),
    (lambda header: s2ft.select(net(), S2FTConfig(units={"last": [20]}), couplings=couplings()), "20 inputs"),
    (lambda header: s2ft.plan(net(), S2FTConfig(d_ratio=0.1), couplings=couplings()[:2]), "set l_ratio"),
    (lambda header: header["couplings"][0].update(consumer=None), "exactly one projection"),
    (lambda header: header["couplings"][0]["consumer"].update(key="d"), "got 'd'"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_is_refused(change, words, tmp_path):
    s2ft.save_adapter(attached()[0], tmp_path)
    header = json.loads((tmp_path / CONFIG).read_text())
    with pytest.raises(ValueError, match=words):
        change(header)
        (tmp_path / CONFIG).write_text(json.dumps(header))
        s2ft.read_adapter(tmp_path)
