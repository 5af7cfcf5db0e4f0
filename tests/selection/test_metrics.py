"""Every metric equals a simple computation that stores everything, and selecting does not change the model."""

import weakref
from dataclasses import replace

import pytest
import torch
from support.models import ALL_RATIOS, model_of
from torch.utils.data import DataLoader

import s2ft
from s2ft import S2FTConfig, config
from s2ft.attached.record import attachment_of
from s2ft.model.coupling import projections_of
from s2ft.model.registry import couplings_of
from s2ft.model.weights import weight_at
from s2ft.selection import ALLOCATIONS, METRICS
from s2ft.selection.batches import Calibration
from s2ft.selection.metric import Request, shared_by_producers

CALIBRATED = [name for name, metric in METRICS.items() if metric.calibrated]
SCORED = [name for name, metric in METRICS.items() if metric.ordered]
CASES = (
    "llama",
    "llama-grouped",
    "llama-biased",
    "qwen3",
    "phi3-grouped",
    "gpt2",
    "gpt-neox-sequential",
    "mixtral",
    "deepseek-v3",
)
RATIOS = {**ALL_RATIOS, "k_ratio": 1.0, "v_ratio": 1.0}


def batch_of(model, rows=3, length=8, padded=True):
    """Token ids. With `padded`, two of the rows are shorter and padded on the left."""
    ids = torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
        mask[1, :1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def calibration_for(metric, model):
    return [batch_of(model)] if METRICS[metric].calibrated else None


def scores_of(model, metric, data, **config):
    config = S2FTConfig(**{**RATIOS, **config}, selection=metric)
    calibration = None if data is None else Calibration(data, torch.device("cpu"))
    return METRICS[metric].score(Request(couplings_of(model), config, model, calibration))


def norms(matrix, projection):
    """The norm of every unit, shape [units], by a loop over the units."""
    matrix = matrix.double().movedim(projection.dim, 0)
    return torch.stack([matrix[projection.elements(torch.tensor([unit]))].norm() for unit in range(projection.count)])


def reference(model, metric, batch):
    """Scores by projection, from all activations, stored, and one full backward for each sequence."""
    if metric == "product":
        weights, activations = (reference(model, name, batch) for name in ("weight", "activation"))
        return {name: weights[name] * activations[name] for name in weights}
    if metric == "gradient":
        return reference_gradients(model, batch)
    projections = list(projections_of(couplings_of(model)))
    if metric == "weight":
        return {p.name: norms(weight_at(model, p).matrix, p) for p in projections}
    seen, hooks = {}, []
    real = batch["attention_mask"].bool()
    for path in {p.path for p in projections if p.expert is None}:
        hooks.append(
            model.get_submodule(path).register_forward_hook(
                lambda module, inputs, output, path=path: seen.update(
                    {path: tuple(x.reshape(*real.shape, -1)[real] for x in (inputs[0], output))}
                )
            )
        )
    for path in {p.path.rpartition(".")[0] for p in projections if p.expert is not None}:
        hooks.append(
            model.get_submodule(path).register_forward_hook(
                lambda module, inputs, output, path=path: seen.update(
                    inside_experts(module, path, real.flatten(), *inputs)
                )
            )
        )
    model(**batch)
    for hook in hooks:
        hook.remove()
    scores = {}
    for p in projections:
        where = p.path if p.expert is None else (p.path, p.expert)
        passed = seen[where][1 - p.dim]  # [positions, features]
        scores[p.name] = norms(passed, replace(p, dim=1)) / int(real.sum()) ** 0.5
    return scores


def inside_experts(module, path, real, hidden, chosen, weights):
    """(input, output) of both weights of every expert, for the tokens routed to it, without padding."""
    found = {}
    for expert in range(module.num_experts):
        x = hidden[(chosen == expert).any(1) & real]
        gate_up = x @ module.gate_up_proj[expert].t()
        gate, up = gate_up.chunk(2, -1)
        inner = module.act_fn(gate) * up
        found[f"{path}.gate_up_proj", expert] = x, gate_up
        found[f"{path}.down_proj", expert] = inner, inner @ module.down_proj[expert].t()
    return found


def reference_gradients(model, batch):
    totals = {}
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
        model.zero_grad()
        labels = torch.where(mask * mask.roll(1) == 1, ids, -100)  # neither padding nor the token after it
        model(input_ids=ids[None], attention_mask=mask[None], labels=labels[None]).loss.backward()
        for p in projections_of(couplings_of(model)):
            totals.setdefault(p.name, []).append(norms(weight_at(model, p).view(weight_at(model, p).tensor.grad), p))
    model.zero_grad()
    return {name: torch.stack(found).square().mean(0).sqrt() for name, found in totals.items()}


# ---- scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", SCORED)
@pytest.mark.parametrize("case", CASES)
def test_scores_equal_the_simple_computation(case, metric):
    model = model_of(case)
    found = scores_of(model, metric, calibration_for(metric, model))
    expected = reference(model, metric, batch_of(model))
    assert found.keys() == expected.keys()
    for path, values in expected.items():
        torch.testing.assert_close(found[path], values, rtol=1e-4, atol=1e-9)
        assert found[path].dtype is torch.float64


@pytest.mark.parametrize("order", ("largest", "smallest"))
@pytest.mark.parametrize("metric", SCORED)
def test_the_selected_units_have_the_best_scores(metric, order):
    model = model_of("llama")
    data = calibration_for(metric, model)
    selection = s2ft.select(model, S2FTConfig(**RATIOS, selection=metric, order=order), data)
    scores = reference(model, metric, batch_of(model))
    for coupling in couplings_of(model):
        shared = sum(scores[p.path].square() for p in coupling.producers).sqrt()
        for projection in coupling.projections:
            values = scores[projection.path] if projection.dim == 1 else shared
            units = selection[projection.path]
            best = values.sort(descending=order == "largest").indices[: units.numel()]
            assert torch.equal(units, best.sort().values), projection.path


@pytest.mark.parametrize("metric", METRICS)
def test_both_layouts_select_the_same_units_and_producers_are_nested(metric):
    chosen = []
    for layout in ("permuted", "indexed"):
        model = model_of("llama")
        s2ft.attach(
            model, S2FTConfig(**ALL_RATIOS, selection=metric, layout=layout), calibration=calibration_for(metric, model)
        )
        chosen.append(attachment_of(model).selection)
        if layout == "permuted":
            assert all(mount.layer.index is None for mount in attachment_of(model).mounts.values())
    assert (
        chosen[0]
        == chosen[1]
        == s2ft.select(
            model_of("llama"), S2FTConfig(**ALL_RATIOS, selection=metric), calibration_for(metric, model_of("llama"))
        )
    )


def test_equal_scores_are_selected_in_order_of_units():
    for order in ("largest", "smallest"):
        model = model_of("llama")
        for layer in model.model.layers:
            torch.nn.init.ones_(layer.mlp.down_proj.weight)
        units = s2ft.select(model, S2FTConfig(d_ratio=0.1, selection="weight", order=order))
        assert units["model.layers.2.mlp.down_proj"].tolist() == [0, 1, 2, 3, 4]


def test_producers_with_different_numbers_of_units_share_no_score():
    model = model_of("llama-grouped")
    config = S2FTConfig(**RATIOS, selection="weight")
    request = Request(couplings_of(model), config, model)
    scores = METRICS["weight"].score(request)
    shared, attention = shared_by_producers(request, scores), "model.layers.0.self_attn."
    assert torch.equal(shared[attention + "k_proj"], shared[attention + "v_proj"])
    assert torch.equal(shared[attention + "q_proj"], scores[attention + "q_proj"])
    assert torch.equal(shared[attention + "o_proj"], scores[attention + "o_proj"])


@pytest.mark.parametrize("metric", CALIBRATED)
def test_scores_do_not_depend_on_how_data_is_divided_into_batches(metric):
    model = model_of("llama")
    batch = batch_of(model, rows=4)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(4)]
    loader = DataLoader(rows, batch_size=3)
    generator = ({name: value[i : i + 1] for name, value in batch.items()} for i in range(4))
    expected = scores_of(model, metric, [batch])
    for data in (loader, generator):
        for path, values in scores_of(model, metric, data).items():
            torch.testing.assert_close(values, expected[path], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("metric", CALIBRATED)
def test_padding_does_not_count(metric):
    model = model_of("llama")
    ids = batch_of(model, rows=1, padded=False)["input_ids"]
    expected = scores_of(model, metric, [ids])
    for side in ("left", "right"):
        filled, mask = torch.full((1, 11), 5), torch.zeros(1, 11, dtype=torch.int64)
        where = slice(3, None) if side == "left" else slice(None, 8)
        filled[:, where], mask[:, where] = ids, 1
        batch = {"input_ids": filled, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        for path, values in scores_of(model, metric, [batch]).items():
            torch.testing.assert_close(values, expected[path], rtol=1e-3, atol=1e-8)


def test_gradient_uses_the_labels_of_the_batch():
    model = model_of("llama")
    batch = batch_of(model, padded=False)
    labelled = scores_of(model, "gradient", [{**batch, "labels": batch["input_ids"]}])
    plain = scores_of(model, "gradient", [batch])
    other = scores_of(model, "gradient", [{**batch, "labels": batch["input_ids"].flip(0)}])
    path = "model.layers.1.mlp.down_proj"
    assert torch.equal(labelled[path], plain[path]) and not torch.allclose(labelled[path], other[path])


@pytest.mark.parametrize("metric", SCORED)
def test_bfloat16(metric):
    model, exact = model_of("llama", torch.bfloat16), model_of("llama", torch.bfloat16).float()
    data = calibration_for(metric, model)
    found, expected = scores_of(model, metric, data), scores_of(exact, metric, data)
    for path, values in found.items():
        assert values.dtype is torch.float64
        assert (values - expected[path]).norm() <= 0.1 * expected[path].norm(), path
    s2ft.attach(model, S2FTConfig(d_ratio=0.1, selection=metric), calibration=data)


@pytest.mark.parametrize("metric", CALIBRATED)
def test_tied_weights(metric):
    model = model_of("llama")
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    scores = scores_of(model, metric, [batch_of(model)])
    if metric == "gradient":
        assert torch.equal(scores["model.layers.0.mlp.down_proj"], scores["model.layers.1.mlp.down_proj"])


def checkpoint_blocks(model):
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # transformers 5.2x
    getattr(model, f"{kind}_checkpointing_enable")()


# ---- memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", (False, True))
def test_one_weight_gradient_is_alive_at_a_time(checkpointing, monkeypatch):
    """The test counts them whenever one is reduced. Only gradients of the requested projections are computed."""
    from s2ft.selection import gradient

    model = model_of("llama")
    expected = scores_of(model, "gradient", [batch_of(model)], u_ratio=0.0)
    if checkpointing:
        checkpoint_blocks(model)
    alive, reduce = [], gradient.squares_by_unit

    def count(*args):
        alive.append([name for name, p in model.named_parameters() if p.grad is not None])
        return reduce(*args)

    monkeypatch.setattr(gradient, "squares_by_unit", count)
    found = scores_of(model, "gradient", [batch_of(model)], u_ratio=0.0)
    assert all(len(names) == 1 for names in alive) and len(alive) == 3 * 6 * 3  # sequences, projections, layers
    assert not any("up_proj" in name or "embed" in name or "norm" in name for names in alive for name in names)
    for path, values in found.items():
        torch.testing.assert_close(values, expected[path])


def test_gradient_checkpointing_is_used(monkeypatch):
    model = model_of("llama")
    checkpoint_blocks(model)
    calls = []
    block = model.model.layers[0]
    inner = block._gradient_checkpointing_func
    block._gradient_checkpointing_func = lambda *args, **kwargs: (calls.append(1), inner(*args, **kwargs))[1]
    scores_of(model, "gradient", [batch_of(model)])
    assert len(calls) == 3 and not block.training


@pytest.mark.parametrize("metric", ("activation", "product"))
def test_no_activation_is_kept(metric):
    """When a layer runs, the activations of earlier layers are freed."""
    model = model_of("llama")
    seen, alive = [], []

    def watch(module, inputs, output):
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(output))

    hooks = [layer.mlp.gate_proj.register_forward_hook(watch) for layer in model.model.layers]
    s2ft.select(model, S2FTConfig(**ALL_RATIOS, selection=metric), [batch_of(model)] * 2)
    assert alive == [0] * 6
    for hook in hooks:
        hook.remove()


# ---- the model does not change ------------------------------------------------------------------------


def state(model):
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "order": list(model.state_dict()),
        "forwards": [module.__dict__.get("forward") for module in model.modules()],
        "required": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "hooks": [
            len(hooks)
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        ],
        "tensor hooks": [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
    }


def assert_untouched(model, before):
    after = state(model)
    assert all(torch.equal(value, after["weights"][name]) for name, value in before.pop("weights").items())
    assert all(gradient is after["gradients"][name] for name, gradient in before.pop("gradients").items())
    assert all(value == after[name] for name, value in before.items())


def awkward(case="llama"):
    """A model with mixed training modes, frozen parameters and gradients."""
    model = model_of(case).train()
    model.model.layers[1].eval()
    model.model.embed_tokens.requires_grad_(False)
    next(model.model.layers[0].mlp.parameters()).requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    attention = model.model.layers[0].self_attn
    attention.o_proj.weight.grad = torch.ones_like(attention.o_proj.weight)
    return model


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("case", ("llama", "mixtral"))
@pytest.mark.parametrize("metric", METRICS)
def test_selecting_does_not_change_the_model(metric, case, checkpointing):
    model = awkward(case)
    if checkpointing:
        checkpoint_blocks(model)
    before = state(model)
    s2ft.select(model, S2FTConfig(**ALL_RATIOS, selection=metric), calibration_for(metric, model))
    assert_untouched(model, before)
    assert s2ft.status(model).adapters == []


IDS = torch.arange(16).view(2, 8)
WRONG = {
    "empty": (list, ValueError, "calibration is empty"),
    "all padding": (lambda: [{"input_ids": IDS, "attention_mask": IDS * 0}], ValueError, "it has no tokens"),
    "one batch": (lambda: {"input_ids": IDS}, TypeError, "iterable of batches, got dict"),
    "one tensor": (lambda: IDS, TypeError, "got Tensor"),
    "a number": (lambda: 3, TypeError, "got int"),
    "text": (lambda: [IDS, "text"], ValueError, "calibration batch 1 must be a dict .* got str"),
    "no ids": (lambda: [{"attention_mask": IDS}], ValueError, "batch 0 needs input_ids.*got NoneType"),
    "flat ids": (lambda: [IDS[0]], ValueError, r"got shape \(8,\)"),
    "float ids": (lambda: [IDS.float()], ValueError, "torch.float32"),
    "mask": (lambda: [{"input_ids": IDS, "attention_mask": IDS[:, 1:]}], ValueError, r"attention_mask must have shape"),
    "labels": (lambda: [{"input_ids": IDS, "labels": IDS[:1]}], ValueError, r"labels must have shape \(2, 8\)"),
    "unknown token": (lambda: [IDS, IDS + 1000], IndexError, "index out of range"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("metric", CALIBRATED)
def test_bad_calibration_raises_and_does_not_change_the_model(metric, wrong):
    data, error, message = WRONG[wrong]
    model = awkward()
    before = state(model)
    with pytest.raises(error, match=message):
        s2ft.attach(model, S2FTConfig(**ALL_RATIOS, selection=metric), calibration=data())
    assert_untouched(model, before)
    assert s2ft.status(model).adapters == []


@pytest.mark.parametrize("metric", METRICS)
def test_calibration_is_required_or_refused(metric):
    model = awkward()
    before, calibrated = state(model), METRICS[metric].calibrated
    with pytest.raises(ValueError, match="needs calibration data" if calibrated else "takes no calibration data"):
        s2ft.attach(model, S2FTConfig(**ALL_RATIOS, selection=metric), calibration=None if calibrated else [IDS])
    assert_untouched(model, before)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("metric", SCORED)
def test_the_error_for_statistics_that_are_not_finite_names_the_projection(metric, value):
    model = awkward()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = value
    config = S2FTConfig(u_ratio=0.1, d_ratio=0.1, selection=metric)
    with pytest.raises(ValueError, match=f"selection='{metric}': the statistics of model.layers.* are NaN or infinite"):
        s2ft.attach(model, config, calibration=calibration_for(metric, model))
    assert [module.training for module in model.model.layers] == [True, False, True]


def test_sequences_without_a_label_do_not_count():
    model = model_of("llama")
    config = S2FTConfig(d_ratio=0.1, selection="gradient")
    path = "model.layers.1.mlp.down_proj"
    labels = IDS.masked_fill(IDS > 7, -100)  # only the first sequence has labels
    assert (
        s2ft.select(model, config, [{"input_ids": IDS, "labels": labels}])[path].tolist()
        == s2ft.select(model, config, [IDS[:1]])[path].tolist()
    )
    with pytest.raises(ValueError, match="no calibration sequence has a label"):
        s2ft.select(model, config, [{"input_ids": IDS, "labels": labels * 0 - 100}])


def test_gradient_refuses_a_model_without_a_loss():
    model = model_of("llama").model
    with pytest.raises(ValueError, match="loss from labels; LlamaModel does not"):
        s2ft.attach(model, S2FTConfig(d_ratio=0.1, selection="gradient"), calibration=[IDS])
    s2ft.attach(model, S2FTConfig(d_ratio=0.1, selection="activation"), calibration=[IDS])


# ---- the tables ------------------------------------------------------------------------------------------


def test_the_config_lists_every_metric_and_allocation():
    assert config.CHOICES["selection"] == tuple(METRICS) == tuple(config.METRICS)
    assert config.CHOICES["allocation"] == tuple(ALLOCATIONS) == tuple(config.ALLOCATIONS)
