"""Small random models, one row a case: every model family with what is awkward about it."""
from typing import Callable, Dict

import torch
from transformers import (AutoModelForCausalLM, Cohere2Config, CohereConfig, Gemma2Config, Gemma3TextConfig,
                          GemmaConfig, GraniteConfig, LlamaConfig, MistralConfig, Olmo2Config, OPTConfig, PhiConfig,
                          PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config, SmolLM3Config, StableLmConfig,
                          Starcoder2Config)

from s2ft.arch import couplings_of
from s2ft.coupling import projections_of

SHAPE = dict(hidden_size=24, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4, vocab_size=67)
ODD = {**SHAPE, "hidden_size": 30, "intermediate_size": 41, "num_attention_heads": 3}
ROTARY = {**SHAPE, "hidden_size": 32}   # a part of the head is rotated: the part must be even
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)   # the families' own are outside the small vocabulary
WINDOW = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"])

OPT = dict(hidden_size=24, ffn_dim=41, num_hidden_layers=3, num_attention_heads=4, vocab_size=67, dropout=0.0,
           max_position_embeddings=32)

CASES: Dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE, num_key_value_heads=4),
    "llama-grouped": lambda: LlamaConfig(**SHAPE, num_key_value_heads=2),
    "llama-multi-query": lambda: LlamaConfig(**SHAPE, num_key_value_heads=1),
    "llama-biased": lambda: LlamaConfig(**SHAPE, num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "llama-wide-heads": lambda: LlamaConfig(**SHAPE, num_key_value_heads=2, head_dim=10),
    "llama-odd": lambda: LlamaConfig(**{**SHAPE, "hidden_size": 27, "intermediate_size": 41, "num_attention_heads": 3},
                                     num_key_value_heads=3, head_dim=14),
    "llama-gelu": lambda: LlamaConfig(**SHAPE, num_key_value_heads=4, hidden_act="gelu"),
    "llama-gelu-tanh": lambda: LlamaConfig(**SHAPE, num_key_value_heads=2, hidden_act="gelu_pytorch_tanh"),
    "llama-relu": lambda: LlamaConfig(**SHAPE, num_key_value_heads=4, hidden_act="relu"),
    "mistral": lambda: MistralConfig(**SHAPE, num_key_value_heads=2, head_dim=8),
    "qwen2": lambda: Qwen2Config(**SHAPE, num_key_value_heads=4),
    "qwen2-grouped-tied": lambda: Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16),
    "qwen3-per-head": lambda: Qwen3Config(**SHAPE, num_key_value_heads=4, head_dim=10),
    "gemma": lambda: GemmaConfig(**SHAPE, num_key_value_heads=4, head_dim=10, attention_bias=True),
    "gemma-multi-query": lambda: GemmaConfig(**SHAPE, num_key_value_heads=1, head_dim=8),
    "gemma2": lambda: Gemma2Config(**SHAPE, num_key_value_heads=4, head_dim=10, **WINDOW),
    "gemma2-grouped": lambda: Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, num_key_value_heads=4, head_dim=10, **WINDOW),
    "gemma3-grouped": lambda: Gemma3TextConfig(**SHAPE, num_key_value_heads=2, head_dim=8),
    "granite": lambda: GraniteConfig(**ODD, num_key_value_heads=3, attention_bias=True, mlp_bias=True,
                                     embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2),
    "granite-grouped": lambda: GraniteConfig(**SHAPE, num_key_value_heads=2),
    "smollm3": lambda: SmolLM3Config(**SHAPE, **IDS, num_key_value_heads=4, attention_bias=True, mlp_bias=True,
                                     no_rope_layers=[1, 0, 1]),
    "smollm3-grouped": lambda: SmolLM3Config(**SHAPE, **IDS, num_key_value_heads=2),
    "cohere": lambda: CohereConfig(**SHAPE, **IDS, num_key_value_heads=4, attention_bias=True),
    "cohere-normed": lambda: CohereConfig(**ODD, **IDS, num_key_value_heads=3, use_qk_norm=True),
    "cohere-normed-grouped": lambda: CohereConfig(**SHAPE, **IDS, num_key_value_heads=2, use_qk_norm=True),
    "cohere2": lambda: Cohere2Config(**SHAPE, **IDS, num_key_value_heads=4, head_dim=10, **WINDOW),
    "olmo2": lambda: Olmo2Config(**ODD, **IDS, num_key_value_heads=3, attention_bias=True),
    "olmo2-grouped": lambda: Olmo2Config(**SHAPE, **IDS, num_key_value_heads=2),
    "stablelm": lambda: StableLmConfig(**ROTARY, num_key_value_heads=4, use_qkv_bias=True),
    "stablelm-parallel": lambda: StableLmConfig(**ROTARY, num_key_value_heads=2, use_parallel_residual=True),
    "stablelm-normed": lambda: StableLmConfig(**ROTARY, num_key_value_heads=4, qk_layernorm=True),
    "phi": lambda: PhiConfig(**{**ODD, "hidden_size": 36}, num_key_value_heads=3),
    "phi-normed": lambda: PhiConfig(**ROTARY, num_key_value_heads=4, qk_layernorm=True),
    "phi-multi-query": lambda: PhiConfig(**ROTARY, num_key_value_heads=1),
    "starcoder2": lambda: Starcoder2Config(**SHAPE, **IDS, num_key_value_heads=4, sliding_window=4),
    "starcoder2-grouped": lambda: Starcoder2Config(**SHAPE, **IDS, num_key_value_heads=2, use_bias=False),
    "opt": lambda: OPTConfig(**OPT),
    "opt-post-norm": lambda: OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=16),
}

ALL_RATIOS = dict(q_ratio=0.5, k_ratio=0.5, v_ratio=0.7, o_ratio=0.5, u_ratio=0.2, g_ratio=0.1, d_ratio=0.15)


def model_of(case: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model in evaluation mode whose biases and norms are random too, so that they can't hide."""
    torch.manual_seed(0)
    config = CASES[case]()
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(mean=0.5, std=0.3)
            else:
                parameter.mul_(5)   # the initial 0.02 leaves every block a near identity
        for module in model.modules():
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
                module.weight.normal_(mean=0.5, std=0.3)   # norms of single heads are no vectors
    return model.to(dtype)


def ratios_for(case: str, ratios: Dict[str, float]) -> Dict[str, float]:
    """Of `ratios`, those of projections that the case has; one KV head is trained whole or not at all."""
    keys = {f"{projection.key}_ratio" for projection in projections_of(couplings_of(model_of(case)))}
    whole = ("k_ratio", "v_ratio") if "multi-query" in case else ()
    return {key: 1.0 if key in whole else ratio for key, ratio in ratios.items() if key in keys}


def token_batch(model: PreTrainedModel, batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def train(model: PreTrainedModel, steps: int = 3, lr: float = 1e-2, weight_decay: float = 0.1) -> list:
    """A few AdamW steps; the losses. Leaves the model in evaluation mode."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    batch = token_batch(model)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses
