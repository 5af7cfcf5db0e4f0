"""Tiny models with random weights, and random adapters for them."""

import torch
from support.models import CASES
from support.states import randomize, with_adapter
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import s2ft

TIED = "llama-tied"
MODELS = ("llama-grouped", TIED, "llama", "qwen2", "gpt2")


@torch.no_grad()
def tiny_model(case: str, layers: int = 1, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A model in evaluation mode; every weight, bias and norm is random.

    Args:
        case: one of MODELS.
        layers: how many blocks it has.
        dtype: dtype of its parameters.
        **changes: other fields of its config.
    """
    config = CASES["llama" if case == TIED else case]()
    if case == TIED:
        config = LlamaConfig(**{**config.to_dict(), "tie_word_embeddings": True})
    for name, value in {"num_hidden_layers": layers, **changes}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.normal_(mean=0.5 if parameter.dim() == 1 else 0.0, std=0.2)
    return model.to(dtype)


def ratios(case: str, ratio: float = 0.5) -> dict[str, float]:
    """Ratios for all projections of the case."""
    return {f"{key}_ratio": ratio for key in ("qkvoud" if case == "gpt2" else "qkvougd")}


def make_adapter(model: nn.Module, config: s2ft.S2FTConfig, name: str, seed: int) -> s2ft.Adapter:
    """Attach to a plain model, fill the slices, take the adapter out and detach."""
    adapter = s2ft.get_adapter(randomize(with_adapter(model, config, name), seed, 0.1), name)
    s2ft.detach(model)
    return adapter


def tokens(model: nn.Module, batch: int = 2, length: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
