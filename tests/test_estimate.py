"""Estimated memory, computed before attach, is compared with the same model attached and trained."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.inside import OPTIMIZERS, Memory, Projection, chunked_loss, contiguous_head, storages
from support.models import AUTO, CASES, LAYOUTS, inputs_of, model_of, token_batch
from support.pairs import in_turn, rest_slow
from support.slices import bytes_kept as kept_by, everything as config_for
from support.states import with_adapter
from torch import nn
from transformers import AutoModelForCausalLM, CLIPConfig, LlamaConfig

import s2ft
from s2ft import Coupling, S2FTConfig

KEPT = 0.05  # largest relative error of the bytes kept for backward; without randomness they are equal
ROUTED = ("mixtral", "qwen2-moe", "qwen3-moe", "deepseek")  # the router gives the experts other tokens


# ---- measuring a real model --------------------------------------------------------------------------------


def bytes_kept(model, run) -> int:
    return kept_by([*model.parameters(), *model.buffers()], lambda: run(model))


def training_inputs(model) -> dict[str, Any]:
    """The inputs of a case, with labels where its model has a loss."""
    inputs = inputs_of(model)
    if isinstance(model.config, CLIPConfig):
        return {**inputs, "return_loss": True}
    if type(model).__name__.endswith("ForImageClassification"):
        return {**inputs, "labels": torch.tensor([0, 3])}
    if "decoder_input_ids" in inputs:
        return {**inputs, "labels": inputs["decoder_input_ids"]}
    return {**inputs, "labels": inputs["input_ids"]} if model.get_output_embeddings() is not None else inputs


def attached(model, config):
    return with_adapter(copy.deepcopy(model), config).train()


def check_kept(case, estimated, measured):
    assert measured > 0
    if case.startswith(ROUTED):
        assert abs(estimated - measured) <= KEPT * measured
    else:
        assert estimated == measured


# ---- kept for backward -------------------------------------------------------------------------------------

PRODUCT = [
    ("permuted", torch.float32),
    *(
        pytest.param(*both, marks=pytest.mark.slow)
        for both in (("indexed", torch.bfloat16), ("permuted", torch.bfloat16), ("indexed", torch.float32))
    ),
]


# The tests below have LLaMA, T5, Whisper, BERT, ViT and Mixtral; the other cases differ in heads, biases and norms.
KINDS_OF_BLOCKS = ("gemma2", "phi3", "gpt2", "qwen3-moe", "deepseek-v3", "clip")


@pytest.mark.parametrize("layout,dtype", PRODUCT)
@pytest.mark.parametrize("case", rest_slow(CASES, KINDS_OF_BLOCKS))
def test_kept_bytes_equal_the_measured_ones(case, layout, dtype):
    model, config = model_of(case, dtype), config_for(case, layout=layout)
    inputs = training_inputs(model)
    estimated = s2ft.estimate(model, config, example=inputs)
    check_kept(case, estimated.kept, bytes_kept(attached(model, config), lambda m: m(**inputs)))


@pytest.mark.parametrize(
    "case,labels", [("llama-grouped", (3, 7)), ("bert", (3, 7)), ("vit", ()), ("t5", (3, 7)), ("whisper", (3, 7))]
)
def test_inputs_are_made_with_labels_if_the_model_predicts_tokens(case, labels):
    model, config = model_of(case), config_for(case)
    inputs = {name: torch.cat([value, value[:1]]) for name, value in inputs_of(model).items()}  # three rows
    inputs = {
        name: value[:, :1].expand(3, 7) if name.endswith("input_ids") else value for name, value in inputs.items()
    }
    if model.config.is_encoder_decoder:
        del inputs["decoder_input_ids"]
    inputs |= {"labels": torch.ones(labels, dtype=torch.int64)} if labels else {}
    measured = bytes_kept(attached(model, config), lambda m: m(**inputs))
    estimated = s2ft.estimate(model, config, 3, 7)
    assert estimated.kept == measured and (estimated.batch, estimated.length) == (3, None if case == "vit" else 7)


def checkpointed(reentrant):
    return lambda model: model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": reentrant}
    )


def attending(kind):
    return lambda model: model.set_attn_implementation(kind)


# what is set in the model, options of the config, more inputs, and the dtype of autocast
VARIATIONS = [
    ("llama-grouped", checkpointed(True), {}, {}, None),
    ("mixtral", checkpointed(False), {}, {}, None),
    # statistics of a half-precision norm with a float32 weight
    ("llama-grouped", None, {}, {}, torch.bfloat16),
    ("mixtral", None, {}, {}, torch.bfloat16),
    ("llama-grouped", None, dict(ffn_kernel=False), {}, None),
    ("llama-grouped", None, dict(delta_dtype="float64"), {}, None),
    ("mixtral", None, dict(layers=[0]), {}, None),  # other experts run as in transformers
    ("llama-grouped", attending("eager"), {}, dict(use_cache=True), None),
    # With a cache, the values of Phi-3 are copies. Without one, they are views that keep queries and keys alive.
    *(("phi3", attending("sdpa"), {}, dict(use_cache=use), None) for use in (True, False)),
]
SLOW_VARIATIONS = [
    ("llama-grouped", checkpointed(False), {}, {}, None),
    ("mixtral", checkpointed(True), {}, {}, None),
    ("phi-normed", None, {}, {}, torch.float16),
    ("bert-cross-attention", None, {}, {}, torch.float16),
    ("mixtral", None, dict(layers=[1]), {}, None),
]


@pytest.mark.parametrize(
    "case, change, options, more, autocast",
    [*VARIATIONS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW_VARIATIONS)],
)
def test_kept_with_settings_of_the_model_and_the_config(case, change, options, more, autocast):
    model, config = model_of(case), config_for(case, **options)
    if change is not None:
        change(model)
    inputs = {**training_inputs(model), **more}
    estimated = s2ft.estimate(model, config, example=inputs, autocast=autocast)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        measured = bytes_kept(attached(model, config), lambda m: m(**inputs))
    check_kept(case, estimated.kept, measured)


def test_kept_with_logits_at_some_positions():
    model, config = model_of("llama-grouped"), config_for("llama-grouped")
    ids = token_batch(model)
    measured = bytes_kept(attached(model, config), lambda m: m(input_ids=ids, labels=ids[:, -4:], logits_to_keep=4))
    assert s2ft.estimate(model, config, 2, 9, logits=4).kept == measured < s2ft.estimate(model, config, 2, 9).kept


def test_a_chunked_loss_and_a_packed_head_are_counted():
    """The command line uses both: a loss that keeps no logits, and a packed input of the output layer."""
    model, config = model_of("llama-grouped"), config_for("llama-grouped")
    inputs = training_inputs(model)
    inputs["labels"] = inputs["labels"].masked_fill(torch.arange(9) < 4, -100)
    real = attached(model, config)
    with chunked_loss(model), contiguous_head(model):
        estimated = s2ft.estimate(model, config, example=inputs)
    with chunked_loss(real), contiguous_head(real):
        assert estimated.kept == bytes_kept(real, lambda m: m(**inputs))


def test_a_custom_loss():
    model, config = model_of("llama-grouped"), config_for("llama-grouped")
    ids = token_batch(model)

    def loss(m, inputs):
        return m(inputs["input_ids"]).logits[..., 0].square().sum()

    measured = bytes_kept(attached(model, config), lambda m: loss(m, {"input_ids": ids}))
    assert s2ft.estimate(model, config, 2, 9, loss=loss).kept == measured


MLP = Coupling("ffn", 0, (Projection("u", "0", 64, 1, 0),), Projection("d", "2", 64, 1, 1))
NET = Coupling("ffn", 0, (Projection("u", "0", 16, 1, 0),), Projection("d", "3", 16, 1, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_custom_models(layout):
    mlp = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16, affine=False, track_running_stats=False),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, stride=2, padding=1),
    )
    for model, coupling, x in ((mlp, MLP, torch.randn(5, 16)), (net, NET, torch.randn(5, 3, 6, 6))):
        config = S2FTConfig(u_ratio=0.25, d_ratio=0.25, layout=layout)
        real = with_adapter(copy.deepcopy(model), config, couplings=[coupling], verify=False)
        measured = bytes_kept(real.train(), lambda m: m(x))
        for example in (x, (x,), {"input": x}):
            estimated = s2ft.estimate(model, config, example=example, couplings=[coupling])
            assert (estimated.kept, estimated.batch, estimated.length) == (measured, 5, None)


@pytest.mark.parametrize(
    "ran,dtype",
    [
        (True, torch.bfloat16),
        *(
            pytest.param(*both, marks=pytest.mark.slow)
            for both in ((False, torch.float32), (True, torch.float32), (False, torch.bfloat16))
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "kind",
    rest_slow(
        ("nf4", "fp4", "nf4-bfloat16", "8bit", "torchao-int8", "torchao-float8", "torchao-int4"),
        ("nf4", "8bit", "torchao-int8", "torchao-int4"),
    ),
)
def test_quantized_bases(kind, dtype, ran):
    """Before and after a first forward, in which bitsandbytes packs weights. The bytes of the model do not change."""
    quantized = pytest.importorskip("test_quantized")
    model = quantized.quantized(kind, dtype)
    ids = token_batch(model)
    if ran:
        with torch.no_grad():
            model(ids)
    before = quantized.contents(model)
    estimated = s2ft.estimate(model, quantized.INDEXED, example={"input_ids": ids, "labels": ids})
    quantized.assert_same_contents(quantized.contents(model), before)
    assert estimated.parameters - estimated.gradients < sum(p.nbytes for p in quantized.plain(dtype).parameters())
    s2ft.attach(model, quantized.INDEXED)
    measured = bytes_kept(model.train(), lambda m: m(input_ids=ids, labels=ids))
    assert abs(estimated.kept - measured) <= KEPT * measured  # the first forward may cast biases


# ---- parameters, gradients, optimizer, peak ------------------------------------------------------------------


def nbytes(tensors) -> int:
    return sum({storage.data_ptr(): storage.nbytes() for t in tensors for storage in storages(t)}.values())


def real_step(model, optimizer, inputs):
    """Run one step of an attached model. Returns the optimizer."""
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
    output = model(**inputs)
    (
        output["loss"]
        if output.get("loss") is not None
        else sum(v.sum() for v in output.values() if isinstance(v, torch.Tensor) and v.requires_grad)
    ).backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", (torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)), ids=str)
@pytest.mark.parametrize(
    "case",
    rest_slow(
        ("llama-grouped", "qwen2-grouped-tied", "mixtral", "t5", "phi3", "gpt2", "whisper", "clip", "opt-post-norm"),
        ("llama-grouped", "qwen2-grouped-tied", "mixtral", "t5"),
    ),
)
def test_parameters_gradients_and_optimizer_are_real_storages(case, dtype):
    model = model_of(case, dtype)
    config = config_for(case, layout="indexed")
    inputs = training_inputs(model)
    estimated = s2ft.estimate(model, config, example=inputs)
    planned = s2ft.plan(model, config)
    real = attached(model, config)
    optimizer = real_step(real, torch.optim.AdamW, inputs)
    assert estimated.parameters == nbytes(real.parameters()) and estimated.buffers == nbytes(real.buffers())
    assert estimated.trained == planned.trainable
    assert estimated.gradients == nbytes(p.grad for p in real.parameters() if p.grad is not None)
    assert estimated.optimizer == nbytes(t for state in optimizer.state.values() for t in state.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_by_name(name):
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    # its slices are larger than what 8-bit optimizers leave in float32
    shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=67)
    model, config = AutoModelForCausalLM.from_config(LlamaConfig(**shape)), S2FTConfig(d_ratio=0.5)
    real = attached(model, config)
    ids = token_batch(model)
    optimizer = real_step(real, OPTIMIZERS[name], {"input_ids": ids, "labels": ids})
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    assert s2ft.estimate(model, config, 2, 9, optimizer=name).optimizer == nbytes(tensors)


@pytest.mark.parametrize(
    "case, options",
    in_turn(
        ("llama-grouped", "gpt2", "t5", "vit"),
        (dict(), dict(gradient_checkpointing=True), dict(optimizer="sgd"), dict(accumulation=4)),
    ),
    ids=str,
)
def test_peak_is_that_of_a_real_step(case, options):
    """Counts each storage that operators allocate from the second step on, when the optimizer has its state."""
    model, config = model_of(case), config_for(case)
    inputs = training_inputs(model)
    estimated = s2ft.estimate(model, config, example=inputs, **options)
    real = attached(model, config)
    if "gradient_checkpointing" in options:
        real.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    optimizer = real_step(real, OPTIMIZERS[options.get("optimizer", "adamw")], inputs)
    real.zero_grad()
    memory = Memory(real, torch.device("cpu"))
    for tensor in [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]:
        memory.watch(tensor)
    with memory:
        for _ in range(options.get("accumulation", 1)):
            real(**inputs).loss.backward()
        optimizer.step()
    weights = estimated.parameters + estimated.buffers
    assert estimated.peak == weights + memory.peaks[""]
    assert estimated.peak > weights + estimated.optimizer + estimated.kept


@pytest.mark.parametrize("case", ("llama-grouped", "vit"))
def test_a_lora_is_counted_to_compare(case):
    peft = pytest.importorskip("peft")
    model = model_of(case)
    names = ["q_proj", "down_proj"] if case == "llama-grouped" else ["fc1", "q_proj"]
    config, inputs = peft.LoraConfig(r=4, target_modules=names), training_inputs(model)
    estimated = s2ft.estimate(model, config, example=inputs)
    real = copy.deepcopy(model)
    peft.inject_adapter_in_model(config, real)
    assert estimated.kept == bytes_kept(real.train(), lambda m: m(**inputs))
    assert estimated.trained == sum(p.numel() for p in real.parameters() if p.requires_grad) > 0
    with pytest.raises(ValueError, match="leave out strategy"):
        s2ft.estimate(model, config, example=inputs, strategy="fsdp2")


# ---- the device of the model; the model does not change ----------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)), ids=str)
@pytest.mark.parametrize(
    "case",
    rest_slow(
        ("qwen2-grouped-tied", "mixtral", "gemma2", "llama-grouped", "gpt2", "phi3"), ("qwen2-grouped-tied", "mixtral")
    ),
)
def test_a_model_on_the_meta_device_is_counted_alike(case, dtype):
    config = config_for(case, layout="indexed")
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(CASES[case](), dtype=dtype)
    real = AutoModelForCausalLM.from_config(CASES[case](), dtype=dtype)
    with_weights = s2ft.estimate(real, config, 2, 9)
    with torch.device("meta"):  # where the model was created
        without = s2ft.estimate(meta, config, 2, 9)
    assert without.parts == with_weights.parts and without.peak == with_weights.peak
    assert with_weights.resident == nbytes([*real.parameters(), *real.buffers()]) and without.resident == 0
    assert all(p.is_meta for p in meta.parameters())


@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_a_model_that_accelerate_will_load_again_is_counted_alike(device, monkeypatch):
    model, config = model_of("llama").to(device), config_for("llama")
    expected = s2ft.estimate(model, config, 2, 9)
    monkeypatch.setattr("s2ft.attached.mounting.will_be_loaded_again", lambda: True)
    found = s2ft.estimate(model, config, 2, 9)
    assert found.parts == expected.parts and found.peak == expected.peak


@pytest.mark.parametrize("case", rest_slow(("t5", "llama-grouped", "gpt2"), ("t5",)))
def test_weights_in_another_dtype(case):
    """from_pretrained does this: T5 keeps some weights in float32 when it is loaded in float16."""
    for dtype in (torch.bfloat16, torch.float16):
        model = model_of(case)
        loaded = AUTO.get(type(model.config), AutoModelForCausalLM).from_config(model.config, dtype=dtype)
        for name, wanted in model._get_dtype_plan(dtype).items():
            for path, parameter in loaded.named_parameters():
                if f".{name}." in path:
                    parameter.data = parameter.data.to(wanted)
        config = config_for(case)
        assert s2ft.estimate(model, config, 2, 9, dtype=dtype).parts == s2ft.estimate(loaded, config, 2, 9).parts


def everything(model) -> dict[str, Any]:
    """All state that an estimate might change."""
    return {
        "tensors": [
            (id(t), t.data_ptr(), t._version, t.requires_grad, id(t.grad), t.device, t.dtype)
            for t in [*model.parameters(), *model.buffers()]
        ],
        "modules": [
            (type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
            for m in model.modules()
        ],
        "random": torch.get_rng_state().tolist(),
        "config": str(getattr(model, "config", "")),
    }


@pytest.mark.parametrize(
    "meta, options",
    (
        (False, dict()),
        (True, dict(gradient_checkpointing="reentrant")),
        (True, dict(dtype=torch.bfloat16)),
        (False, dict(optimizer=lambda ps: 1)),
        (False, dict(loss=lambda m, inputs: torch.ones(()))),
    ),
)
@pytest.mark.parametrize("case", rest_slow(("llama-grouped", "mixtral", "whisper"), ("llama-grouped",)))
def test_the_model_does_not_change(case, meta, options):
    """It does not change when the estimate fails either."""
    model = model_of(case)
    if meta:
        model = model.to("meta")
    next(iter(model.parameters())).requires_grad_(False)
    some = list(model.parameters())[2]
    some.grad = torch.ones_like(some)
    before, state = everything(model), {key: value.clone() for key, value in model.state_dict().items()}
    try:
        s2ft.estimate(model, config_for(case), 2, 9, **options)
    except (TypeError, ValueError):
        assert "optimizer" in options or "loss" in options
    else:
        assert "optimizer" not in options and "loss" not in options
    assert everything(model) == before
    if not meta:
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_layers_that_are_dropped_at_random_are_counted():
    """The random draw does not change the state of the generator."""
    dropping, plain, config = model_of("opt"), model_of("opt"), config_for("opt")
    dropping.model.decoder.layerdrop = 0.9
    before = torch.get_rng_state()
    assert s2ft.estimate(dropping, config, 2, 9).parts == s2ft.estimate(plain, config, 2, 9).parts
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_allocated_for_the_weights():
    """The weights of this model fit on no machine."""
    config = LlamaConfig(
        hidden_size=2**15, intermediate_size=2**17, num_hidden_layers=40, num_attention_heads=256, vocab_size=2**18
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    estimated = s2ft.estimate(model, S2FTConfig(d_ratio=0.01, layers=[38, 39]), 1, 16)
    assert estimated.parameters > 2**40 and estimated.fits is False


# ---- the report --------------------------------------------------------------------------------------------


def test_whether_it_fits_counts_loaded_weights_once():
    model = model_of("llama")
    estimated = s2ft.estimate(model, S2FTConfig(d_ratio=0.1), 2, 9)
    needed = estimated.peak - nbytes([*model.parameters(), *model.buffers()])
    for free, text in ((needed, "it fits"), (needed - 1, "It will not fit"), (None, "free memory of cpu is not known")):
        found = replace(estimated, free=free)
        assert text in found.summary() and found.fits is {needed: True, None: None}.get(free, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_missing_gpu():
    estimated = s2ft.estimate(model_of("llama"), S2FTConfig(d_ratio=0.1), 2, 9, device="cuda")
    assert estimated.device == "cuda" and estimated.free is None and estimated.resident == 0
    assert "the kernels of the CPU are counted" in estimated.notes[0] and estimated.notes[0] in str(estimated)


@pytest.mark.parametrize(
    "config",
    (
        S2FTConfig(d_ratio=0.1, selection="activation", order="smallest"),
        S2FTConfig(d_ratio=0.1, selection="weight", allocation="global"),
    ),
    ids=str,
)
def test_selections_that_need_weights_or_data_are_of_the_same_size(config):
    model = model_of("llama")
    estimated = s2ft.estimate(model, config, 2, 9)
    assert estimated.parts == s2ft.estimate(model, S2FTConfig(d_ratio=0.1), 2, 9).parts
    assert "is counted as random and uniform" in str(estimated)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_units_by_hand_and_budgets(device, tmp_path):
    """Also from a file, and where new tensors have no data."""
    model = model_of("llama")
    units = s2ft.select(model, S2FTConfig(d_ratio=0.2, layers=[1]))
    units.save(tmp_path / "units.json")
    with torch.device(device):
        estimated = s2ft.estimate(model, S2FTConfig(units=str(tmp_path / "units.json")), 2, 9)
    assert estimated.trained == s2ft.plan(model, S2FTConfig(units=units)).trainable
    for config in (
        S2FTConfig(units=units),
        S2FTConfig(d_ratio=0.2, budget=2000),
        S2FTConfig(d_ratio=0.2, exclude=units),
    ):
        estimated = s2ft.estimate(model, config, 2, 9)
        assert estimated.trained == s2ft.plan(model, config).trainable and not estimated.notes


# ---- refused arguments and models --------------------------------------------------------------------------

LLAMA = S2FTConfig(d_ratio=0.1)


@pytest.mark.parametrize(
    "arguments,options,error,text",
    [
        (("config", 2, 9), {}, TypeError, "config must be an S2FTConfig, got str"),
        ((LLAMA,), {}, ValueError, "batch must be a whole number of at least 1, got None"),
        ((LLAMA, 0, 9), {}, ValueError, "batch must be a whole number of at least 1, got 0"),
        ((LLAMA, True, 9), {}, ValueError, "batch must be a whole number"),
        ((LLAMA, 2), {}, ValueError, "length must be given for LlamaForCausalLM"),
        ((LLAMA, 2, 9.0), {}, ValueError, "length must be a whole number of at least 1, got 9.0"),
        ((LLAMA, 2, 9), dict(logits=10), ValueError, "logits must be at most length, 9, got 10"),
        ((LLAMA, 2, 9), dict(accumulation=0), ValueError, "accumulation must be a whole number"),
        ((LLAMA, 2, 9), dict(use_cache="no"), TypeError, "use_cache must be True, False or None, got 'no'"),
        ((LLAMA, 2, 9), dict(optimizer="adamw2"), ValueError, "optimizer must be one of adamw, .*got 'adamw2'"),
        ((LLAMA, 2, 9), dict(optimizer=3), TypeError, "optimizer must be a name, or a class or function .*got int"),
        (
            (LLAMA, 2, 9),
            dict(optimizer=lambda ps: 3),
            TypeError,
            "optimizer must make a torch.optim.Optimizer, got int",
        ),
        ((LLAMA, 2, 9), dict(autocast=torch.float32), ValueError, "autocast must be torch.bfloat16 or torch.float16"),
        (
            (LLAMA, 2, 9),
            dict(dtype=torch.int8),
            ValueError,
            "dtype must be a floating-point torch.dtype, got torch.int8",
        ),
        (
            (LLAMA, 2, 9),
            dict(dtype="bfloat16"),
            ValueError,
            "dtype must be a floating-point torch.dtype, got 'bfloat16'",
        ),
        ((LLAMA, 2, 9), dict(device="tpu"), ValueError, "device must be 'cpu' or 'cuda', got 'tpu'"),
        ((LLAMA, 2, 9), dict(device="meta"), ValueError, "device must be 'cpu' or 'cuda', got 'meta'"),
        ((LLAMA, 2, 9), dict(gradient_checkpointing="yes"), ValueError, "gradient_checkpointing must be True, False, "),
        ((LLAMA, 2, 9), dict(example=torch.ones(2, 9)), ValueError, "example gives .* leave out batch, length"),
        ((LLAMA,), dict(example="text"), TypeError, "example must be a tensor, a tuple or a dict, got str"),
        ((LLAMA,), dict(example={}), ValueError, "example has no tensor"),
        ((LLAMA, 2, 9), dict(loss=1), TypeError, "loss must be a function of"),
        (
            (LLAMA, 2, 9),
            dict(loss=lambda m, x: torch.ones(())),
            ValueError,
            "no output .*depends on the trained parameters",
        ),
        ((S2FTConfig(u_ratio=0.5, layers=[7]), 2, 9), {}, ValueError, "layers names"),
    ],
)
def test_errors_name_the_argument(arguments, options, error, text):
    with pytest.raises(error, match=text):
        s2ft.estimate(model_of("llama"), *arguments, **options)


def of_mlp(*size, kind=nn.Sequential, **options):
    net = kind(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    return lambda: s2ft.estimate(net, LLAMA, *size, couplings=[MLP], **options)


class Early(nn.Sequential):
    """Its computation depends on values."""

    def forward(self, x):
        y = self[1](self[0](x))
        return self[2](y) if y.sum() > 0 else self[2](y[:, :])


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: s2ft.estimate(model_of("bert"), LLAMA, 2, 9, logits=3), "logits=3: BertForMaskedLM"),
        (of_mlp(example=torch.ones(2, 16), gradient_checkpointing=True), "Sequential does not support it"),
        (of_mlp(2), "Sequential is not a model of transformers"),
        (
            of_mlp(example=torch.ones(2, 16), kind=Early),
            "Early can't be estimated without running it on its weights: its forward can.t run on tensors",
        ),
        (lambda: s2ft.estimate(attached(model_of("llama"), LLAMA), LLAMA, 2, 9), "adapter already .default."),
    ],
)
def test_models_that_cannot_be_counted_are_refused_by_name(call, text):
    with pytest.raises(ValueError, match=text):
        call()


# ---- on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", ("llama-grouped", "gpt2", "gemma2", "t5", "mixtral"))
def test_kept_on_a_gpu(case, dtype):
    model, config = model_of(case, dtype).cuda(), config_for(case)
    inputs = {name: value.cuda() for name, value in training_inputs(model).items()}
    estimated = s2ft.estimate(model, config, example=inputs)
    measured = bytes_kept(attached(model, config), lambda m: m(**inputs))
    assert abs(estimated.kept - measured) <= KEPT * measured
