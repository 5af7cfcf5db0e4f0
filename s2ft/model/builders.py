"""What model families read from a transformers model: sizes, paths of layers, the activation of an FFN."""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from s2ft.model.coupling import Coupling
from s2ft.ops.act_mul import ACTIVATIONS

# hidden_act of a config → activation of act_mul
HIDDEN_ACTS = {hidden_act: name for name, act in ACTIVATIONS.items() for hidden_act in act.hidden_acts}


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
    """The activation that the config names, if the block's module is of the class that this name stands for."""
    from transformers.activations import ACT2FN  # not at the top, where it would load transformers with every import

    # gemma has both attributes, and uses the first
    name = getattr(model.config, "hidden_activation", None) or model.config.hidden_act
    try:
        module = model.get_submodule(f"{mlp}.act_fn")
    except AttributeError:
        return None
    untouched = name in HIDDEN_ACTS and type(module) is type(ACT2FN[name]) and "forward" not in module.__dict__
    return HIDDEN_ACTS[name] if untouched else None


def head_sizes(config) -> tuple[int, int, int]:
    """The number of heads, the number of key/value heads and the head size in a model's config."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def under_base(model: nn.Module, name: str) -> str:
    """The path of a module of the base model, which starts with `base_model_prefix` if the model has a head."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}.{name}" if prefix and hasattr(model, prefix) else name


def layers_of(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over (path, module) of the layers in a list of modules of the base model, if it has that list."""
    path = under_base(model, name)
    try:
        layers = model.get_submodule(path)
    except AttributeError:
        return
    yield from ((f"{path}.{i}", module) for i, module in enumerate(layers))
