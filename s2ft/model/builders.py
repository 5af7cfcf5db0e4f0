"""What model families are made of: attention, gated and two-layer FFNs of separate linear layers."""

from collections.abc import Iterator, Sequence

from torch import nn

from s2ft.model.coupling import Coupling, Projection, Vector

# hidden_act → activation of act_mul, for those of transformers' activations that are PyTorch's own function,
# equal bit for bit. gelu_new, gelu_fast, gelu_accurate and the *_python ones follow the same formulas in
# single operators and round after each: in bfloat16 that is far from gelu.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def attention(
    layer: int,
    paths: Sequence[str],
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    kind: str = "attention",
    vectors: tuple[Vector, ...] = (),
    fixed: bool = False,
) -> Coupling:
    """Of the modules `paths`: q, k, v and o."""
    counts = (heads, kv_heads or heads, kv_heads or heads)
    producers = tuple(Projection(key, path, count, head_dim, 0) for key, path, count in zip("qkv", paths, counts))
    return Coupling(kind, layer, producers, Projection("o", paths[3], heads, head_dim, 1), vectors, fixed)


def packed_attention(
    layer: int,
    qkv: str,
    o: str,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    interleaved: bool = False,
    kind: str = "attention",
) -> Coupling:
    """With q, k and v in one module `qkv`: all of q, then k, then v, or q, k, v of each head in turn (interleaved)."""
    counts = (heads, kv_heads or heads, kv_heads or heads)
    size = sum(counts) * head_dim
    starts = [head_dim * (i if interleaved else sum(counts[:i])) for i in range(3)]
    producers = tuple(
        Projection(key, qkv, count, head_dim, 0, start=start, size=size, stride=3 * head_dim if interleaved else None)
        for key, count, start in zip("qkv", counts, starts)
    )
    return Coupling(kind, layer, producers, Projection("o", o, heads, head_dim, 1))


def ffn(layer: int, up: str, down: str, channels: int) -> Coupling:
    """Two layers with an activation of single channels between them."""
    return Coupling("ffn", layer, (Projection("u", up, channels, 1, 0),), Projection("d", down, channels, 1, 1))


def gated_ffn(layer: int, up: str, gate: str, down: str, channels: int, kind: str = "ffn", **fused) -> Coupling:
    """down(activation(gate) * up). fused: block and activation of the Coupling, where they can be one op."""
    return Coupling(
        kind,
        layer,
        (Projection("u", up, channels, 1, 0), Projection("g", gate, channels, 1, 0)),
        Projection("d", down, channels, 1, 1),
        **fused,
    )


def gate_up(path: str, channels: int, expert: int | None = None) -> tuple[Projection, Projection]:
    """up and gate in one weight, gate first."""
    return (
        Projection("u", path, channels, 1, 0, start=channels, size=2 * channels, expert=expert),
        Projection("g", path, channels, 1, 0, size=2 * channels, expert=expert),
    )


def experts(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """One coupling an expert, of a module with transformers' stacked weights [experts, O, I]."""
    module = model.get_submodule(path)
    count, _, channels = module.down_proj.shape
    return [
        Coupling(
            "experts",
            layer,
            gate_up(f"{path}.gate_up_proj", channels, expert),
            Projection("d", f"{path}.down_proj", channels, 1, 1, expert=expert),
        )
        for expert in range(count)
    ]


def gated_mlp(model: nn.Module, layer: int, path: str, channels: int | None = None, kind: str = "ffn") -> Coupling:
    """The block of llama and its likes: down_proj(act_fn(gate_proj(x)) * up_proj(x))."""
    return gated_ffn(
        layer,
        f"{path}.up_proj",
        f"{path}.gate_proj",
        f"{path}.down_proj",
        channels or model.config.intermediate_size,
        kind=kind,
        block=path,
        activation=activation_of(model, path),
    )


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
