"""State dicts, files and casts of attached models contain the weights of the base."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.inside import TENSORS
from support.models import ALL_RATIOS, LAYOUTS, fit, model_of, output_of, ratios_for
from support.pairs import in_turn
from support.states import same, saved_adapter, with_adapter, with_loaded
from torch.nn.utils import prune, weight_norm

import s2ft
from s2ft import S2FTConfig

CASES = ("llama-grouped", "gpt2", "phi3", "mixtral")
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def trained(case, layout="permuted"):
    return fit(with_adapter(model_of(case), S2FTConfig(**ratios_for(case, ALL_RATIOS), layout=layout)))


@pytest.mark.parametrize("case, layout", in_turn(CASES, LAYOUTS))
def test_a_state_loads_into_a_plain_model_as_the_base(case, layout):
    base, model = model_of(case), trained(case, layout)
    plain = model_of(case)
    for parameter in plain.parameters():
        parameter.data.zero_()
    assert plain.load_state_dict(model.state_dict(), strict=False).missing_keys == []
    assert same(plain.state_dict(), base.state_dict())


@pytest.mark.parametrize("case, layout", in_turn(CASES, LAYOUTS))
def test_the_bases_own_state_changes_nothing(case, layout):
    base, model = model_of(case), trained(case, layout)
    before = output_of(model)
    model.load_state_dict(base.state_dict(), strict=False)
    model.load_state_dict(copy.deepcopy(model.state_dict()))  # also its own state
    assert torch.equal(output_of(model), before) and same(s2ft.detach(model).state_dict(), base.state_dict())


def test_a_cast_of_each_parameters_data_keeps_the_base():
    model = fit(with_adapter(model_of("llama-grouped", torch.bfloat16), S2FTConfig(**ALL_RATIOS)))
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    output_of(model)
    assert same(s2ft.detach(model).state_dict(), model_of("llama-grouped", torch.bfloat16).float().state_dict())


def test_merge_without_gradients_writes_values_that_came_by_data():
    model = trained("llama-grouped")
    with torch.no_grad():
        output_of(model)
        for name, parameter in model.named_parameters():
            parameter.data.mul_(2 if name.endswith(".s2") else 1)
        adapter = s2ft.get_adapter(model, "default")
        assert same(
            s2ft.merge(model).state_dict(), s2ft.merge(with_loaded(model_of("llama-grouped"), adapter)).state_dict()
        )


@layouts
def test_another_base_is_refused_and_nothing_changes(layout):
    model = trained("llama-grouped", layout)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = model_of("llama-grouped").state_dict()
    other["model.layers.1.mlp.down_proj.weight"] = other["model.layers.1.mlp.down_proj.weight"] + 1
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj.weight is not the weight of the base"):
        model.load_state_dict(other, strict=False)
    assert same(model.state_dict(), before)


def test_an_average_put_in_by_data_is_gone_from_the_next_evaluation():
    model = trained("llama-grouped")
    slices = [parameter for name, parameter in model.named_parameters() if name.endswith(".s2")]
    with torch.no_grad():
        trained_values = [values.clone() for values in slices]
        expected = output_of(model.eval())
        for values in slices:
            values.data.mul_(2)
        assert not torch.equal(output_of(model.eval()), expected)
        for values, own in zip(slices, trained_values):
            values.data.copy_(own)
        assert torch.equal(output_of(model.eval()), expected)


def test_a_hook_of_one_optimizer_reads_the_weights_of_the_step_before():
    model = trained("llama-grouped")
    layer = next(module for module in model.modules() if hasattr(module, "s2"))
    output_of(model)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD([layer.s2], lr=1.0)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(layer.weight.detach().clone()))
    layer.s2.grad = torch.ones_like(layer.s2)
    optimizer.step()
    assert torch.equal(seen[0], before)
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_a_cast_also_casts_the_saved_base_values(dtype, tmp_path):
    model = with_loaded(model_of("llama-grouped"), saved_adapter(trained("llama-grouped"), tmp_path))
    plain = model_of("llama-grouped")
    for cast in (dtype, torch.float32):  # there and back: rounded like the rest of the model
        model.to(cast), plain.to(cast)
        assert same(s2ft.detach(copy.deepcopy(model)).state_dict(), plain.state_dict())
    s2ft.set_adapter(model, None)
    assert same(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    "change,layout,words",
    [
        (
            lambda layers: prune.l1_unstructured(layers[1].mlp.down_proj, "weight", amount=0.5),
            "permuted",
            "layers.1.mlp.down_proj.weight is not a parameter.*prune.remove",
        ),
        (
            lambda layers: weight_norm(layers[1].mlp.down_proj),
            "permuted",
            "layers.1.mlp.down_proj.weight is not a parameter.*remove_weight_norm",
        ),
        *(
            (
                lambda layers: setattr(layers[1].mlp.down_proj, "weight", layers[0].mlp.down_proj.weight),
                layout,
                "layers.0.mlp.down_proj.*layers.1.mlp.down_proj.* are one tied weight",
            )
            for layout in LAYOUTS
        ),
    ],
    ids=("prune", "weight_norm", *(f"tied, {layout}" for layout in LAYOUTS)),
)
def test_a_weight_that_cannot_be_trained_is_refused_by_name(change, layout, words):
    model = model_of("llama-grouped")
    change(model.model.layers)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        s2ft.attach(model, S2FTConfig(d_ratio=0.1, layout=layout))
    assert same(model.state_dict(), before) and s2ft.status(model).adapters == []


@layouts
def test_a_state_of_other_units_is_refused(layout):
    config = S2FTConfig(d_ratio=0.1, layout=layout, seed=1)
    model, other = (with_adapter(model_of("llama-grouped"), replace(config, seed=seed)) for seed in (1, 2))
    with pytest.raises(ValueError, match="of other units of model.layers.0.mlp.down_proj"):
        other.load_state_dict(model.state_dict())
    model.load_state_dict(dict(model.state_dict()))  # without PyTorch's notes about the state


def test_the_file_of_scattered_units_is_a_state(tmp_path):
    """transformers' Trainer resumes so. The file has other numbers of units than the layers, whose units have moved."""
    names = {"up_proj": [5, 9], "gate_proj": [7, 9], "down_proj": [5, 7]}
    config = S2FTConfig(units={f"model.layers.0.mlp.{name}": units for name, units in names.items()})
    model, other = (with_adapter(model_of("llama-grouped"), config) for _ in "ab")
    s2ft.save_adapter(fit(model), tmp_path)
    other.load_state_dict(load_file(tmp_path / TENSORS), strict=False)
    assert torch.equal(output_of(other), output_of(model))


@layouts
def test_the_state_is_the_base_below_an_adapter_on_top_of_others(layout):
    base, model = model_of("llama-grouped"), trained("llama-grouped", layout)
    s2ft.freeze_adapter(model)
    s2ft.attach(model, S2FTConfig(d_ratio=0.1, layout=layout), name="second", on_top=True)
    output, state = output_of(model), model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in base.state_dict().items())
    model.load_state_dict(state)
    assert torch.equal(output_of(model), output)


def test_a_state_has_all_that_is_trained_while_the_adapter_is_off():
    model = fit(with_adapter(model_of("llama-grouped"), S2FTConfig(d_ratio=0.2, modules_to_save=["lm_head"])))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with s2ft.disable_adapters(model):
        assert same(model.state_dict(), state)
        model.load_state_dict(state)
        assert torch.equal(model.lm_head.weight, model_of("llama-grouped").lm_head.weight)
    assert same(model.state_dict(), state)
