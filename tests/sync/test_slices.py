"""What is sent: the slices of the checkpoint's tensors, with the numbers that merging writes."""

import pytest
import torch
from support.checkpoint_engine import CheckpointEngine, tensors_of
from support.composites import composite_of, missing
from support.models import ALL_RATIOS, CASES, model_of, ratios_for

import s2ft
from s2ft.sync.slices import TrainedSlices
from s2ft.sync.wire import hashes_of, to_message

FAST = ("llama-grouped", "gpt2", "mixtral", "qwen2-grouped-tied")
ALL = [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in CASES]


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def sent(slices, folder):
    """The tensors of an engine after it has got these slices, which checks the base's hashes."""
    engine = CheckpointEngine(folder, slices.dtype)
    names = {str(slices.dtype).removeprefix("torch."): slices.dtype}
    info = {"sender": "me", "dtype": next(iter(names)), "slices": to_message(slices.specs)}
    engine.init_weight_transfer_engine({"init_info": {**info, "transport": {"kind": "direct"}, "take_over": False}})
    engine.start_weight_update()
    engine.update_weights({"update_info": {"sender": "me", "step": 0, "tensor": slices.buffer()}})
    return engine


def check(slices, folder, merge):
    engine = sent(slices, folder / "base")
    merge().save_pretrained(folder / "merged")
    expected = tensors_of(folder / "merged")
    assert engine.weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(engine.weights[name], tensor.to(slices.dtype)), name
    changed = [name for name, tensor in expected.items() if not torch.equal(tensor, tensors_of(folder / "base")[name])]
    assert set(changed) <= {spec.name for spec in slices.specs} and changed


@pytest.mark.parametrize("layout", ["permuted", "indexed"])
@pytest.mark.parametrize("case", ALL)
def test_slices_of_an_attached_model_are_those_of_the_merged_checkpoint(case, layout, tmp_path):
    model = model_of(case)
    model.save_pretrained(tmp_path / "base")
    s2ft.attach(model, s2ft.S2FTConfig(**ratios_for(case, ALL_RATIOS), layout=layout))
    slices = TrainedSlices.of(model)
    randomize(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert slices.numel == trained == slices.buffer().numel()
    check(slices, tmp_path, lambda: s2ft.merge(model))


@pytest.mark.parametrize("case", ALL)
def test_slices_of_a_peft_model_are_those_of_the_merged_checkpoint(case, tmp_path):
    from peft import get_peft_model

    from s2ft.peft import S2FTPeftConfig

    model = model_of(case)
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(model, S2FTPeftConfig(**ratios_for(case, ALL_RATIOS)), autocast_adapter_dtype=False)
    slices = TrainedSlices.of(model)
    randomize(model)
    assert slices.numel == sum(p.numel() for p in model.parameters() if p.requires_grad)
    check(slices, tmp_path, model.merge_and_unload)


# ---- weights in full, refusals -------------------------------------------------------------------------


def test_weights_that_are_trained_in_full_are_sent_in_full(tmp_path):
    """The final norm by its name, and a norm of a block that was unfrozen by hand."""
    model = model_of("llama-grouped")
    model.save_pretrained(tmp_path / "base")
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1, modules_to_save=["model.norm"]))
    model.model.layers[1].input_layernorm.weight.requires_grad_(True)
    slices = TrainedSlices.of(model)
    randomize(model)
    names = {spec.name: spec for spec in slices.specs}
    whole = names["model.norm.weight"]
    assert whole.dim == 0 and whole.values_shape == whole.shape == (24,)
    assert "model.layers.1.input_layernorm.weight" in names
    check(slices, tmp_path, lambda: s2ft.merge(model))


def test_a_tied_head_that_is_trained_has_the_name_in_the_files(tmp_path):
    model = model_of("qwen2-grouped-tied")
    model.save_pretrained(tmp_path / "base")
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1, modules_to_save=["lm_head"]))
    slices = TrainedSlices.of(model)
    assert slices.specs[-1].name == "model.embed_tokens.weight"
    randomize(model)
    check(slices, tmp_path, lambda: s2ft.merge(model))


def test_modules_to_save_of_peft_are_sent_in_full(tmp_path):
    from peft import get_peft_model

    from s2ft.peft import S2FTPeftConfig

    model = model_of("llama-grouped")
    model.save_pretrained(tmp_path / "base")
    config = S2FTPeftConfig(d_ratio=0.1, modules_to_save=["lm_head"])
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    slices = TrainedSlices.of(model)
    randomize(model)
    assert slices.specs[-1].name == "lm_head.weight"
    check(slices, tmp_path, model.merge_and_unload)


def test_a_weight_that_is_unfrozen_later_is_not_forgotten():
    model = model_of("llama-grouped")
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
    slices = TrainedSlices.of(model)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="model.norm.weight was unfrozen or frozen .*: make a new SliceSender"):
        slices.buffer()


def test_a_trained_bias_of_a_coupling_is_refused():
    model = model_of("llama-biased")
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
    model.model.layers[0].mlp.down_proj.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="down_proj.bias requires a gradient, .* would not be sent"):
        TrainedSlices.of(model)


def test_units_of_two_projections_in_one_weight_are_one_slice():
    """GPT-2's c_attn has queries, keys and values in one weight, with the inputs first."""
    model = model_of("gpt2")
    s2ft.attach(model, s2ft.S2FTConfig(q_ratio=0.5, v_ratio=0.5))
    specs = {spec.name: spec for spec in TrainedSlices.of(model).specs}
    spec = specs["transformer.h.0.attn.c_attn.weight"]
    assert spec.dim == 1 and spec.shape == (24, 72) and bool((spec.index.diff() > 0).all())
    assert spec.index.numel() == 24 and len(specs) == 3


def test_experts_are_separate_tensors_of_the_files():
    model = model_of("mixtral")
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.2, u_ratio=0.1))
    names = {spec.name for spec in TrainedSlices.of(model).specs}
    assert all(".block_sparse_moe.experts." in name and name.endswith((".w2.weight", ".w3.weight")) for name in names)


def test_numbers_are_rounded_first_as_the_trainer_merges_and_then_to_the_engine():
    model = model_of("llama-grouped", torch.float32)
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
    randomize(model)
    exact = TrainedSlices.of(model).buffer()
    assert exact.dtype == torch.float32
    assert torch.equal(TrainedSlices.of(model, torch.bfloat16).buffer(), exact.bfloat16())


def test_the_float32_delta_of_a_bfloat16_base_is_rounded_once(tmp_path):
    model = model_of("llama-grouped", torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1, o_ratio=0.5, delta_dtype="float32"))
    slices = TrainedSlices.of(model)
    randomize(model)
    assert slices.dtype == torch.bfloat16
    check(slices, tmp_path, lambda: s2ft.merge(model))


def test_fused_layers_send_the_same(tmp_path):
    model = model_of("llama-grouped")
    s2ft.attach(model, s2ft.S2FTConfig(**ratios_for("llama-grouped", ALL_RATIOS)))
    randomize(model)
    before = TrainedSlices.of(model)
    s2ft.fuse(model)
    after = TrainedSlices.of(model)
    assert torch.equal(before.buffer(), after.buffer())
    assert all(torch.equal(one.hashes, two.hashes) for one, two in zip(before.specs, after.specs))


def test_an_adapter_that_is_off_or_not_alone_is_refused(tmp_path):
    model = model_of("llama-grouped")
    with pytest.raises(ValueError, match="has no S²FT adapter"):
        TrainedSlices.of(model)
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="old")
    s2ft.save_adapter(model, tmp_path / "old")
    s2ft.detach(model)
    s2ft.load_adapter(model, tmp_path / "old")
    with pytest.raises(ValueError, match="not active, so there is nothing to send: attach one"):
        TrainedSlices.of(model)
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="new")
    slices = TrainedSlices.of(model)
    s2ft.set_adapter(model, None)
    with pytest.raises(ValueError, match="call s2ft.set_adapter"):
        slices.buffer()
    s2ft.set_adapter(model, {"old": 1.0, "new": 1.0})
    with pytest.raises(ValueError, match="adapter 'old' is active together with the trainable one"):
        TrainedSlices.of(model)


def test_what_peft_can_not_send_is_refused():
    from peft import LoraConfig, get_peft_model

    from s2ft.peft import S2FTPeftConfig

    lora = get_peft_model(model_of("llama-grouped"), LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="adapter 'default' of the PeftModel is of LoraConfig"):
        TrainedSlices.of(lora)
    tokens = S2FTPeftConfig(d_ratio=0.1, trainable_token_indices=[3])
    with pytest.raises(ValueError, match="trainable_token_indices, which are not sent"):
        TrainedSlices.of(get_peft_model(model_of("llama-grouped"), tokens))
    model = get_peft_model(model_of("llama-grouped"), S2FTPeftConfig(d_ratio=0.1))
    model.merge_adapter()
    with pytest.raises(ValueError, match="call unmerge_adapter first"):
        TrainedSlices.of(model)
    model.unmerge_adapter()
    slices = TrainedSlices.of(model)
    with model.disable_adapter(), pytest.raises(ValueError, match="are disabled"):
        slices.buffer()


def test_two_active_adapters_of_peft_are_sent_as_their_sum(tmp_path):
    from peft import get_peft_model

    from s2ft.peft import S2FTPeftConfig

    model = model_of("llama-grouped")
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(model, S2FTPeftConfig(d_ratio=0.1, seed=1), "one", autocast_adapter_dtype=False)
    model.add_adapter("two", S2FTPeftConfig(d_ratio=0.2, o_ratio=0.5, seed=2), autocast_adapter_dtype=False)
    model.base_model.set_adapter(["one", "two"])
    slices = TrainedSlices.of(model)
    randomize(model)
    check(slices, tmp_path, model.merge_and_unload)


def test_a_quantized_base_is_refused():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = model_of("llama-grouped")
    quantize_(model.model.layers, Int8WeightOnlyConfig())
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.2, layout="indexed"))
    with pytest.raises(ValueError, match="down_proj is quantized, and merged numbers can't be written"):
        TrainedSlices.of(model)


def test_experts_that_the_files_keep_in_one_tensor_are_refused():
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=67, num_local_experts=4, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.2))
    with pytest.raises(ValueError, match="experts.down_proj: its checkpoint has the experts in one tensor"):
        TrainedSlices.of(model)
    s2ft.detach(model)
    s2ft.attach(model, s2ft.S2FTConfig(o_ratio=0.5))
    assert TrainedSlices.of(model).numel == 2 * 2 * 8 * 32


def test_the_memory_of_a_sync_is_that_of_the_slices():
    """No whole weight is copied: neither one of the adapted weights nor the model."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            inputs = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)}
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in inputs:
                self.made = max(self.made, out.numel())
            return out

    model = model_of("llama-grouped")
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.05, o_ratio=0.25))
    slices = TrainedSlices.of(model)
    with Largest() as largest:
        slices.buffer()
    weight = model.model.layers[0].mlp.down_proj.weight.numel()
    assert 0 < largest.made == slices.numel < weight


# ---- models with several parts -------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl", "gemma3"])
def test_models_of_images_and_text_have_the_names_of_their_files(model_type, tmp_path):
    if missing(model_type):
        pytest.skip("not in this release of transformers")
    model = composite_of(model_type)
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.2, u_ratio=0.1, o_ratio=0.5))
    slices = TrainedSlices.of(model)
    randomize(model)
    check(slices, tmp_path, lambda: s2ft.merge(model))


def test_a_peft_delta_in_float32_on_a_bfloat16_base(tmp_path):
    """PEFT makes adapters of half-precision bases in float32."""
    from peft import get_peft_model

    from s2ft.peft import S2FTPeftConfig

    model = model_of("llama-grouped", torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(model, S2FTPeftConfig(d_ratio=0.2, o_ratio=0.5))
    assert {one.dtype for one in model.parameters() if one.requires_grad} == {torch.float32}
    slices = TrainedSlices.of(model)
    randomize(model)
    assert slices.dtype == torch.bfloat16
    check(slices, tmp_path, model.merge_and_unload)


def test_a_model_that_is_not_of_transformers_has_the_names_of_its_weights():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(6, 20), torch.nn.Linear(20, 6)

        def forward(self, x):
            return self.down(self.up(x).relu())

    model = Net()
    base = {name: one.clone() for name, one in model.state_dict().items()}
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.25, layout="indexed"), example=torch.randn(2, 6))
    slices = TrainedSlices.of(model)
    randomize(model)
    (spec,) = slices.specs
    values = slices.buffer().view(spec.values_shape)
    merged = s2ft.merge(model).state_dict()
    assert spec.name == "down.weight" and torch.equal(merged[spec.name].index_select(1, spec.index), values)
    assert torch.equal(hashes_of(base[spec.name].index_select(1, spec.index), 1), spec.hashes)
