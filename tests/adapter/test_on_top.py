"""Adapters trained on top of each other, on disjoint units: every earlier state is restored bit for bit."""

import copy

import pytest
import torch
from support.inside import overlap, record_of
from support.models import fit, model_of, token_batch
from support.states import merged_state as weights, same, with_adapter

import s2ft
from s2ft import S2FTConfig

TASKS = ("one", "two", "three", "four", "five")
RATIOS = dict(d_ratio=0.15, u_ratio=0.1, g_ratio=0.1)
CASE = "llama-grouped"


def config_of(task, layout="permuted", **changes):
    return S2FTConfig(**{**RATIOS, "layout": layout, "seed": TASKS.index(task), **changes})


def sequence(model, layout="permuted", tasks=TASKS):
    """Train five tasks in a row. Returns the weights after each."""
    after = []
    for task in tasks:
        fit(with_adapter(model, config_of(task, layout), name=task, on_top=True))
        trained = weights(model)
        s2ft.freeze_adapter(model)
        assert same(weights(model), trained)
        after.append(trained)
    return after


@pytest.mark.parametrize("layout", ["permuted", "indexed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_state_of_five_tasks_in_a_row_is_restored_bit_for_bit(dtype, layout):
    model = model_of(CASE, dtype)
    base = copy.deepcopy(model)
    after = sequence(model, layout)
    for count in (3, 1, 5, 2, 4, 0):
        s2ft.set_adapter(model, dict.fromkeys(TASKS[:count], 1.0) or None)
        if count:
            assert same(weights(model), after[count - 1])
    assert same(s2ft.detach(model), base) and not any(same(one, other) for one, other in zip(after, after[1:]))


def test_saved_adapters_and_their_sum_give_every_state(tmp_path):
    model = model_of(CASE, torch.bfloat16)
    after = sequence(model)
    adapters = [s2ft.get_adapter(model, task) for task in TASKS]
    assert overlap(adapters).units == 0  # no unit is trained by two tasks
    below = [None, *(dict.fromkeys(TASKS[:number], 1.0) for number in range(1, 5))]
    assert [adapter.info.get("on_top_of") for adapter in adapters] == below
    for task in TASKS:
        s2ft.save_adapter(model, tmp_path / task, task)
    fresh = model_of(CASE, torch.bfloat16)
    for count, task in enumerate(TASKS, 1):
        s2ft.load_adapter(fresh, tmp_path / task, active=False)
        below = dict.fromkeys(TASKS[:count], 1.0)
        assert s2ft.combine_adapters(fresh, below, f"sum {count}").units == 0
        for state in (below, f"sum {count}"):
            s2ft.set_adapter(fresh, state)
            assert same(weights(fresh), after[count - 1])


def test_the_gradient_is_that_of_the_model_with_the_earlier_adapters():
    model = model_of(CASE)
    sequence(model, tasks=TASKS[:2])
    reference = s2ft.merge(copy.deepcopy(model)).requires_grad_(True)
    s2ft.attach(model, config_of("three", "indexed"), name="three", on_top=True)
    ids = token_batch(model)
    for each in (model, reference):
        each(input_ids=ids, labels=ids).loss.backward()
    for name, (mount, part) in record_of(model).parts.items():
        whole = reference.get_submodule(part.projection.path).weight.grad
        expected = whole.index_select(mount.layer.dim, part.elements)
        found = mount.layer.s2.grad.index_select(mount.layer.dim, part.positions)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_scores_are_those_of_the_model_with_the_earlier_adapters():
    model = model_of(CASE)
    sequence(model, tasks=TASKS[:2])
    merged = s2ft.merge(copy.deepcopy(model))
    calibration = [{"input_ids": token_batch(model)}]
    taken = (s2ft.get_adapter(model, "one") + s2ft.get_adapter(model, "two")).selection
    expected = s2ft.select(merged, config_of("three", selection="gradient", exclude=taken), calibration)
    s2ft.attach(model, config_of("three", selection="gradient"), "three", calibration=calibration, on_top=True)
    assert record_of(model).selection == expected


def test_units_excluded_by_hand_stay_excluded():
    model = model_of(CASE)
    path = "model.layers.0.mlp.down_proj"
    sequence(model, tasks=TASKS[:1])
    free = sorted(
        set(range(model.config.intermediate_size)) - set(s2ft.get_adapter(model, "one").selection[path].tolist())
    )
    s2ft.attach(model, S2FTConfig(d_ratio=0.1, layers=[0], exclude={path: free[:-8]}), name="two", on_top=True)
    assert set(record_of(model).selection[path].tolist()) <= set(free[-8:])
