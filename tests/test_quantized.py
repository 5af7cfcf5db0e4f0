"""Adapters on the quantized linear layers of bitsandbytes and torchao, on the CPU."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from support.models import model_of, output_of, token_batch, train
from support.pairs import in_turn, pairs_mostly_slow
from support.slices import random_slices
from support.tolerances import LOGITS, relative_difference
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, TorchAoConfig, TrainerCallback

import s2ft
from s2ft import S2FTConfig
from s2ft.attached.active import mounted_deltas
from s2ft.attached.record import attachment_of, find_attachment
from s2ft.layers import NO_FUSE, S2Layer, kind_of

bnb = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")

RATIOS = dict(q_ratio=0.5, k_ratio=0.25, v_ratio=0.5, o_ratio=0.5, u_ratio=0.2, g_ratio=0.1, d_ratio=0.15)
INDEXED = S2FTConfig(**RATIOS, layout="indexed")
UNFUSED = S2FTConfig(**RATIOS, layout="indexed", ffn_kernel=False)  # the FFN kernel rounds differently


# ---- models ---------------------------------------------------------------------------------------------


def plain(dtype=torch.float32, seed=0):
    """A LLaMA with biases in evaluation mode; its sizes suit all kinds of quantization."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=67,
            attention_bias=True,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(**(dict(mean=0.5, std=0.3) if parameter.dim() == 1 else dict(std=0.1)))
    return model.to(dtype)


def four_bits(quant_type, **options):
    return lambda linear: bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, quant_type=quant_type, **options
    )


def eight_bits(linear):
    return bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False)


def by_bitsandbytes(make, linear):
    made = make(linear)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def by_torchao(config, linear):
    holder = nn.Sequential(linear)
    torchao.quantize_(holder, config)
    return holder[0]


KINDS = {
    "nf4": lambda linear: by_bitsandbytes(four_bits("nf4"), linear),
    "fp4": lambda linear: by_bitsandbytes(four_bits("fp4", compress_statistics=False), linear),
    "nf4-bfloat16": lambda linear: by_bitsandbytes(four_bits("nf4", compute_dtype=torch.bfloat16), linear),
    "8bit": lambda linear: by_bitsandbytes(eight_bits, linear),
    "torchao-int8": lambda linear: by_torchao(torchao.Int8WeightOnlyConfig(), linear),
    "torchao-float8": lambda linear: by_torchao(torchao.Float8WeightOnlyConfig(), linear),
    "torchao-int4": lambda linear: by_torchao(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4), linear),
}
RARE = ("fp4", "nf4-bfloat16", "torchao-float8")  # layers of the same classes as others
kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in RARE else kind for kind in KINDS]
)
# largest relative difference to the gradients of the dequantized weights: two kinds compute in half precision
GRADIENT = {kind: {"nf4-bfloat16": 0.1, "8bit": 1e-2}.get(kind, 1e-4) for kind in KINDS}


def is_wanted(path):
    return path.endswith("_proj")


def quantized(kind, dtype=torch.float32, seed=0, wanted=is_wanted):
    """The model with the projections quantized; lm_head is not, as in transformers."""
    model = plain(dtype, seed)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and wanted(path):
            model.set_submodule(path, KINDS[kind](module))
    return model.eval()


def linears(model):
    """The quantized layers, attached or not, by the path of the projection."""
    return {path.removesuffix(".linear"): module for path, module in model.named_modules() if is_quantized(module)}


def is_quantized(module):
    return kind_of(module).read_only == NO_FUSE and not isinstance(module, S2Layer)


def dense_reference(model):
    """The plain model with the dequantized weights of `model`."""
    reference = plain(model.lm_head.weight.dtype)
    for path, module in linears(model).items():
        reference.get_submodule(path).weight.data.copy_(kind_of(module).matrix(module))
    return reference


def contents(model):
    """The bytes of each quantized weight and its scales, as bitsandbytes and torchao store them."""
    found = {}
    for path, module in linears(model).items():
        if type(module) is nn.Linear:
            names, _ = module.weight.__tensor_flatten__()
            found[path] = [
                getattr(module.weight, name).clone() for name in names if getattr(module.weight, name) is not None
            ]
        elif isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state.as_dict()  # the scales are quantized too and have scales themselves
            found[path] = [
                module.weight.data.clone(),
                *(state[name].clone() for name in sorted(state) if isinstance(state[name], torch.Tensor)),
            ]
        else:
            scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB
            found[path] = [module.weight.data.clone(), scale.clone()]
    return found


def assert_same_contents(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) > 0
    for path, tensors in ours.items():
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(tensors, theirs[path], strict=True)), path


def forward(model):
    """Logits in training mode, where bitsandbytes packs no weights and quantizes no activations on the CPU."""
    model.train()
    with torch.no_grad():
        logits = output_of(model)
    model.eval()
    return logits


def trained(model, steps=3):
    s2ft.attach(model, INDEXED)
    train(model, steps)
    return model


def kept(model):
    return contents(model), {name: p.requires_grad for name, p in model.named_parameters()}


def assert_untouched(model, before):
    assert find_attachment(model) is None and not any("forward" in module.__dict__ for module in model.modules())
    assert before[1] == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(module.training for module in model.modules())
    assert_same_contents(contents(model), before[0])


# ---- attach, train, detach ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, dtype", in_turn(KINDS, (torch.float32, torch.bfloat16)), ids=str)
def test_attach_train_detach(kind, dtype):
    """attach keeps the logits, training changes only s2, and detach restores the model."""
    model = quantized(kind, dtype)
    types, before, logits = [type(m) for m in model.modules()], kept(model), forward(model)
    report = s2ft.attach(model, UNFUSED)
    assert sum(row.layers for row in report.rows) == 14 and all(row.dtype is torch.float32 for row in report.rows)
    attached = forward(model)
    assert attached.dtype is dtype and torch.equal(attached, logits)
    losses = train(model, steps=5)
    assert losses[-1] < losses[0]
    assert all(mount.layer.s2.count_nonzero() for mount in attachment_of(model).mounts.values())
    assert_same_contents(contents(model), before[0])
    s2ft.detach(model)
    assert types == [type(m) for m in model.modules()]
    assert torch.equal(forward(model), logits)
    assert_untouched(model, before)


def gradients(model, training=True):
    s2ft.attach(model, INDEXED)
    random_slices(model)
    model.train(training)
    batch = token_batch(model)
    embedded = model.get_input_embeddings()(batch).detach().requires_grad_(True)
    model(inputs_embeds=embedded, labels=batch).loss.backward()
    return {
        "embedded": embedded.grad,
        **{name.replace(".linear", ""): p.grad for name, p in model.named_parameters() if p.requires_grad},
    }


@kinds
def test_gradients_are_those_of_the_dequantized_weights(kind):
    model = quantized(kind)
    reference = gradients(dense_reference(model))
    ours = gradients(model)
    assert ours.keys() == reference.keys() and len(ours) == 15
    for name, gradient in ours.items():
        assert relative_difference(gradient, reference[name]) <= GRADIENT[kind], name


def test_gradients_with_eight_bit_activations():
    """In evaluation mode bitsandbytes quantizes the inputs."""
    model = quantized("8bit")
    reference = gradients(dense_reference(model))
    for name, gradient in gradients(model, training=False).items():
        assert relative_difference(gradient, reference[name]) <= 0.1, name


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
    others = train(never, 2) + train(never, 2)
    # packing rounds the scales to bfloat16, once
    assert losses == pytest.approx(others, rel=2e-2)


def test_packing_is_allowed_again_after_detach():
    def allowed():
        return [module.support_avx512bf16_for_cpu for module in linears(model).values()]

    model = quantized("nf4")
    before = allowed()
    s2ft.attach(model, INDEXED, verify=True)
    assert not any(allowed())
    s2ft.detach(model)
    assert allowed() == before


def test_packed_weights_are_dequantized():
    model = quantized("nf4")
    before = {path: kind_of(module).matrix(module) for path, module in linears(model).items()}
    with torch.no_grad():
        output_of(model)
    for path, module in linears(model).items():
        assert relative_difference(kind_of(module).matrix(module), before[path]) <= 2**-7


@pytest.mark.parametrize("config", ("Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"))
def test_weights_that_pass_no_gradient_are_refused(config):
    """They are refused even where the layer is not trained."""
    model = plain()
    torchao.quantize_(model, getattr(torchao, config)(), lambda module, path: path.endswith("1.self_attn.o_proj"))
    with pytest.raises(ValueError, match="layers.1.self_attn.o_proj .* passes no gradient .* weights only"):
        s2ft.attach(model, S2FTConfig(d_ratio=0.1, layout="indexed"))
    assert find_attachment(model) is None and not any(m.training for m in model.modules())


def test_eight_bit_layers_whose_weights_train_are_refused():
    model = plain()
    model.model.layers[0].mlp.down_proj = bnb.nn.Linear8bitLt(128, 64, False, has_fp16_weights=True)
    with pytest.raises(ValueError, match="down_proj is a Linear8bitLt"):
        s2ft.attach(model, INDEXED)


@kinds
def test_hooks_get_the_output_of_the_layer(kind):
    model, seen = quantized(kind), []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    trained(model, 1)
    seen.clear()
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 128)
    with torch.no_grad():
        layer.s2.fill_(1.0)
        expected = layer(x)
    assert len(seen) == 1 and torch.equal(seen[0], expected)


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
def test_permuted_is_refused(kind):
    model = quantized(kind)
    before = kept(model)
    with pytest.raises(ValueError, match="is a quantized weight .*layout='indexed'"):
        s2ft.attach(model, S2FTConfig(**RATIOS))
    assert_untouched(model, before)


@kinds
def test_quantized_couplings_that_are_not_trained_do_not_matter(kind):
    model = quantized(kind, wanted=lambda path: "self_attn" in path)
    before, logits = contents(model), forward(model)
    s2ft.attach(model, S2FTConfig(d_ratio=0.1, u_ratio=0.1))
    assert relative_difference(forward(model), logits) <= (3e-2 if kind == "nf4-bfloat16" else LOGITS)
    assert all(mount.layer.index is None for mount in attachment_of(model).mounts.values())
    train(model)
    s2ft.merge(model)
    assert_same_contents(contents(model), before)


# ---- adapters -------------------------------------------------------------------------------------------


@kinds
def test_an_adapter_is_saved_and_loaded(kind, tmp_path):
    model = trained(quantized(kind))
    s2ft.save_adapter(model, tmp_path)
    other = quantized(kind)
    s2ft.load_adapter(other, tmp_path, trainable=True)
    assert torch.equal(forward(other), forward(model))
    assert train(other) == train(model)


@kinds
def test_an_adapter_loads_on_the_unquantized_base_and_back(kind, tmp_path):
    model = trained(quantized(kind))
    s2ft.save_adapter(model, tmp_path / "quantized")
    dense = plain()
    s2ft.load_adapter(dense, tmp_path / "quantized")
    for p, delta in mounted_deltas(attachment_of(model)).items():
        difference = dense.get_submodule(p).weight - plain().get_submodule(p).weight
        torch.testing.assert_close(difference.index_select(delta.dim, delta.index), delta.values, rtol=0, atol=1e-6)
    merged = s2ft.merge(dense)
    assert type(merged.model.layers[0].mlp.down_proj) is nn.Linear

    dense = trained(plain())
    s2ft.save_adapter(dense, tmp_path / "dense")
    again = quantized(kind)
    s2ft.load_adapter(again, tmp_path / "dense", trainable=True)
    for name, delta in mounted_deltas(attachment_of(again)).items():
        assert torch.equal(delta.values, mounted_deltas(attachment_of(dense))[name].values)


@kinds
def test_merging_on_the_dequantized_base_gives_the_trained_logits(kind, tmp_path):
    """The merged model has floating-point weights and the logits of training: nothing is quantized again."""
    model = quantized(kind)
    base = dense_reference(model)
    s2ft.attach(model, UNFUSED)
    train(model, 5)
    s2ft.save_adapter(model, tmp_path)
    before, trained_logits = forward(base), forward(model)
    s2ft.load_adapter(base, tmp_path)
    merged = s2ft.merge(base)
    within = {"nf4-bfloat16": 3e-2, "8bit": 1e-3}.get(kind, LOGITS)  # computed in half precision
    assert relative_difference(before, trained_logits) > 10 * within
    assert relative_difference(forward(merged), trained_logits) <= within


@kinds
def test_another_base_is_refused(kind, tmp_path):
    s2ft.save_adapter(trained(quantized(kind)), tmp_path)
    for other in (quantized(kind, seed=1), plain(seed=1)):
        with pytest.raises(ValueError, match="trained on another base: 2 of 2 layers differ"):
            s2ft.load_adapter(other, tmp_path, trainable=True)
        assert find_attachment(other) is None


def test_adapters_load_on_other_kinds_of_quantization(tmp_path):
    """The fingerprint does not depend on the quantization, nor on whether the first consumer is quantized."""
    s2ft.save_adapter(trained(quantized("nf4")), tmp_path)
    for kind in KINDS:
        s2ft.load_adapter(
            quantized(kind, wanted=lambda path: is_wanted(path) and ".0." not in path), tmp_path, trainable=True
        )


@kinds
def test_loading_for_inference_only_is_refused(kind, tmp_path):
    s2ft.save_adapter(trained(quantized(kind)), tmp_path)
    model = quantized(kind)
    model.lm_head.requires_grad_(False)
    before = kept(model)
    with pytest.raises(ValueError, match="is quantized, .*trainable=True"):
        s2ft.load_adapter(model, tmp_path)
    assert_untouched(model, before)
    s2ft.load_adapter(model, tmp_path, trainable=True)

    logits = forward(model)
    with pytest.raises(ValueError, match="is quantized"):
        s2ft.load_adapter(model, tmp_path, name="second")
    assert s2ft.status(model).adapters == ["default"] == list(s2ft.status(model).active)
    assert torch.equal(forward(model), logits)


@kinds
def test_switching_and_refusing_to_fuse(kind):
    model = quantized(kind)
    base = forward(model)
    trained(model)
    logits = forward(model)
    for change in (s2ft.merge, s2ft.fuse):
        with pytest.raises(ValueError) as error:
            change(model)
        assert NO_FUSE in str(error.value)
        assert torch.equal(forward(model), logits)
    s2ft.set_adapter(model, None)
    assert relative_difference(forward(model), base) <= LOGITS
    assert not any(row.active for row in s2ft.status(model).rows)
    s2ft.set_adapter(model, "default")
    assert torch.equal(forward(model), logits)
    status = s2ft.status(model)
    assert status.trainable == "default" and len(status.rows) == 14 and "active, trainable" in str(status)
    assert train(model)


def test_fusing_a_model_that_is_quantized_in_part_changes_nothing():
    model = trained(quantized("8bit", wanted=lambda path: path.endswith("1.mlp.down_proj")))
    with pytest.raises(ValueError, match="1.mlp.down_proj: an adapter can't be written into a quantized weight"):
        s2ft.fuse(model)
    assert not any(row.fused for row in s2ft.status(model).rows)


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
    planned = s2ft.plan(model, config, calibration)
    report = s2ft.attach(model, config, calibration=calibration)
    assert attachment_of(model).selection == selected
    assert (planned.rows, planned.trainable, planned.total) == (report.rows, report.trainable, report.total)
    train(model)


@kinds
def test_selecting_by_gradient_is_refused(kind):
    model = quantized(kind)
    before = kept(model)
    with pytest.raises(ValueError, match="needs gradients of weights, and .* is quantized"):
        s2ft.attach(
            model, S2FTConfig(**RATIOS, layout="indexed", selection="gradient"), calibration=[token_batch(model)]
        )
    assert_untouched(model, before)


@pytest.mark.parametrize("kind, amount", in_turn(KINDS, (dict(budget=5000), dict(match_lora_rank=8))), ids=str)
def test_budgets_are_those_of_the_unquantized_model(kind, amount):
    config = S2FTConfig(d_ratio=0.1, v_ratio=0.5, layout="indexed", **amount)
    assert s2ft.attach(quantized(kind), config).rows == s2ft.attach(plain(), config).rows


@kinds
def test_verify(kind):
    """Quantized couplings can't be tried. The others are tried, and the attached model is compared with the base."""
    model = quantized(kind)
    s2ft.attach(model, INDEXED, verify=True)
    assert train(model)
    mixed = quantized(kind, wanted=lambda path: "self_attn" in path)
    s2ft.attach(mixed, INDEXED, verify=True)


# ---- copies, states, whole models -----------------------------------------------------------------------


@kinds
def test_copies_and_states(kind):
    model = trained(quantized(kind))
    logits = forward(model)
    other = copy.deepcopy(model)
    assert torch.equal(forward(other), logits)
    train(other)
    assert not torch.equal(forward(other), logits) and torch.equal(forward(model), logits)
    s2ft.detach(other)
    assert_same_contents(contents(other), contents(model))

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = quantized(kind)
    s2ft.attach(fresh, INDEXED)
    state = torch.load(file, weights_only=False)
    if "4bit" in type(fresh.model.layers[0].mlp.down_proj.linear).__name__:  # it can save scales but not load them
        state = {key: value for key, value in state.items() if ".linear.weight." not in key}
    fresh.load_state_dict(state)
    assert torch.equal(forward(fresh), logits)


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
    pytest.importorskip("accelerate")
    if not (folder / "base").exists():
        plain(compute).save_pretrained(folder / "base")
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=CONFIGS[kind](compute), dtype=compute, device_map="cpu"
    ).eval()


@pytest.mark.parametrize("kind, compute", in_turn(("4bit", "8bit"), (torch.float32, torch.bfloat16)), ids=str)
def test_models_that_transformers_quantizes(kind, compute, tmp_path):
    model = loaded(kind, tmp_path, compute)
    assert len(linears(model)) == 14
    logits = forward(model)
    s2ft.attach(model, UNFUSED)
    assert torch.equal(forward(model), logits) and logits.dtype is compute
    losses = train(model, 5)
    assert losses[-1] < losses[0]
    s2ft.save_adapter(model, tmp_path / "adapter")
    other = loaded(kind, tmp_path, compute)
    s2ft.load_adapter(other, tmp_path / "adapter", trainable=True)
    assert torch.equal(forward(other), forward(model))
    base = plain(compute)
    s2ft.load_adapter(base, tmp_path / "adapter")
    s2ft.merge(base)


def trainer(model, folder, **arguments):
    from transformers import Trainer, TrainingArguments

    rows = [
        {"input_ids": row, "labels": row}
        for row in torch.randint(67, (8, 9), generator=torch.Generator().manual_seed(1))
    ]
    arguments = TrainingArguments(
        folder / "run",
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=1e-2,
        seed=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        **{"save_strategy": "no", **arguments},
    )
    return Trainer(model=model, args=arguments, train_dataset=rows)


def deltas_of(model):
    return {name: delta.values for name, delta in mounted_deltas(attachment_of(model)).items()}


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
    run = trainer(model, tmp_path)
    run.train()
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    assert all(delta.any() and delta.dtype is getattr(torch, delta_dtype) for delta in deltas_of(model).values())
    s2ft.save_adapter(model, tmp_path / "adapter")
    s2ft.export_lora(model, tmp_path / "lora")
    assert_same_contents(contents(model), before)
    s2ft.detach(model)
    assert_same_contents(contents(model), before)
    assert type(model.hf_quantizer) is asked
    with pytest.raises(ValueError, match="purely quantized models"):
        trainer(model, tmp_path)


@configs
def test_trainer_with_checkpointing_and_a_loaded_adapter(kind, tmp_path):
    """Both variants of gradient checkpointing give the same deltas, and a loaded adapter can be trained further."""
    found = []
    for more in ({}, dict(use_reentrant=False), dict(use_reentrant=True)):
        model = loaded(kind, tmp_path)
        s2ft.attach(model, INDEXED)
        trainer(
            model, tmp_path, **(dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=more) if more else {})
        ).train()
        found.append(deltas_of(model))
    assert all(torch.equal(value, other[name]) for other in found[1:] for name, value in found[0].items())
    s2ft.save_adapter(model, tmp_path / "adapter")
    other = loaded(kind, tmp_path)
    s2ft.load_adapter(other, tmp_path / "adapter", trainable=True)
    trainer(other, tmp_path).train()
    assert not any(torch.equal(value, found[0][name]) for name, value in deltas_of(other).items())


@configs
def test_trainer_saves_and_resumes(kind, tmp_path):
    """Two steps, a checkpoint and two steps on a newly quantized base equal four steps, bit for bit."""
    whole, half, rest = (loaded(kind, tmp_path) for _ in range(3))
    for model in (whole, half, rest):
        s2ft.attach(model, INDEXED)
    trainer(whole, tmp_path).train()
    saving = dict(save_strategy="steps", save_steps=2)

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    run = trainer(half, tmp_path, **saving)
    run.add_callback(Stop())
    run.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert 0 < size < 3 * 4 * s2ft.get_adapter(half, "default").parameters  # it does not contain the base
    trainer(rest, tmp_path, **saving).train(resume_from_checkpoint=str(checkpoint))
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
    monkeypatch.setattr("s2ft.attached.mounting._mount", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        s2ft.attach(model, INDEXED)
    assert not model.hf_quantizer.is_qat_trainable


@pytest.mark.parametrize("kind", ("4bit", "8bit"))
def test_merging_after_transformers_dequantized_the_base(kind, tmp_path):
    """The error of a refused merge recommends this. The result is a plain checkpoint of transformers."""
    model = loaded(kind, tmp_path)
    s2ft.attach(model, UNFUSED)
    train(model, 5)
    s2ft.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"model\.dequantize\(\)"):
        s2ft.merge(model)
    base = loaded(kind, tmp_path).dequantize()
    s2ft.load_adapter(base, tmp_path / "adapter")
    s2ft.merge(base).save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_difference(forward(again), forward(model)) <= LOGITS


@pytest.mark.parametrize(
    "kind", [kind if kind in ("nf4", "torchao-int4") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_compiling(kind):
    """The model compiles to one graph, with the same gradients as without compilation."""
    torch._dynamo.reset()
    model = quantized(kind)
    del model.model.layers[1:]
    model.config.num_hidden_layers, model.config.use_cache = 1, False
    s2ft.attach(model, INDEXED)
    found, batch = [], token_batch(model)
    for called in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.train().zero_grad()
        called(input_ids=batch, labels=batch).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(found[0]) == 7 and any(gradient.any() for gradient in found[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind, half", in_turn(KINDS, (torch.bfloat16, torch.float16)), ids=str)
def test_autocast_trains(kind, half):
    """Autocast trains the deltas in float32."""
    model = quantized(kind)
    before = contents(model)
    s2ft.attach(model, INDEXED)
    with torch.autocast("cpu", half):
        losses = train(model, 5)
    assert losses[-1] < losses[0]
    assert all(delta.dtype is torch.float32 and delta.any() for delta in deltas_of(model).values())
    assert_same_contents(contents(model), before)


@pytest.mark.parametrize("kind, reentrant", in_turn(KINDS, (False, True)))
def test_checkpointing(kind, reentrant):
    """Checkpointing does not change the deltas, also where the inputs of a block are frozen."""
    found = []
    for on in (False, True):
        model = quantized(kind)
        s2ft.attach(model, INDEXED)
        if on:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
            model.disable_input_require_grads()
        model.config.use_cache = False
        train(model, 1)
        found.append(deltas_of(model))
    assert all(value.any() and torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("kind", ("4bit", "8bit", "torchao-int8"))
def test_an_exported_lora_on_the_quantized_base_in_peft(kind, tmp_path):
    """On the base that the adapter was trained on, PEFT gives the same logits and keeps the same bytes."""
    peft = pytest.importorskip("peft")
    model = loaded(kind, tmp_path)
    base = forward(model)
    s2ft.attach(model, UNFUSED)
    train(model, 5)
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


@pytest.mark.parametrize("layout", ("permuted", "indexed"))
def test_weights_on_the_meta_device_are_not_read(layout, tmp_path):
    """An adapter can wait for them, see distributed/test_meta_ranks.py. What needs their numbers is refused."""
    model = model_of("llama").to("meta")
    with pytest.raises(ValueError, match="selection='weight' reads the weights, and they are on the meta device"):
        s2ft.attach(model, S2FTConfig(d_ratio=0.1, layout=layout, selection="weight"))
    assert find_attachment(model) is None and all(p.requires_grad for p in model.parameters())
    s2ft.attach(model, S2FTConfig(d_ratio=0.1, layout=layout))
    with pytest.raises(ValueError, match="have not arrived on this rank"):
        s2ft.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_four_bits_that_are_not_quantized_yet_are_refused():
    model = plain()
    linear = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = four_bits("nf4")(linear)
    with pytest.raises(ValueError, match="not quantized yet: move the model"):
        s2ft.attach(model, INDEXED)
    with torch.device("meta"):
        model.model.layers[0].mlp.down_proj = four_bits("nf4")(linear)
    with pytest.raises(ValueError, match="down_proj is on the meta device"):
        s2ft.attach(model, INDEXED)


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_counts_parameters_not_packed_bytes(kind):
    dense, model = plain(), quantized(kind)
    config = S2FTConfig(d_ratio=0.1, layout="indexed")
    expected = s2ft.plan(dense, config)
    assert s2ft.plan(model, config).total == expected.total == s2ft.attach(model, config).total
