"""What model families read from a transformers model: sizes, paths of layers, the activation of an FFN."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from s2ft.distributed import full_shape
from s2ft.model.coupling import Coupling, Projection, Vector
from s2ft.ops.act_mul import ACTIVATIONS

# hidden_act of a config → activation of act_mul
HIDDEN_ACTS = {hidden_act: name for name, act in ACTIVATIONS.items() for hidden_act in act.hidden_acts}


def attention_paths(block: str, q: str = "q_proj", k: str = "k_proj", v: str = "v_proj", o: str = "o_proj") -> dict:
    """The paths of an attention block's projections, as :meth:`Coupling.attention` takes them."""
    return {"q": f"{block}.{q}", "k": f"{block}.{k}", "v": f"{block}.{v}", "o": f"{block}.{o}"}


def inputs_of(model: nn.Module, path: str) -> int:
    """The number of inputs of a linear layer."""
    layer = model.get_submodule(path)
    return layer.nx if hasattr(layer, "nx") else layer.in_features


def outputs_of(model: nn.Module, path: str) -> int:
    """The number of outputs of a linear layer."""
    layer = model.get_submodule(path)
    return layer.nf if hasattr(layer, "nf") else layer.out_features


def in_one_weight(path: str, keys: str, count: int, unit: int = 1) -> tuple[Projection, ...]:
    """Producers that fill one weight, one after another in the order of `keys`, with `count` units of `unit` each."""
    size = count * unit
    return tuple(
        Projection(key, path, count, unit, 0, start=i * size, size=len(keys) * size) for i, key in enumerate(keys)
    )


def attention(
    model: nn.Module,
    layer: int,
    *,
    q: str,
    k: str,
    v: str,
    o: str,
    heads: int,
    more: Mapping[str, str] | None = None,
    moving: Mapping[str, int] | None = None,
    fixed: bool = False,
    kind: str = "attention",
) -> Coupling:
    """Describe an attention block as :meth:`Coupling.attention` does, with the sizes of its layers.

    Heads of q may be wider than those of o, for instance if q also computes a gate of the output.

    Args:
        model: The model.
        layer: Number of the layer.
        q: Path of the query projection.
        k: Path of the key projection.
        v: Path of the value projection.
        o: Path of the output projection.
        heads: Number of query heads.
        more: Other layers whose outputs are split by the heads: path, and "q", "k" or "v". One whose outputs are
            multiplied with those of the heads (a gate) counts to the queries.
        moving: Parameters and buffers that are reordered together with the heads.
        fixed: Whether heads can't move.
        kind: Word for this coupling in reports.
    """
    head_dim = inputs_of(model, o) // heads
    kv_heads = outputs_of(model, v) // head_dim
    others = [(key, path, kv_heads if key in "kv" else heads) for path, key in (more or {}).items()]
    sides = [("q", q, heads), ("k", k, kv_heads), ("v", v, kv_heads), *others]
    producers = tuple(Projection(key, path, n, outputs_of(model, path) // n, 0) for key, path, n in sides)
    vectors = tuple(Vector(path, unit) for path, unit in (moving or {}).items())
    return Coupling(kind, layer, producers, Projection("o", o, heads, head_dim, 1), vectors, fixed)


def packed_attention(model: nn.Module, layer: int, qkv: str, o: str, heads: int, interleaved: bool = False) -> Coupling:
    """Describe an attention block as :meth:`Coupling.packed_attention` does, with the sizes of its layers.

    Heads that share keys are never interleaved.
    """
    head_dim = inputs_of(model, o) // heads
    kv_heads = (outputs_of(model, qkv) // head_dim - heads) // 2
    sizes = {"heads": heads, "head_dim": head_dim, "kv_heads": kv_heads}
    return Coupling.packed_attention(layer, qkv=qkv, o=o, **sizes, interleaved=interleaved and kv_heads == heads)


def ffn(model: nn.Module, layer: int, up: str, down: str, gate: str | None = None, kind: str = "ffn") -> Coupling:
    """Describe a feed-forward block with the sizes of its layers: packed if `up` also computes the gate."""
    channels = inputs_of(model, down)
    if gate is not None:
        return Coupling.gated_ffn(layer, up=up, gate=gate, down=down, channels=channels, kind=kind)
    if outputs_of(model, up) == 2 * channels:
        return Coupling.packed_gated_ffn(layer, gate_up=up, down=down, channels=channels, kind=kind)
    return Coupling.ffn(layer, up=up, down=down, channels=channels, kind=kind)


def heads_in(model: nn.Module, block: str) -> int:
    """The number of query heads of an attention block, by its module or the module inside, else by its config."""
    block = model.get_submodule(block)
    names = ("num_heads", "num_attention_heads", "n_heads", "nh", "n_head")
    found = (getattr(module, name, None) for module in (block, *block.children()) for name in names)
    heads = next((heads for heads in found if isinstance(heads, int)), None)
    return getattr(block, "config", model.config).num_attention_heads if heads is None else heads


def experts(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """One coupling for each expert of a module of transformers that has the weights of all experts in one parameter.

    The module says how it stores them: transposed, gate and up in turn, with biases, without a gate.
    """
    block = model.get_submodule(path)
    transposed = getattr(block, "is_transposed", type(block).__name__ == "Llama4TextExperts")
    first = "gate_up_proj" if getattr(block, "has_gate", True) else "up_proj"
    return Coupling.experts(
        layer,
        **{first.removesuffix("_proj"): f"{path}.{first}"},
        down=f"{path}.down_proj",
        channels=full_shape(block.down_proj)[1 if transposed else 2],
        experts=full_shape(block.down_proj)[0],
        transposed=transposed,
        interleaved=not getattr(block, "is_concatenated", True),
        bias=f"{path}.{first}_bias" if getattr(block, "has_bias", False) else None,
    )


def gated_mlp(model: nn.Module, layer: int, path: str, kind: str = "ffn") -> Coupling:
    """The block of llama and similar families: ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``."""
    found = ffn(model, layer, f"{path}.up_proj", f"{path}.down_proj", f"{path}.gate_proj", kind)
    return replace(found, block=path, activation=activation_of(model, path))


def activation_of(model: nn.Module, mlp: str) -> str | None:
    """The activation that the config names, if the block computes :func:`_gated` with it and nothing else.

    None too for another class of activation than this name stands for.
    """
    from transformers.activations import ACT2FN  # not at the top, where it would load transformers with every import

    # gemma has both attributes, and uses the first
    name = getattr(model.config, "hidden_activation", None) or model.config.hidden_act
    block = model.get_submodule(mlp)
    act = getattr(block, "act_fn", None)
    untouched = name in HIDDEN_ACTS and type(act) is type(ACT2FN[name]) and "forward" not in vars(act)
    return HIDDEN_ACTS[name] if untouched and is_gated_mlp(type(block)) else None


def _gated(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _gated_with_result(self, x):
    result = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return result


def _gated_with_gate(self, x):
    gate = self.act_fn(self.gate_proj(x))
    return self.down_proj(gate * self.up_proj(x))


GATED = [(one.__code__.co_code, one.__code__.co_names) for one in (_gated, _gated_with_result, _gated_with_gate)]


def is_gated_mlp(block_class: type[nn.Module]) -> bool:
    """Whether the forward of a class has the same instructions as :func:`_gated`, in one of the ways to write it.

    So nothing that computes more is taken for it: a derived class, or a forward that someone has put in the class.
    """
    code = getattr(block_class.forward, "__code__", None)
    return code is not None and (code.co_code, code.co_names) in GATED


def moving_with_heads(model: nn.Module, block: str, heads: int, head_dim: int) -> dict[str, int]:
    """The norms, sinks and biases of an attention block that move, as :meth:`Coupling.attention` takes them.

    A norm with `head_dim` entries is shared by all heads, and is left out. A weight may also be [heads, head_dim].
    """
    attention, found = model.get_submodule(block), {}
    for name in ("q_norm", "k_norm"):
        weight = getattr(getattr(attention, name, None), "weight", None)
        shape = () if weight is None else full_shape(weight)
        if len(shape) == 2:
            found[f"{block}.{name}.weight"] = 1
        elif len(shape) == 1 and shape[0] not in (head_dim, attention.head_dim):
            found[f"{block}.{name}.weight"] = attention.head_dim
    of_heads = [name for name in ("sinks", "gate_bias") if getattr(attention, name, None) is not None]
    return {**found, **{f"{block}.{name}": 1 for name in of_heads}}


def under_base(model: nn.Module, name: str) -> str:
    """The path of a module of the base model, which starts with `base_model_prefix` if the model has a head."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}.{name}" if prefix and hasattr(model, prefix) else name


def get(module: nn.Module, path: str) -> Any:
    """What has this path in a module, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def layers_of(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over (path, module) of the layers in a list of modules of the base model, if it has that list.

    A tower with a head, and in older releases of transformers every tower, has the list inside one more module. So have
    the language models of Llama 3.2 Vision and Llama 4 with their heads.
    """
    for path in (under_base(model, name), f"text_model.{name}", f"vision_model.{name}", f"model.{name}"):
        if (layers := get(model, path)) is not None:
            yield from ((f"{path}.{i}", module) for i, module in enumerate(layers))
            return
