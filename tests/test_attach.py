"""attach, detach, merge over every model family, both layouts."""

from functools import wraps

import pytest
import torch
from support.inside import ACTIVATIONS, HIDDEN_ACTS, couplings_of, projections_of, record_of, weight_at
from support.models import (
    ALL_RATIOS,
    CASES,
    FIRST,
    LAYOUTS,
    block_weights,
    model_of,
    output_of,
    ratios_for,
    token_batch,
    train,
)
from support.nets import doubled
from support.pairs import rest_slow
from support.states import randomize, with_adapter
from support.tolerances import LOGITS, relative_difference
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertForSequenceClassification,
    BertModel,
    CLIPForImageClassification,
    CLIPTextModelWithProjection,
    OPTModel,
    T5EncoderModel,
    T5Model,
    ViTModel,
    WhisperForAudioClassification,
    WhisperForCausalLM,
)
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

import s2ft
from s2ft import S2FTConfig

# each projection alone, all projections, and the asymmetric pairs of the paper
REQUESTS = {
    **{key: {key: 0.5} for key in ("q_ratio", "k_ratio", "v_ratio", "o_ratio", "u_ratio", "g_ratio", "d_ratio")},
    "all": ALL_RATIOS,
    "up-down": dict(u_ratio=0.1, d_ratio=0.3),
    "v-o": dict(v_ratio=0.5, o_ratio=0.75),
}


def config_for(case, request, **more):
    return S2FTConfig(**ratios_for(case, REQUESTS[request]), **more)


def requests_mostly_slow():
    """Each case with each request that it has projections for. One for each case runs by default, in turn."""
    for number, case in enumerate(CASES):
        names = [name for name in REQUESTS if ratios_for(case, REQUESTS[name])]
        for position, name in enumerate(names):
            layout = LAYOUTS[(number // len(names) + position) % 2]
            yield pytest.param(case, name, layout, marks=[pytest.mark.slow] * (position != number % len(names)))


@pytest.mark.parametrize("case,request_,layout", list(requests_mostly_slow()))
@torch.no_grad()
def test_attach_keeps_the_logits_and_merge_those_of_the_slices(case, request_, layout):
    model = model_of(case)
    before = output_of(model)
    s2ft.attach(model, config_for(case, request_, layout=layout))
    assert relative_difference(output_of(model), before) <= LOGITS
    trained = output_of(randomize(model))
    assert relative_difference(output_of(s2ft.merge(model)), trained) <= LOGITS < relative_difference(trained, before)


def test_an_optimizer_that_steps_after_a_merge_changes_nothing():
    model = randomize(with_adapter(model_of("llama"), S2FTConfig(d_ratio=0.1)))
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], 1.0)
    loss = output_of(model).sum()  # its graph keeps the layers
    loss.backward()
    merged = output_of(s2ft.merge(model))
    optimizer.step()
    assert torch.equal(output_of(model), merged)


@pytest.mark.parametrize("case", rest_slow(CASES, FIRST))
def test_every_layer_is_reported_and_trained(case):
    model = model_of(case)
    weights = block_weights(model)
    projections = {(p.path, p.key) for p in projections_of(couplings_of(model))}
    report = s2ft.attach(model, config_for(case, "all"))
    assert set(record_of(model).mounts) == weights == {path for path, _ in projections}
    assert sum(row.layers for row in report.rows) == len(projections)
    assert len({(row.projection, row.units) for row in report.rows}) == len(report.rows)


@pytest.mark.parametrize("case", rest_slow(CASES, FIRST))
def test_plan_equals_the_report_of_attach(case):
    """plan reads no weight: it gives the same selection on the meta device."""
    model, config = model_of(case), config_for(case, "all")
    planned = s2ft.plan(model, config)
    assert "planned" in str(planned)
    report = s2ft.attach(model, config)
    assert (planned.rows, planned.trainable, planned.total) == (report.rows, report.trainable, report.total)
    with torch.device("meta"):  # a default device must not get the numbers of units
        assert s2ft.plan(model_of(case).to("meta"), config).rows == report.rows


@pytest.mark.parametrize("case", rest_slow(CASES, FIRST))
def test_layouts_train_alike_and_like_masked_full_training(case):
    """Two steps: both layouts have the same losses as a full model whose gradient is masked."""
    losses, selections = {}, []
    for layout in LAYOUTS:
        model = with_adapter(model_of(case), config_for(case, "all", layout=layout))
        losses[layout] = train(model, steps=2, weight_decay=0.0)
        record = record_of(model)
        selections.append(record.selection)
    assert selections[0] == selections[1] and selections[0].digest == selections[1].digest
    full = model_of(case).requires_grad_(False)
    masks = {}
    for p in projections_of(record.couplings):
        if p.name in record.selection:
            weight = weight_at(full, p).tensor.requires_grad_(True)
            mask = masks.setdefault(weight, torch.zeros_like(weight))
            weight_at(full, p).view(mask).transpose(0, p.dim)[p.elements(record.selection[p.name])] = 1
    for weight, mask in masks.items():
        weight.register_hook(lambda grad, mask=mask: grad * mask)
    masked = train(full, steps=2, weight_decay=0.0)
    within = 1e-5 * masked[0]
    assert losses["permuted"] == pytest.approx(losses["indexed"], rel=0, abs=within)
    assert losses["permuted"] == pytest.approx(masked, rel=0, abs=within)


def test_permuted_layout_is_one_dense_slice_where_units_can_move():
    model = with_adapter(model_of("llama"), S2FTConfig(**ALL_RATIOS))
    assert all(mount.layer.index is None for mount in record_of(model).mounts.values())


def test_grouped_query_heads_stay_in_their_groups():
    model = model_of("llama-grouped")
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    s2ft.attach(model, S2FTConfig(q_ratio=0.25, o_ratio=0.25, v_ratio=0.5))
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)
    assert model.model.layers[0].self_attn.o_proj.s2.shape[1] == 6  # one query head of four, 24 / 4 wide


def test_report_and_frozen_rest():
    model = model_of("llama")
    total = sum(p.numel() for p in model.parameters())
    config = S2FTConfig(d_ratio=0.1, v_ratio=0.5)
    report, config.seed = s2ft.attach(model, config), 5  # what happens to the config later is not recorded
    assert s2ft.get_adapter(model, "default").config.seed == 0 and report.fresh_heads == ()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith(".s2") for name in trained) and len(trained) == 6
    assert report.total == total and report.trainable == sum(p.numel() for p in trained.values())
    assert "5 of 52 channels" in str(report) and "2 of 4 heads" in str(report)


def test_layers_restricts_and_keeps_the_other_layers_draws():
    model = with_adapter(model_of("llama"), S2FTConfig(d_ratio=0.1, layers=[1]))
    whole = with_adapter(model_of("llama"), S2FTConfig(d_ratio=0.1))
    path = "model.layers.1.mlp.down_proj"
    assert list(record_of(model).mounts) == [path]
    assert torch.equal(record_of(model).selection[path], record_of(whole).selection[path])


@pytest.mark.parametrize(
    "dtype,option,expected",
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.bfloat16, "bfloat16", torch.bfloat16),
        (torch.float64, None, torch.float64),
    ],
)
def test_delta_dtype(dtype, option, expected):
    model = model_of("llama", dtype)
    assert s2ft.attach(model, S2FTConfig(d_ratio=0.1, delta_dtype=option)).rows[0].dtype is expected
    assert model(token_batch(model)).logits.dtype is dtype


@pytest.mark.parametrize("case", ("llama", "llama-gelu", "llama-gelu-tanh", "llama-relu"))
def test_the_ffn_kernel_gives_the_same_logits_and_gradients_for_every_activation(case):
    logits, gradients = [], []
    for fuse in (True, False):
        model = with_adapter(model_of(case), S2FTConfig(**ALL_RATIOS, ffn_kernel=fuse))
        assert len(record_of(model).forwards) == (3 if fuse else 0)
        batch = token_batch(model)
        output = model(batch, labels=batch)
        output.loss.backward()
        logits.append(output.logits)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert relative_difference(*logits) <= LOGITS
    for name, gradient in gradients[0].items():
        assert relative_difference(gradient, gradients[1][name]) <= 1e-4, name


@pytest.mark.parametrize("case", ("llama", "llama-gelu", "llama-gelu-tanh", "llama-relu"))
def test_the_ffn_kernel_keeps_gate_up_and_the_slice_for_backward(case):
    """It also keeps the weights, but neither the activation of the gate nor the product."""
    model = with_adapter(model_of(case), S2FTConfig(d_ratio=0.1))
    mlp, kept = model.model.layers[0].mlp, []
    weights = {p.data_ptr() for p in mlp.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        mlp(torch.randn(7, 24, requires_grad=True))
    assert sorted(kept) == [(7, 5), (7, 52), (7, 52)]


@pytest.mark.parametrize("activation", ("gelu_new", "gelu_fast", "gelu_python", "quick_gelu", "relu2"))
def test_a_block_with_another_activation_does_not_use_the_kernel(activation):
    config = CASES["llama"]()
    config.hidden_act = activation
    model = with_adapter(AutoModelForCausalLM.from_config(config), S2FTConfig(d_ratio=0.1))
    assert not any("forward" in module.__dict__ for module in model.modules())


class Longer(LlamaMLP):
    def forward(self, x):
        return super().forward(x) + x


def patched_class(model, monkeypatch):
    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", wraps(plain)(lambda self, x: plain(self, x) + x))


def own_forward(model, monkeypatch):
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x) + x


CHANGES = {
    "a forward of the block": own_forward,
    "a forward of the activation": lambda model, _: setattr(model.model.layers[1].mlp.act_fn, "forward", torch.tanh),
    "a derived class": lambda model, _: setattr(model.model.layers[1].mlp, "__class__", Longer),
    "a function put in the class": patched_class,
    "another activation": lambda model, _: setattr(model.model.layers[1].mlp, "act_fn", nn.Tanh()),
    **{
        f"a hook on {name}": lambda model, _, name=name: model.get_submodule(
            f"model.layers.1.mlp.{name}"
        ).register_forward_hook(doubled)
        for name in ("act_fn", "gate_proj", "up_proj")
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_else_runs_in_a_block_runs_with_the_ffn_kernel(change, monkeypatch):
    """What a class, a hook or a module has before attach, and a hook or a module that is put after it."""
    plain, before, after = (model_of("llama") for _ in range(3))
    unchanged = output_of(plain)
    with monkeypatch.context() as patch:
        for model in (plain, before):
            CHANGES[change](model, patch)
        s2ft.attach(before, S2FTConfig(d_ratio=0.1))
        expected = output_of(plain)
        assert relative_difference(output_of(before), expected) <= LOGITS < relative_difference(expected, unchanged)
    if change.startswith(("a hook", "another")):
        s2ft.attach(after, S2FTConfig(d_ratio=0.1))
        CHANGES[change](after, monkeypatch)
        assert relative_difference(output_of(after), expected) <= LOGITS


@pytest.mark.parametrize("name", HIDDEN_ACTS)
def test_activations_of_the_ffn_kernel_equal_pytorchs_functions(name):
    """They agree bit for bit in every dtype, so that a model changes by no more than the rounding of the kernel."""
    function = ACTIVATIONS[HIDDEN_ACTS[name]].function
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.linspace(-12, 12, 10_001).to(dtype)
        assert torch.equal(ACT2FN[name](x), function(x))


@pytest.mark.parametrize(
    "kind,case,linears",
    [
        (OPTModel, "opt", 18),
        (BertModel, "bert", 18),
        (BertForSequenceClassification, "bert", 18),
        (ViTModel, "vit", 18),
        (T5EncoderModel, "t5", 12),
        (T5Model, "t5", 42),
        (WhisperForAudioClassification, "whisper", 12),
        (WhisperForCausalLM, "whisper", 30),
        (CLIPForImageClassification, "clip", 12),
        (CLIPTextModelWithProjection, "clip-text", 18),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_models_with_other_heads_and_single_encoders_or_decoders(kind, case, linears):
    """Couplings are found wherever encoder and decoder lie, and a missing one is not required."""
    if case not in CASES:
        pytest.skip(f"this transformers is too old for {case}")
    assert len(record_of(with_adapter(kind(CASES[case]()), config_for(case, "all"))).mounts) == linears
