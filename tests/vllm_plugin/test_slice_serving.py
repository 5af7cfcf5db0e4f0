"""Layers of vLLM that hold slices: `S2FT_VLLM_SLICES=1`."""

import json

import pytest
import torch
from safetensors.torch import save_file
from support.vllm_models import ADAPTERS, ALL, PROMPTS, SHAPE, phi3, save_adapters, tiny_llama
from support.vllm_offline import offline
from support.vllm_quantized import quantize
from transformers import GenerationConfig, PhiConfig, PhiForCausalLM, Qwen2Config, Qwen2ForCausalLM

import s2ft

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SLICES = {"S2FT_VLLM_SLICES": "1"}
NAMES = ("base", "down-o", "wide", "other")


def requests(served, names=NAMES):
    """All prompts to all names, and the answers that transformers gives."""
    pairs = [(name, number) for number in range(len(PROMPTS)) for name in names]
    asked = [(None if name == "base" else served.adapters / name, PROMPTS[number]) for name, number in pairs]
    return asked, [served.answers[name][number] for name, number in pairs]


TWO = {**SLICES, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
# options, variables, whether the model is compiled, names of adapters, and what is printed
ENGINES = {
    "one rank": ({}, SLICES, False, NAMES, "s2ft: 16 layers hold the slices of 4 adapters"),
    "two ranks": ({"tensor_parallel_size": 2}, TWO, False, NAMES, "s2ft: 16 layers hold the slices of 4 adapters"),
    # one graph without breaks: torch.compile does not look into the op
    "compiled": ({"enforce_eager": False}, SLICES, True, NAMES, "graphs: 1, breaks: 0"),
    # inputs have a dimension for the batch there
    "from transformers": ({"model_impl": "transformers"}, SLICES, False, ("wide", "base"), ""),
}


@pytest.mark.parametrize("name", ENGINES)
def test_three_adapters_and_the_base_in_one_batch(served, name):
    """Adapters of up to 138 units, on an engine whose LoRA would have rank 1."""
    options, variables, compiled, names, words = ENGINES[name]
    asked, expected = requests(served, names)
    (answers,), printed = offline(served.base, [asked], options, variables, compiled=compiled)
    assert answers == expected and words in printed


def test_adapters_come_and_go(served, tmp_path):
    """Two slots for three adapters. What does not fit is refused with the option, and the engine answers on."""
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["o_proj"]})
    )
    name = "model.layers.0.self_attn.o_proj"
    save_file(
        {
            f"base_model.model.{name}.lora_A.weight": torch.zeros(1, 256),
            f"base_model.model.{name}.lora_B.weight": torch.zeros(256, 1),
        },
        lora / "adapter_model.safetensors",
    )
    pairs = [("down-o", "base"), ("down-o", "other"), ("base", "other"), ("down-o", "base"), ("other", "base")]
    batches, expected = zip(*(requests(served, names) for names in pairs))
    refused = [[(lora, PROMPTS[0])], [(served.adapters / "wide", PROMPTS[0])]]
    units = "o_proj=64,down_proj=60,k_proj=32"  # wide has 63 units in down_proj and slices of other layers
    answers, printed = offline(
        served.base, [batches[0], *refused, *batches[1:]], {"max_loras": 2}, {**SLICES, "S2FT_VLLM_UNITS": units}
    )
    assert [answers[0], *answers[3:]] == list(expected)
    assert "'lora' is no S²FT adapter" in answers[1] and "start it without S2FT_VLLM_SLICES" in answers[1]
    assert (
        "the adapter 'wide' does not fit" in answers[2] and "S2FT_VLLM_UNITS=down_proj=63,gate_up_proj=" in answers[2]
    )
    assert "S2FT_VLLM_UNITS=down_proj=60,o_proj=64,qkv_proj=32" in printed


# the model, the adapter, options and variables, and a number that its units exceed
SIZES = {
    "more units than any rank of vLLM": (
        *({}, dict(d_ratio=0.9), {"max_loras": 1}),
        *({**SLICES, "S2FT_VLLM_UNITS": "700"}, 512),
    ),
    # one key head for two ranks: both have it, and both add its slices
    "ranks that share a key head": (
        dict(num_key_value_heads=1, num_hidden_layers=2),
        dict(k_ratio=1.0, v_ratio=1.0, q_ratio=0.13, d_ratio=0.05),
        *({"tensor_parallel_size": 2}, TWO, 0),
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_other_sizes(name, tmp_path):
    changes, ratios, options, variables, least = SIZES[name]
    served = save_adapters(tiny_llama(**changes), tmp_path, {"a": ratios})
    assert max(len(delta.index) for delta in s2ft.read_adapter(served.adapters / "a").deltas.values()) > least
    asked, expected = requests(served, ("a", "base"))
    (answers,), _ = offline(served.base, [asked], options, variables)
    assert answers == expected


@pytest.mark.parametrize("variable", ("S2FT_VLLM_SLICES", "S2FT_VLLM_UNITS"))
def test_an_option_without_a_valid_value(served, variable):
    """The engine does not start, and says which option it is."""
    with pytest.raises(RuntimeError, match=f"{variable} (is|has) 'many'"):
        offline(served.base, [], {}, {**SLICES, variable: "many"})


def test_a_base_in_4_bits(tmp_path):
    """Slices are added to the output of a layer whose weight is stored in 4 bits."""
    model = tiny_llama().bfloat16()
    quantize(model, tmp_path / "quantized")
    served = save_adapters(model, tmp_path, {"wide": ADAPTERS["wide"]}, scale=0.05)
    asked = [(folder, prompt) for prompt in PROMPTS for folder in (served.adapters / "wide", None)]
    (found,), printed = offline(tmp_path / "quantized", [asked], {"dtype": "bfloat16"}, SLICES, scores=True)
    assert "CPUWNA16LinearKernel" in printed
    base = type(model).from_pretrained(served.base, dtype=torch.float32)
    expected = [scores_by(one, prompt) for prompt in PROMPTS for one in (served.merged("wide"), base)]
    assert max(apart(*pair) for pair in zip(found, expected)) < 0.1
    assert min(apart(*pair) for pair in zip(found[::2], found[1::2])) > 0.3


@torch.no_grad()
def scores_by(model, prompt):
    """The log-probability of each token of a prompt but the first, by transformers."""
    scores = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    return scores.gather(1, torch.tensor(prompt)[1:, None])[:, 0].tolist()


def apart(first, second):
    """The largest difference."""
    return max(abs(one - other) for one, other in zip(first, second, strict=True))


def qwen2():
    """Biases, and sizes that no power of two divides."""
    shape = dict(hidden_size=96, intermediate_size=165, num_hidden_layers=3, num_attention_heads=3)
    config = Qwen2Config(
        **shape, num_key_value_heads=1, vocab_size=512, max_position_embeddings=1024, tie_word_embeddings=True
    )
    return Qwen2ForCausalLM(config), {**ALL, "q_ratio": 0.34, "o_ratio": 0.34, "v_ratio": 1.0, "k_ratio": 1.0}


def phi():
    """Two layers in a feed-forward block, and biases."""
    config = PhiConfig(**SHAPE, vocab_size=512, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2)
    return PhiForCausalLM(config), {name: ratio for name, ratio in ALL.items() if name != "g_ratio"}


@pytest.mark.parametrize("make", (phi3, qwen2, phi))
def test_other_families(make, tmp_path):
    model, ratios = make()
    model.generation_config = GenerationConfig()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    served = save_adapters(model.float().eval(), tmp_path, {"a": ratios}, scale=0.1)
    assert served.answers["a"] != served.answers["base"]
    asked, expected = requests(served, ("a", "base"))
    (answers,), _ = offline(served.base, [asked], {}, SLICES)
    assert answers == expected
