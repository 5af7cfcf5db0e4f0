"""Adapters on the quantized linear layers of bitsandbytes and torchao, on the CPU. Their whole life: test_life_cycle."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from adapter.test_pretrained import StopAt, trainer as plain_trainer
from support.inside import mounted_deltas, record_of
from support.models import fit, output_of, token_batch, train
from support.pairs import in_turn, pairs_mostly_slow, rest_slow
from support.quantized import (
    KINDS,
    RARE,
    assert_same_contents,
    bnb,
    contents,
    dense_reference,
    dynamic,
    forward,
    is_projection,
    linears,
    low_bits,
    plain,
    quantized,
    torchao,
)
from support.states import randomize, saved_and_loaded, with_adapter, with_loaded
from support.tolerances import LOGITS, relative_difference
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import s2ft
from s2ft import S2FTConfig

RATIOS = dict(q_ratio=0.5, k_ratio=0.25, v_ratio=0.5, o_ratio=0.5, u_ratio=0.2, g_ratio=0.1, d_ratio=0.15)
INDEXED = S2FTConfig(**RATIOS, layout="indexed")
UNFUSED = S2FTConfig(**RATIOS, layout="indexed", ffn_kernel=False)  # the FFN kernel rounds differently
kinds = pytest.mark.parametrize("kind", rest_slow(KINDS, set(KINDS) - set(RARE)))
# largest relative difference to the gradients of the dequantized weights: two kinds compute in half precision


def trained(model, steps=3):
    return fit(with_adapter(model, INDEXED), steps)


# ---- attach, train, detach ------------------------------------------------------------------------------


def gradients(model, training=True):
    randomize(with_adapter(model, INDEXED), std=0.02).train(training)
    batch = token_batch(model)
    embedded = model.get_input_embeddings()(batch).detach().requires_grad_(True)
    model(inputs_embeds=embedded, labels=batch).loss.backward()
    return {
        "embedded": embedded.grad,
        **{name.replace(".linear", ""): p.grad for name, p in model.named_parameters() if p.requires_grad},
    }


@pytest.mark.parametrize("kind, training", [*((kind, True) for kind in KINDS), ("8bit", False)])
def test_gradients_are_those_of_the_dequantized_weights(kind, training):
    """In evaluation mode bitsandbytes quantizes the inputs of 8-bit layers."""
    model = quantized(kind)
    reference = gradients(dense_reference(model))
    ours = gradients(model, training)
    assert ours.keys() == reference.keys() and len(ours) == 15
    for name, gradient in ours.items():
        assert relative_difference(gradient, reference[name]) <= (
            {kind: {"nf4-bfloat16": 0.1, "8bit": 1e-2}.get(kind, 1e-4) for kind in KINDS}[kind] if training else 0.1
        ), name


@kinds
def test_evaluating_in_between_does_not_stop_the_gradient(kind):
    """On some CPUs bitsandbytes packs 4-bit weights in evaluation, and packed weights pass no gradient."""
    model, never = quantized(kind), quantized(kind)
    with torch.no_grad():
        output_of(model)
    s2ft.attach(model, INDEXED)
    losses = train(model, 2)
    with torch.no_grad():
        output_of(model)
    losses += train(model, 2)
    s2ft.attach(never, INDEXED)
    assert losses == pytest.approx(train(never, 2) + train(never, 2), rel=2e-2)


def test_packing_is_allowed_again_after_detach():
    def allowed():
        return [module.support_avx512bf16_for_cpu for module in linears(model).values()]

    model = quantized("nf4")
    before = allowed()
    s2ft.attach(model, INDEXED, verify=True)
    assert not any(allowed())
    s2ft.detach(model)
    assert allowed() == before


@pytest.mark.parametrize(
    "kind, dtype, autocast", pairs_mostly_slow(KINDS, (torch.float32, torch.bfloat16), (False, True)), ids=str
)
def test_outputs_have_the_dtype_of_the_layers(kind, dtype, autocast):
    model = quantized(kind, dtype)
    for name, width in (("up_proj", 64), ("down_proj", 128)):
        path = f"model.layers.0.mlp.{name}"
        x = torch.randn(2, 3, width, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = model.get_submodule(path).train()(x).dtype
            s2ft.attach(model, INDEXED)
            y = model.get_submodule(path)(x)
        assert y.dtype is expected
        y.sum().backward()
        assert model.get_submodule(path).s2.grad.any()
        s2ft.detach(model)


# ---- layouts --------------------------------------------------------------------------------------------


@kinds
def test_quantized_couplings_that_are_not_trained_do_not_matter(kind):
    model = quantized(kind, wanted=lambda path: "self_attn" in path)
    before, logits = contents(model), forward(model)
    s2ft.attach(model, S2FTConfig(d_ratio=0.1, u_ratio=0.1), verify=True)
    assert relative_difference(forward(model), logits) <= (3e-2 if kind == "nf4-bfloat16" else LOGITS)
    assert all(mount.layer.index is None for mount in record_of(model).mounts.values())
    train(model)
    s2ft.merge(model)
    assert_same_contents(contents(model), before)


# ---- adapters -------------------------------------------------------------------------------------------


def test_adapters_load_on_other_kinds_of_quantization_and_on_no_other_base(tmp_path):
    """The fingerprint does not depend on the quantization, nor on whether the first consumer is quantized."""
    s2ft.save_adapter(trained(quantized("nf4")), tmp_path)
    for kind in KINDS:
        for base in (quantized(kind, wanted=lambda path: is_projection(path) and ".0." not in path), plain()):
            s2ft.load_adapter(base, tmp_path, trainable=True)
        with pytest.raises(ValueError, match="another base"):
            s2ft.load_adapter(quantized(kind, seed=1), tmp_path, trainable=True)
    permuted = s2ft.get_adapter(with_adapter(plain(), replace(INDEXED, layout="permuted")), "default")
    s2ft.load_adapter(quantized("nf4"), permuted, trainable=True)  # which reorders nothing


# ---- what is refused ------------------------------------------------------------------------------------


def with_down_proj(make):
    """The plain model with another layer in one place."""
    model = plain()
    model.model.layers[0].mlp.down_proj = make(model.model.layers[0].mlp.down_proj)
    return model


def on_meta(linear):
    with torch.device("meta"):
        return low_bits(quant_type="nf4")(linear)


def attach(**options):
    return lambda model: s2ft.attach(
        model,
        S2FTConfig(**{**RATIOS, "layout": "indexed", **options}),
        calibration=[token_batch(model)] if "selection" in options else None,
    )


REFUSED = {
    **{f"{kind} permuted": (lambda kind=kind: quantized(kind), attach(layout="permuted"), "indexed") for kind in KINDS},
    **{f"{kind} gradient": (lambda kind=kind: quantized(kind), attach(selection="gradient"), "grad") for kind in KINDS},
    **{
        f"{kind} beside": (
            lambda kind=kind: trained(quantized(kind)),
            lambda model: s2ft.load_adapter(model, s2ft.get_adapter(model, "default"), name="second"),
            "quantized",
        )
        for kind in KINDS
    },
    **{
        f"{kind} fuse": (
            lambda kind=kind: trained(quantized(kind)),
            lambda model: next(one for one in model.modules() if hasattr(one, "s2")).fuse_s2_weight(),
            "can't be written into a quantized weight",
        )
        for kind in KINDS
    },
    "dynamic int8": (lambda: dynamic("Int8DynamicActivationInt8WeightConfig"), attach(), "layers.1.self_attn.o_proj"),
    "dynamic intx": (lambda: dynamic("Int8DynamicActivationIntxWeightConfig"), attach(), "layers.1.self_attn.o_proj"),
    "weights train": (lambda: with_down_proj(lambda linear: bnb.nn.Linear8bitLt(128, 64, False)), attach(), "8bit"),
    "not quantized yet": (lambda: with_down_proj(low_bits(quant_type="nf4")), attach(), "move"),
    "no values": (lambda: with_down_proj(on_meta), attach(), "meta"),
}


@pytest.mark.parametrize("case", rest_slow(REFUSED, [case for case in REFUSED if case.split()[0] not in RARE]))
def test_what_is_refused_changes_nothing(case):
    make, change, word = REFUSED[case]
    model = make()

    def looks():
        required = {name: p.requires_grad for name, p in model.named_parameters()}
        return required, [module.training for module in model.modules()], s2ft.status(model)

    packed, before = contents(model), looks()
    with pytest.raises(RuntimeError if case.endswith("fuse") else ValueError, match=word):
        change(model)
    assert looks() == before
    if packed and case != "no values":
        assert_same_contents(contents(model), packed)


# ---- selecting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, selection", in_turn(KINDS, ("random", "weight", "activation", "product")))
def test_selections(kind, selection):
    """The selection equals that of the dequantized weights, and plan agrees with attach."""
    config = S2FTConfig(**RATIOS, layout="indexed", selection=selection)
    model = quantized(kind)
    calibration = None if selection in ("random", "weight") else [token_batch(model)]
    expected = s2ft.select(dense_reference(model), config, calibration)
    selected = s2ft.select(model, config, calibration)
    if selection in ("random", "weight"):
        assert selected == expected
    else:  # ranks of activations that are nearly equal may change
        same = [len(set(ours.tolist()) & set(expected[path].tolist())) for path, ours in selected.units.items()]
        assert sum(same) >= 0.9 * sum(units.numel() for units in selected.units.values())
    planned, dense = (s2ft.plan(base, replace(config, match_lora_rank=8), calibration) for base in (model, plain()))
    assert (planned.rows, planned.total) == (dense.rows, dense.total)  # parameters, not packed bytes


# ---- copies, states, whole models -----------------------------------------------------------------------


@kinds
def test_a_state_is_loaded(kind):
    model, fresh = trained(quantized(kind)), with_adapter(quantized(kind), INDEXED)
    state = saved_and_loaded(model.state_dict())
    if "4bit" in type(fresh.model.layers[0].mlp.down_proj.linear).__name__:  # it can save scales but not load them
        state = {key: value for key, value in state.items() if ".linear.weight." not in key}
    fresh.load_state_dict(state)
    assert torch.equal(forward(fresh), forward(model))


# ---- models that transformers quantizes, in its Trainer ----------------------------------------------------

CONFIGS = {
    "4bit": lambda compute: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    ),
    "8bit": lambda compute: BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": lambda compute: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao-int4": lambda compute: TorchAoConfig(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
}
configs = pytest.mark.parametrize("kind", CONFIGS)


def loaded(kind, folder, compute=torch.float32):
    """The plain model, quantized by from_pretrained."""
    if not (folder / "base").exists():
        plain(compute).save_pretrained(folder / "base")
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=CONFIGS[kind](compute), dtype=compute, device_map="cpu"
    ).eval()


ROWS = [
    {"input_ids": row, "labels": row} for row in torch.randint(67, (8, 9), generator=torch.Generator().manual_seed(1))
]


def trainer(model, folder, **arguments):
    options = dict(gradient_accumulation_steps=1, max_steps=4, save_strategy="no", seed=1, logging_steps=1)
    return plain_trainer(model, folder / "run", ROWS, **{**options, **arguments})


def deltas_of(model):
    return {name: delta.values for name, delta in mounted_deltas(record_of(model)).items()}


@pytest.mark.parametrize(
    "kind, compute, delta_dtype",
    pairs_mostly_slow(CONFIGS, (torch.float32, torch.bfloat16), ("float32", "bfloat16")),
    ids=str,
)
def test_transformers_trainer(kind, compute, delta_dtype, tmp_path):
    """It refuses the model before attach and after detach. It trains the attached model without changing its bytes."""
    model = loaded(kind, tmp_path, compute)
    before, asked = contents(model), type(model.hf_quantizer)
    with pytest.raises(ValueError, match="purely quantized models"):
        trainer(model, tmp_path)
    s2ft.attach(model, replace(INDEXED, delta_dtype=delta_dtype))
    trainer(model, tmp_path).train()
    assert all(delta.any() and delta.dtype is getattr(torch, delta_dtype) for delta in deltas_of(model).values())
    s2ft.detach(model)
    assert_same_contents(contents(model), before)
    assert type(model.hf_quantizer) is asked
    with pytest.raises(ValueError, match="purely quantized models"):
        trainer(model, tmp_path)


@configs
def test_trainer_saves_and_resumes(kind, tmp_path):
    """Two steps, a checkpoint and two steps on a newly quantized base equal four steps, bit for bit.

    The four steps keep their activations, the others use one of the ways of gradient checkpointing each."""
    whole, half, rest = (loaded(kind, tmp_path) for _ in range(3))
    for model in (whole, half, rest):
        s2ft.attach(model, INDEXED)
    trainer(whole, tmp_path).train()
    saving = dict(save_strategy="steps", save_steps=2, gradient_checkpointing=True)
    run = trainer(half, tmp_path, **saving, gradient_checkpointing_kwargs=dict(use_reentrant=False))
    run.add_callback(StopAt(2))
    run.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert 0 < size < 3 * 4 * s2ft.get_adapter(half, "default").parameters  # it does not contain the base
    trainer(rest, tmp_path, **saving, gradient_checkpointing_kwargs=dict(use_reentrant=True)).train(str(checkpoint))
    theirs = deltas_of(rest)
    assert all(torch.equal(value, theirs[name]) for name, value in deltas_of(whole).items())
    assert not all(torch.equal(value, theirs[name]) for name, value in deltas_of(half).items())
    assert_same_contents(contents(rest), contents(whole))


@configs
def test_the_properties_of_the_quantizer_are_copied_and_pickled(kind, tmp_path):
    model = loaded(kind, tmp_path)
    asked = type(model.hf_quantizer)
    says = model.hf_quantizer.is_trainable, model.hf_quantizer.is_qat_trainable
    s2ft.attach(model, INDEXED)
    other = copy.deepcopy(model)
    for quantizer in (model.hf_quantizer, other.hf_quantizer, pickle.loads(pickle.dumps(model.hf_quantizer))):
        assert isinstance(quantizer, asked) and quantizer.is_trainable and quantizer.is_qat_trainable
        assert quantizer.quantization_config.to_dict() == model.hf_quantizer.quantization_config.to_dict()
    s2ft.detach(other)
    assert (other.hf_quantizer.is_trainable, other.hf_quantizer.is_qat_trainable) == says
    assert model.hf_quantizer.is_qat_trainable


def test_a_failure_restores_the_quantizer(tmp_path, monkeypatch):
    model = loaded("4bit", tmp_path)
    monkeypatch.setattr("s2ft.attached.mounting.fsdp_shard_slices", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        s2ft.attach(model, INDEXED)
    assert not model.hf_quantizer.is_qat_trainable


@pytest.mark.parametrize("kind", ("4bit", "8bit"))
def test_merging_after_transformers_dequantized_the_base(kind, tmp_path):
    """The error of a refused merge recommends this. The result is a plain checkpoint of transformers."""
    model = fit(with_adapter(loaded(kind, tmp_path), UNFUSED), 5)
    s2ft.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"model\.dequantize\(\)"):
        s2ft.merge(model)
    base = with_loaded(loaded(kind, tmp_path).dequantize(), tmp_path / "adapter")
    s2ft.merge(base).save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_difference(forward(again), forward(model)) <= LOGITS


@pytest.mark.parametrize("kind", ("4bit", "8bit", "torchao-int8"))
def test_an_exported_lora_on_the_quantized_base_in_peft(kind, tmp_path):
    """On the base that the adapter was trained on, PEFT gives the same logits and keeps the same bytes."""
    import peft

    model = loaded(kind, tmp_path)
    base = forward(model)
    fit(with_adapter(model, UNFUSED), 5)
    s2ft.export_lora(model, tmp_path / "lora")
    other = loaded(kind, tmp_path)
    before = contents(other)
    other = peft.PeftModel.from_pretrained(other, tmp_path / "lora")
    assert relative_difference(forward(other), forward(model)) <= LOGITS
    assert relative_difference(forward(other), base) > 1e-2
    assert_same_contents(
        {
            path.removeprefix("base_model.model.").removesuffix(".base_layer"): value
            for path, value in contents(other).items()
        },
        before,
    )


# ---- weights that are not available ---------------------------------------------------------------------
