"""What model families read from a transformers model: sizes, paths of layers, the activation of an FFN."""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from s2ft.model.coupling import Coupling

# hidden_act → activation of act_mul, for those of transformers' activations that are PyTorch's own function,
# equal bit for bit. gelu_new, gelu_fast, gelu_accurate and the *_python ones follow the same formulas in
# single operators and round after each: in bfloat16 that is far from gelu.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def attention_paths(block: str, q: str = "q_proj", k: str = "k_proj", v: str = "v_proj", o: str = "o_proj") -> dict:
    """The paths of an attention block's projections, as :meth:`Coupling.attention` takes them."""
    return {"q": f"{block}.{q}", "k": f"{block}.{k}", "v": f"{block}.{v}", "o": f"{block}.{o}"}


def experts(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """One coupling for each expert of a module with transformers' weights [experts, outputs, inputs]."""
    count, _, channels = model.get_submodule(path).down_proj.shape
    paths = {"gate_up": f"{path}.gate_up_proj", "down": f"{path}.down_proj"}
    return Coupling.experts(layer, **paths, channels=channels, experts=count)


def gated_mlp(model: nn.Module, layer: int, path: str, channels: int | None = None, kind: str = "ffn") -> Coupling:
    """The block of llama and similar families: ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``."""
    coupling = Coupling.gated_ffn(
        layer,
        up=f"{path}.up_proj",
        gate=f"{path}.gate_proj",
        down=f"{path}.down_proj",
        channels=channels or model.config.intermediate_size,
        kind=kind,
    )
    return replace(coupling, block=path, activation=activation_of(model, path))


def activation_of(model: nn.Module, mlp: str) -> str | None:
    """The activation of a block as its config has it, if its module is still the one that the name stands for."""
    from transformers.activations import ACT2FN  # not at the top: `import s2ft` would load transformers

    name = getattr(model.config, "hidden_activation", None) or model.config.hidden_act  # gemma's name comes first
    try:
        module = model.get_submodule(f"{mlp}.act_fn")
    except AttributeError:
        return None
    untouched = name in ACTIVATIONS and type(module) is type(ACT2FN[name]) and "forward" not in module.__dict__
    return ACTIVATIONS[name] if untouched else None


def head_sizes(config) -> tuple[int, int, int]:
    """heads, key/value heads, head_dim of a decoder's config."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def under_base(model: nn.Module, name: str) -> str:
    """The path of the base model's module `name`: under a head it stands behind the base model's own name."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}.{name}" if prefix and hasattr(model, prefix) else name


def layers_of(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every layer of the base model's stack `name`; none where the model has no such stack."""
    path = under_base(model, name)
    try:
        stack = model.get_submodule(path)
    except AttributeError:
        return
    yield from ((f"{path}.{i}", module) for i, module in enumerate(stack))
