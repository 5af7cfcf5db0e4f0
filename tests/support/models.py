"""Small random models, one row a case: every model family with what is awkward about it."""
from typing import Callable, Dict

import torch
from transformers import (AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel,
                          Qwen2Config, Qwen3Config)

SHAPE = dict(hidden_size=24, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4, vocab_size=67)

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
    return model.to(dtype)


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
