"""Layers and models for the tests that run on a GPU, at real sizes there, and at small ones on the CPU."""

import pytest
import torch
from torch import Tensor, nn

import s2ft
from support.inside import _linear

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.cuda))
DOWN_PROJ = (4096, 14336)  # outputs and inputs of LLaMA-3-8B's
RATIOS = dict(d_ratio=0.1, o_ratio=0.25, v_ratio=0.25, u_ratio=0.05)


def bits(tensor: Tensor) -> Tensor:
    """The tensor's numbers as integers, so that equal means equal in all bits."""
    return tensor.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


class Layer:
    """Arguments of sliced_linear and the merged weight that its product must equal."""

    def __init__(self, device, dtype=torch.bfloat16, shape=DOWN_PROJ, units=430, start=0, dim=1, tokens=256):
        outputs, inputs = shape if device != "cpu" else (64, 160)
        units = units if device != "cpu" else min(units, 8)
        self.start, self.dim = min(start, (outputs, inputs)[dim] - units), dim
        self.weight = (torch.randn(outputs, inputs, device=device) / 64).to(dtype)
        self.delta = torch.randn((units, inputs) if dim == 0 else (outputs, units), device=device) / 64
        self.x = torch.randn(tokens, inputs, device=device).to(dtype)
        self.before = self.weight.clone()

    def merged(self, delta: Tensor | None = None) -> Tensor:
        """The base with a delta added to the slice, rounded once."""
        delta, weight = self.delta if delta is None else delta, self.before.clone()
        part = weight.narrow(self.dim, self.start, delta.shape[self.dim])
        part.copy_((part + delta).to(weight.dtype))
        return weight

    def arguments(self, delta: Tensor | None = None) -> tuple:
        return self.x, self.weight, self.delta if delta is None else delta, self.start, self.dim

    def check_base(self) -> None:
        assert torch.equal(bits(self.weight), bits(self.before))


def small_model(device: str, dtype: torch.dtype = torch.bfloat16, attach: bool = True) -> tuple[nn.Module, Tensor]:
    """A model of three layers with slices of down, o, v and up, and token ids for it. The same numbers in each call."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1000,
        max_position_embeddings=256,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).train()
    if attach:
        s2ft.attach(model, s2ft.S2FTConfig(**RATIOS))
    return model, torch.randint(1000, (2, 64), device=device)


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """The bits of the base, by name. Between forwards the parameters hold base + delta, a state the base."""
    return {name: bits(one).clone() for name, one in model.state_dict().items() if not name.endswith(".s2")}


def check_frozen(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = frozen(model)
    assert before and all(torch.equal(now[name], old) for name, old in before.items())


def reference(x: Tensor, weight: Tensor, delta: Tensor, start: int, dim: int) -> Tensor:
    """sliced_linear by operators of PyTorch."""
    return _linear.reference(x, weight, delta, None, start, dim, None, None)
