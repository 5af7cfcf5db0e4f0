"""Every metric equals a simple computation that stores everything, and selecting does not change the model."""

import weakref

import pytest
import torch
from selection import reference
from support.inside import ALLOCATIONS, METRICS, Calibration, Request, config, couplings_of
from support.models import ALL_RATIOS, WHOLE_KEYS, model_of
from torch.utils.data import DataLoader

import s2ft
from s2ft import S2FTConfig

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


def scores_of(model, metric, data, couplings=None, **config):
    config = S2FTConfig(**{**WHOLE_KEYS, **config}, selection=metric)
    calibration = None if data is None else Calibration(data, torch.device("cpu"))
    return METRICS[metric].score(Request(couplings_of(model, couplings), config, model, calibration))


def assert_scores(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


# ---- scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", SCORED)
@pytest.mark.parametrize("case", CASES)
def test_scores_equal_the_simple_computation(case, metric):
    model = model_of(case)
    found = scores_of(model, metric, calibration_for(metric, model))
    assert_scores(found, reference.scores(model, metric, [batch_of(model)]))
    assert {values.dtype for values in found.values()} == {torch.float64}


@pytest.mark.parametrize("order, case", (("largest", "llama"), ("smallest", "llama-grouped")))
@pytest.mark.parametrize("metric", SCORED)
def test_the_selected_units_have_the_best_scores(metric, order, case):
    model = model_of(case)
    data = calibration_for(metric, model)
    selection = s2ft.select(model, S2FTConfig(**WHOLE_KEYS, selection=metric, order=order), data)
    scores = reference.scores(model, metric, [batch_of(model)])
    for coupling in couplings_of(model):
        for projection in coupling.projections:
            alike = [p for p in coupling.producers if p.count == projection.count]  # these share their scores
            shared = sum(scores[p.path].square() for p in alike).sqrt() if alike else None
            values = scores[projection.path] if projection.dim == 1 else shared
            units = selection[projection.path]
            best = values.sort(descending=order == "largest").indices[: units.numel()]
            assert torch.equal(units, best.sort().values), projection.path


@pytest.mark.parametrize("metric", CALIBRATED)
def test_batches_of_a_loader_and_a_weight_that_two_layers_share(metric):
    model, batch = model_of("llama"), batch_of(model_of("llama"), rows=4)
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    rows = [{name: value[i] for name, value in batch.items()} for i in range(4)]
    assert_scores(scores_of(model, metric, DataLoader(rows, batch_size=3)), scores_of(model, metric, [batch]))


def checkpoint_blocks(model, **options):
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # transformers 5.2x
    getattr(model, f"{kind}_checkpointing_enable")(options or None)


# ---- memory ----------------------------------------------------------------------------------------------


def test_one_weight_gradient_is_alive_at_a_time(monkeypatch):
    """The test counts them whenever one is reduced. Only gradients of the requested projections are computed."""
    from support.inside import metrics

    model = model_of("llama")
    expected = scores_of(model, "gradient", [batch_of(model)], u_ratio=0.0)
    alive, reduce = [], metrics.squares_by_unit

    def count(*args):
        alive.append([name for name, p in model.named_parameters() if p.grad is not None])
        return reduce(*args)

    monkeypatch.setattr(metrics, "squares_by_unit", count)
    found = scores_of(model, "gradient", [batch_of(model)], u_ratio=0.0)
    assert all(len(names) == 1 for names in alive) and len(alive) == 3 * 6 * 3  # sequences, projections, layers
    assert not any("up_proj" in name or "embed" in name or "norm" in name for names in alive for name in names)
    assert_scores(found, expected)


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


def test_sequences_without_a_label_do_not_count():
    model = model_of("llama")
    config = S2FTConfig(d_ratio=0.1, selection="gradient")
    path = "model.layers.1.mlp.down_proj"
    labels = IDS.masked_fill(IDS > 7, -100)  # only the first sequence has labels
    assert (
        s2ft.select(model, config, [{"input_ids": IDS, "labels": labels}])[path].tolist()
        == s2ft.select(model, config, [IDS[:1]])[path].tolist()
    )
    with pytest.raises(ValueError, match="loss from labels"):  # a model without a head
        s2ft.select(model.model, config, [IDS])


# ---- the tables ------------------------------------------------------------------------------------------


def test_the_config_lists_every_metric_and_allocation():
    assert config.CHOICES["selection"] == tuple(METRICS) == tuple(config.METRICS)
    assert config.CHOICES["allocation"] == tuple(ALLOCATIONS) == tuple(config.ALLOCATIONS)
