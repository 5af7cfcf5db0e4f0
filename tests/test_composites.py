"""Multimodal models have the couplings of their parts: each one is confirmed by an input that reaches all towers."""

import pytest
from support.composites import composite_of, example_for, logits_of, loss_of
from support.inside import FAMILIES, composite, copied, couplings_of, is_known, projections_of, tower_of
from support.pairs import rest_slow
from support.slices import slices
from support.tolerances import relative_difference

import s2ft
from s2ft import S2FTConfig


def everything(model):
    """A config that trains a part of every projection, in all towers that have couplings."""
    couplings = couplings_of(model)
    ratios = {f"{projection.key}_ratio": 0.5 for projection in projections_of(couplings)}
    return S2FTConfig(**ratios, towers=sorted({tower_of(model, coupling.main.path) for coupling in couplings}))


@pytest.mark.parametrize(
    "model_type", rest_slow(composite.PROJECTORS, ("gemma4", "idefics2", "llava_next", "qwen2_audio", "qwen3_vl"))
)
def test_every_coupling_is_confirmed_and_every_slice_gets_a_gradient(model_type):
    model = composite_of(model_type)
    assert is_known(model)
    example = example_for(model)
    example = {name: value.double() if value.is_floating_point() else value for name, value in example.items()}
    model = copied(model)  # in float64, because Qwen3.5's linear attention amplifies the rounding of float32
    before = logits_of(model, example)
    s2ft.attach(model, everything(model), example=example, verify=True)
    assert relative_difference(logits_of(model, example), before) <= 1e-9
    loss_of(model, example).backward()
    assert [name for name, one in slices(model).items() if one.grad is None or not one.grad.any()] == []


@pytest.mark.parametrize(
    "name, chosen, end",
    [
        ("vision_feature_layer", -1, None),
        ("vision_feature_layer", -2, -1),
        ("vision_feature_layer", [0, 1], 1),
        ("vision_feature_layers", -2, -1),  # the older name, VipLLaVA's in transformers 5.0
    ],
    ids=str,
)
def test_layers_after_the_last_that_is_used_are_left_out(name, chosen, end):
    model = composite_of("llava_next")
    model.config.__dict__.pop("vision_feature_layer")
    setattr(model.config, name, chosen)
    used = {
        c.main.path.split(".layers.")[1].split(".")[0] for c in couplings_of(model) if "vision_tower" in c.main.path
    }
    assert used == {str(layer) for layer in range(model.config.vision_config.num_hidden_layers)[:end]}


def test_layers_are_counted_through_the_language_model_then_the_tower_then_the_projector():
    found = couplings_of(composite_of("qwen3_vl"))
    order = {}
    for coupling in found:
        order.setdefault(coupling.layer, set()).add(".".join(coupling.main.path.split(".")[:3]))
    assert sorted(order) == list(range(len(order)))
    parts = [next(iter(paths)).split(".")[1] for _, paths in sorted(order.items())]
    assert parts == sorted(parts) and all(len(paths) == 1 for paths in order.values())


def test_a_part_without_a_declaration_leaves_the_whole_model_to_discovery(monkeypatch):
    model = composite_of("llava_next")
    monkeypatch.delitem(FAMILIES, "clip_vision_model")
    assert not is_known(model)


def test_the_base_model_has_the_same_couplings_as_the_one_with_a_head():
    model = composite_of("llava_next")
    assert [str(c).replace("model.", "") for c in couplings_of(model.model)] == [
        str(c).replace("model.", "") for c in couplings_of(model)
    ]


@pytest.mark.parametrize("older", ["", "qwen3_vl"], ids=["none", "that of the whole"])
def test_a_vision_tower_whose_config_has_no_type_of_its_own_is_found(older):
    """Older releases of transformers have such configs."""
    model = composite_of("qwen3_vl")
    expected = couplings_of(model)
    model.model.visual.config.model_type = older
    assert couplings_of(model) == expected and any("visual" in coupling.main.path for coupling in expected)
