"""One-sided couplings: layers that share their units with no other layer are trained in place."""

import copy
import json

import pytest
import torch
from support.models import inputs_of, model_of
from support.tolerances import relative_difference
from torch import nn

import s2ft
from s2ft import Coupling, S2FTConfig
from s2ft.adapter.formats.native import CONFIG
from s2ft.attached.record import attachment_of
from s2ft.cli.info import describe
from s2ft.model.coupling import Projection, projections_of

LAYOUTS = ("permuted", "indexed")
SIDES = ("inputs", "outputs")
SELECTIONS = ("random", "weight", "activation", "product", "gradient")


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
    torch.manual_seed(0)
    return Net()


def couplings(side="inputs", unit=1):
    sizes = {"first": (20, 12), "last": (12, 20)}
    alone = [
        Coupling.one_sided(0, path=path, count=size[side == "inputs"] // unit, unit=unit, side=side)
        for path, size in sizes.items()
    ]
    return [*alone, Coupling.ffn(0, up="up", down="down", channels=30)]


def batch():
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(3, 5, 12, generator=generator), "labels": torch.randn(3, 5, 12, generator=generator)}


def train(model, steps=2):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(steps):
        model(**batch())["loss"].backward()
        assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()


def states_equal(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def attached(layout="permuted", side="inputs", selection="random", unit=1, **options):
    model = net()
    config = S2FTConfig(
        **{"l_ratio": 0.25, "u_ratio": 0.1, "d_ratio": 0.2, **options}, layout=layout, selection=selection
    )
    calibration = [batch()] if selection in ("activation", "product", "gradient") else None
    report = s2ft.attach(model, config, calibration=calibration, couplings=couplings(side, unit), example=batch())
    return model, report


CASES = [(layout, side, selection) for layout in LAYOUTS for side in SIDES for selection in SELECTIONS[::2]] + [
    ("permuted", "inputs", "weight"),
    ("indexed", "outputs", "product"),
]


@pytest.mark.parametrize(("layout", "side", "selection"), CASES)
def test_one_sided_couplings_all_the_way(layout, side, selection, tmp_path):
    base, (model, report) = net(), attached(layout, side, selection)
    assert report.couplings == {"movable": 1, "one-sided": 2}
    assert relative_difference(model(**batch())["logits"], base(**batch())["logits"]) <= 1e-6
    assert (
        model.first.index is not None or model.first.end - model.first.start == model.first.s2.shape[side == "inputs"]
    )
    assert not [move for move in attachment_of(model).moves if move.coupling.is_one_sided]
    assert not model.first.bias.requires_grad and not model.first.weight.requires_grad
    train(model)
    s2ft.save_adapter(model, tmp_path)
    logits = model(**batch())["logits"]
    assert states_equal(s2ft.detach(copy.deepcopy(model)), base)
    merged = s2ft.merge(model)
    assert relative_difference(merged(**batch())["logits"], logits) <= 1e-6
    changed = (merged.first.weight != base.first.weight).any(0 if side == "inputs" else 1)
    assert int(changed.sum()) == report.rows[0].parameters // base.first.weight.shape[side == "outputs"]
    for trainable in (False, True):
        loaded = net()
        s2ft.load_adapter(loaded, tmp_path, trainable=trainable)
        s2ft.set_adapter(loaded, None)
        assert torch.equal(loaded(**batch())["logits"], base(**batch())["logits"]) or trainable
        s2ft.set_adapter(loaded, "default")
        assert states_equal(s2ft.merge(loaded), merged)


def test_units_of_several_elements():
    model, report = attached(side="outputs", unit=4)
    assert [row.units for row in report.rows][:2] == ["1 of 5 groups of 4 outputs", "1 of 3 groups of 4 outputs"]
    assert model.first.s2.shape == (4, 12)


def test_every_layer_gets_a_unit():
    """One ratio is for layers of very different sizes."""
    _, report = attached(l_ratio=0.01)
    assert [row.units for row in report.rows][:2] == ["1 of 12 inputs", "1 of 20 inputs"]


@pytest.mark.parametrize("options", [dict(budget=900), dict(match_lora_rank=2), dict(allocation="global")])
def test_budgets_and_allocations(options):
    selection = "weight" if "allocation" in options else "random"
    model, report = attached(selection=selection, **options)
    plan = s2ft.plan(net(), attachment_of(model).config, couplings=couplings())
    assert plan.trainable == report.trainable and plan.rows == report.rows and plan.couplings == report.couplings


def test_excluded_and_named_units():
    chosen = s2ft.select(net(), S2FTConfig(l_ratio=0.25), couplings=couplings())
    others = s2ft.select(net(), S2FTConfig(l_ratio=0.25, exclude=chosen.to_dict()), couplings=couplings())
    assert not set(chosen["last"].tolist()) & set(others["last"].tolist())
    named = s2ft.select(net(), S2FTConfig(units={"last": [3, 7]}), couplings=couplings())
    assert named["last"].tolist() == [3, 7]
    with pytest.raises(ValueError, match="last has 20 inputs, from 0; there is no 20"):
        s2ft.select(net(), S2FTConfig(units={"last": [20]}), couplings=couplings())


def test_two_layers_of_one_size_get_different_units():
    pair = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    alone = [Coupling.one_sided(0, path=path, count=64) for path in "01"]
    selection = s2ft.select(pair, S2FTConfig(l_ratio=0.25), couplings=alone)
    assert selection["0"].tolist() != selection["1"].tolist()


def test_the_ratio_of_another_projection_names_what_there_is():
    alone = couplings()[:2]
    with pytest.raises(ValueError, match="d_ratio requests a projection .*: it has l, so set l_ratio"):
        s2ft.attach(net(), S2FTConfig(d_ratio=0.1), couplings=alone, verify=False)
    assert s2ft.attach(net(), S2FTConfig(l_ratio=0.1), couplings=alone, example=batch()).trainable == 12 * 2 + 20


def trained(**options):
    model, _ = attached(**options)
    train(model)
    adapter = s2ft.get_adapter(model, "default")
    return s2ft.detach(model), adapter


@pytest.mark.parametrize("side", SIDES)
def test_switching_and_combining(side):
    base, adapter = trained(side=side)
    plain = copy.deepcopy(base)
    for name, part in (("a", adapter), ("b", adapter), ("half", 0.5 * adapter)):
        s2ft.load_adapter(base, part, name, active=False)
    s2ft.set_adapter(base, "a")
    once = base.last.weight - plain.last.weight
    s2ft.set_adapter(base, {"a": 1.0, "b": 1.0})
    assert torch.allclose(base.last.weight - plain.last.weight, 2 * once, atol=1e-6)
    assert s2ft.combine_adapters(base, {"a": 1.0, "half": 1.0}, "more").share == 1
    s2ft.set_adapter(base, "more")
    assert torch.allclose(base.last.weight - plain.last.weight, 1.5 * once, atol=1e-6)
    s2ft.set_adapter(base, None)
    assert torch.equal(base.last.weight, plain.last.weight) and torch.equal(base.first.weight, plain.first.weight)


@pytest.mark.parametrize("side", SIDES)
def test_a_lora_has_the_same_slices(side, tmp_path):
    base, adapter = trained(side=side)
    s2ft.load_adapter(base, adapter)
    s2ft.export_lora(base, tmp_path)
    other = net()
    s2ft.import_lora(other, tmp_path, "math", couplings=couplings(side))
    assert torch.equal(s2ft.merge(other).last.weight, s2ft.merge(base).last.weight)


def test_a_bank_runs_them(tmp_path):
    base, adapter = trained()
    model = copy.deepcopy(base)
    s2ft.load_adapter(model, adapter)
    s2ft.save_adapter(model, tmp_path / "math")
    bank = s2ft.AdapterBank(base, tmp_path)
    plain, x = net(), batch()["x"]
    with bank.batch(["math", None, "math"]):
        logits = bank.model(x)["logits"]
    expected = model(x)["logits"]
    expected[1] = plain(x)["logits"][1]
    assert relative_difference(logits, expected) <= 1e-5


def test_the_estimate_counts_them():
    options = dict(optimizer="sgd", example=batch(), couplings=couplings())
    estimate = s2ft.estimate(net(), S2FTConfig(l_ratio=0.25), **options)
    assert estimate.trained == attached(u_ratio=0.0, d_ratio=0.0)[1].trainable


def test_status_and_adapter_file(tmp_path):
    model, _ = attached()
    rows = {row.path: row.units for row in s2ft.status(model).rows}
    assert rows["first"] == "3 of 12 inputs" and rows["down"] == "6 of 30 channels"
    s2ft.save_adapter(model, tmp_path)
    header = json.loads((tmp_path / CONFIG).read_text())
    assert header["schema"] == 1 and header["config"]["l_ratio"] == 0.25 and header["couplings"][0]["producers"] == []
    assert s2ft.read_adapter(tmp_path).couplings == couplings()
    assert "3 inputs" in describe(tmp_path)


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
    assert bool(trained.grad.any())
    assert states_equal(s2ft.detach(model), base)


def test_verification_needs_no_run_of_a_one_sided_layer():
    """Nothing is claimed about it. A coupling that the example does not reach is an error."""
    model = net()
    model.unused = nn.Linear(4, 4)
    alone = Coupling.one_sided(1, path="unused", count=4)
    config = S2FTConfig(u_ratio=0.1)
    s2ft.attach(model, config, couplings=[*couplings(), alone], example=batch())
    s2ft.detach(model)
    wrong = Coupling.ffn(0, up="first", down="last", channels=20)
    with pytest.raises(ValueError, match="not a coupling of this model"):
        s2ft.attach(model, config, couplings=[couplings()[2], alone, wrong], example=batch())
    assert not s2ft.list_adapters(model)


def test_a_side_that_is_neither_is_refused():
    with pytest.raises(ValueError, match="side must be 'inputs' or 'outputs', got 'rows'"):
        Coupling.one_sided(0, path="last", count=20, side="rows")


def test_one_sided_couplings_keep_their_fields():
    for coupling in couplings()[:2] + couplings("outputs", 4)[:2]:
        assert Coupling.from_dict(json.loads(json.dumps(coupling.to_dict()))) == coupling
        assert coupling.is_one_sided and not coupling.movable and coupling.expert is None
        assert list(projections_of([coupling])) == [coupling.main] and coupling.count == coupling.main.count
    assert str(couplings("outputs")[1]) == "the linear coupling of layer 0 (outputs of last)"
    assert Projection("l", "last", 5, 4, 1).elements(torch.tensor([1])).tolist() == [4, 5, 6, 7]


def nothing(header):
    header["couplings"][0]["consumer"] = None


def another_key(header):
    header["couplings"][0]["consumer"]["key"] = "d"


SPOILT = {
    "neither side": (nothing, "exactly one projection; got 0 producers"),
    "key of another side": (another_key, "must be one of l in a one-sided coupling, got 'd'"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_spoilt_files_are_refused(spoilt, tmp_path):
    change, message = SPOILT[spoilt]
    model, _ = attached()
    s2ft.save_adapter(model, tmp_path)
    header = json.loads((tmp_path / CONFIG).read_text())
    change(header)
    (tmp_path / CONFIG).write_text(json.dumps(header))
    with pytest.raises(ValueError, match=message):
        s2ft.read_adapter(tmp_path)


def test_configs_without_the_new_options_are_saved_as_before():
    values = S2FTConfig(d_ratio=0.1).to_dict()
    assert not {"l_ratio", "towers", "modules_to_save"} & values.keys() and S2FTConfig(**values).l_ratio == 0
    assert S2FTConfig(l_ratio=0.5, towers=["vision"]).to_dict()["towers"] == ["vision"]
