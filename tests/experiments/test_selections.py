"""Every candidate's scores equal a direct computation in float64, and choosing does not change the model."""

import pytest
import torch
from selection.reference import norms
from selection.test_calibration_inputs import RATIOS
from support.inside import Calibration, Request, couplings_of, projections_of, weight_at
from support.models import model_of

import s2ft
from bench.experiments.selections import CANDIDATES, KEPT, ProtectedRequest, choose

CASES = ("llama-grouped", "mixtral")


def rows_of(model, seed, rows=3):
    """Sequences of different lengths, one a batch, so that nothing is padded."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(model.config.vocab_size, (1, 9 - row), generator=generator) for row in range(rows)]


def scores_of(model, name):
    task, other = (Calibration(rows_of(model, seed), torch.device("cpu")) for seed in (1, 2))
    return CANDIDATES[name].score(ProtectedRequest(couplings_of(model), config_of(model), model, task, other))


def config_of(model):
    keys = {projection.key for projection in projections_of(couplings_of(model))}
    return s2ft.S2FTConfig(**{option: share for option, share in RATIOS.items() if option[0] in keys})


# ---- direct computations ---------------------------------------------------------------------------------


def units_of(matrix, projection):
    """The weights of every unit, [count] tensors."""
    moved = matrix.movedim(projection.dim, 0)
    return [moved[projection.elements(torch.tensor([unit]))] for unit in range(projection.count)]


def low_rank(matrix, projection):
    """The projection's part of a weight after rank reduction, in the place of the weight."""
    elements = projection.elements(torch.arange(projection.count))
    part = matrix.movedim(projection.dim, 0)[elements]
    left, values, right = torch.linalg.svd(part, full_matrices=False)
    values[max(1, min(part.shape) // KEPT) :] = 0
    reduced = torch.zeros_like(matrix.movedim(projection.dim, 0))
    reduced[elements] = left @ values.diag() @ right
    return reduced.movedim(0, projection.dim)


def gradients(model, rows):
    """Every weight's gradient of every sequence, [sequences] dicts."""
    found = []
    for ids in rows:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append(
            {
                p.name: weight_at(model, p).view(weight_at(model, p).tensor.grad.clone())
                for p in projections_of(couplings_of(model))
            }
        )
    model.zero_grad()
    return found


def mean_square(values):
    return torch.stack(values).square().mean(0).sqrt()


def expected(model, name):
    projections = list(projections_of(couplings_of(model)))
    weights = {p.name: weight_at(model, p).matrix for p in projections}
    if name == "principal":
        return {p.name: norms(low_rank(weights[p.name], p), p) for p in projections}
    if name == "off_principal":
        return {
            p.name: norms(weights[p.name] - low_rank(weights[p.name], p), p) ** 2 / norms(weights[p.name], p) ** 2
            for p in projections
        }
    if name == "shielded":
        return need_of(model)
    if name == "task_activation":
        return over(need_of(model, "activation"), need_of(model, "activation", 1))
    task = gradients(model, rows_of(model, 1))
    gradient = {p.name: mean_square([norms(one[p.name], p) for one in task]) for p in projections}
    if name == "gradient_per_weight":
        return {p.name: gradient[p.name] / norms(weights[p.name], p) for p in projections}
    if name == "fisher_ratio":
        other = gradients(model, rows_of(model, 2))
        return over({p.name: mean_square([norms(one[p.name], p) for one in other]) for p in projections}, gradient)
    saliency = {
        p.name: mean_square(
            [torch.stack([unit.sum() for unit in units_of(one[p.name] * weights[p.name], p)]) for one in task]
        )
        for p in projections
    }
    return saliency if name == "saliency" else over(need_of(model), saliency)


def over(need, gain):
    return {name: values / (need[name] + need[name].mean()) for name, values in gain.items()}


def need_of(model, metric="product", seed=2):
    """What a metric of s2ft says, which tests/selection/test_metrics.py checks."""
    return s2ft.selection.METRICS[metric].score(
        Request(couplings_of(model), config_of(model), model, Calibration(rows_of(model, seed), torch.device("cpu")))
    )


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("case", CASES)
def test_scores_equal_the_direct_computation_in_float64(case, name):
    model = model_of(case, torch.float64)
    model.config._experts_implementation = "eager"  # torch's grouped product has no float64
    found, direct = scores_of(model, name), expected(model, name)
    assert found.keys() == direct.keys()
    for path, values in direct.items():
        torch.testing.assert_close(found[path], values, rtol=1e-7, atol=1e-12)
        assert found[path].dtype is torch.float64 and bool((found[path] >= 0).all())


# ---- choosing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CANDIDATES)
def test_the_meant_end_is_chosen_twice_the_same_and_the_model_does_not_change(name):
    model = model_of("llama").train()
    before = {path: value.clone() for path, value in model.state_dict().items()}
    scores = scores_of(model_of("llama"), name)
    for order in ("largest", "smallest"):
        config = s2ft.S2FTConfig(u_ratio=0.2, d_ratio=0.15, order=order)
        chosen = choose(model, name, config, rows_of(model, 1), rows_of(model, 2))
        assert chosen == choose(model, name, config, rows_of(model, 1), rows_of(model, 2))
        path = "model.layers.1.mlp.down_proj"
        ranking = scores[path].argsort(descending=((order == "largest") != CANDIDATES[name].smallest), stable=True)
        assert torch.equal(chosen[path], ranking[: chosen[path].numel()].sort().values)
    assert all(torch.equal(value, before[path]) for path, value in model.state_dict().items()) and model.training
    assert s2ft.attach(model, s2ft.S2FTConfig(units=chosen)).trainable > 0
