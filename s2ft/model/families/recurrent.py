"""What takes the place of attention in some layers of hybrid models: linear attention, state spaces, convolutions."""

from dataclasses import replace

from torch import nn

from s2ft.model.builders import attention, attention_paths, get, in_one_weight, inputs_of, outputs_of, packed_attention
from s2ft.model.coupling import Coupling, Projection, Vector

# ---- linear attention ----------------------------------------------------------------------------------


def delta_net(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """The heads of a Gated DeltaNet (Qwen3-Next, Qwen3.5, OLMo Hybrid): a key head with its value heads is a unit.

    One depthwise convolution runs over all of q, k and v, so its weight moves in three parts. Each head also has
    entries of the decay (A_log, dt_bias), and outputs of the layers that compute decay, step and gate.
    """
    block = model.get_submodule(path)
    heads, values = block.num_k_heads, block.num_v_heads // block.num_k_heads
    key, value = block.head_k_dim, values * block.head_v_dim
    size = 2 * block.key_dim + block.value_dim
    o = f"{path}.out_proj" if hasattr(block, "out_proj") else f"{path}.o_proj"
    parts = (("q", 0, key), ("k", block.key_dim, key), ("v", 2 * block.key_dim, value))
    convolved = [name for name in ("weight", "bias") if getattr(block.conv1d, name) is not None]
    vectors = [
        *(Vector(f"{path}.conv1d.{name}", u, start=start, size=size) for name in convolved for _, start, u in parts),
        *(Vector(f"{path}.{name}", values) for name in ("A_log", "dt_bias")),
    ]
    producers = _delta_producers(model, path, block, heads, parts, values)
    consumer = Projection("o", o, heads, value, 1)
    return [Coupling("linear-attention", layer, tuple(producers), consumer, tuple(vectors))]


def _delta_producers(model, path: str, block: nn.Module, heads: int, parts: tuple, values: int) -> list[Projection]:
    if hasattr(block, "in_proj_qkvz"):  # q, k, v and the gate of each key head in turn
        keys, value = block.head_k_dim, values * block.head_v_dim
        where = {"stride": 2 * (keys + value), "size": outputs_of(model, f"{path}.in_proj_qkvz")}
        sides = (("q", keys, 0), ("k", keys, keys), ("v", 2 * value, 2 * keys))  # the gate is beside v
        found = [Projection(key, f"{path}.in_proj_qkvz", heads, u, 0, start=start, **where) for key, u, start in sides]
        others = ("in_proj_ba",)
    elif hasattr(block, "in_proj_qkv"):
        size = outputs_of(model, f"{path}.in_proj_qkv")
        found = [Projection(key, f"{path}.in_proj_qkv", heads, u, 0, start=start, size=size) for key, start, u in parts]
        others = ("in_proj_z", "in_proj_b", "in_proj_a")
    else:
        found = [Projection(key, f"{path}.{key}_proj", heads, u, 0) for key, _, u in parts]
        others = ("g_proj", "b_proj", "a_proj")
    for name in others:
        if getattr(block, name, None) is not None:
            found.append(Projection("q", f"{path}.{name}", heads, outputs_of(model, f"{path}.{name}") // heads, 0))
    return found


def delta_attention(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """The heads of Kimi Delta Attention. They stay, for A_log, [1, 1, heads, 1], can't be reordered."""
    block = model.get_submodule(path)
    gates = ("forget_gate.f_b_proj", "forget_gate.f_proj", "b_proj", "g_b_proj", "g_proj")
    more = {f"{path}.{name}": "q" for name in gates if get(block, name) is not None}
    return [attention(model, layer, **attention_paths(path), heads=block.num_heads, more=more, fixed=True)]


def lightning_attention(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """The heads of MiniMax's lightning attention. They stay, for their decay is computed from their numbers."""
    heads = model.get_submodule(path).num_attention_heads
    packed = packed_attention(model, layer, f"{path}.qkv_proj", f"{path}.out_proj", heads, interleaved=True)
    gate = replace(packed.consumer, key="q", path=f"{path}.output_gate", dim=0)
    return [replace(packed, kind="linear-attention", producers=(*packed.producers, gate), fixed=True)]


# ---- state spaces --------------------------------------------------------------------------------------


def mamba(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """The first layer of a Mamba or Mamba-2 block, by its outputs.

    In training, the kernels of mamba_ssm read the weights of the other layers past their forward, so a slice in one
    of these would change nothing and get no gradient. Jamba's run as layers.
    """
    if model.config.model_type == "jamba":
        return _jamba_mamba(model, layer, path)
    path = f"{path}.in_proj"
    return [Coupling.one_sided(layer, path=path, count=outputs_of(model, path), side="outputs", kind="state-space")]


def _jamba_mamba(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """The channels of Jamba's Mamba block, whose layers run as layers, but for dt_proj. They stay.

    The inputs of x_proj are these channels too, and a coupling has one consumer. x_proj is trained by its outputs.
    """
    channels, x_proj = inputs_of(model, f"{path}.out_proj"), f"{path}.x_proj"
    producers = in_one_weight(f"{path}.in_proj", "ug", channels)
    return [
        Coupling("state-space", layer, producers, Projection("d", f"{path}.out_proj", channels, 1, 1), fixed=True),
        Coupling.one_sided(layer, path=x_proj, count=outputs_of(model, x_proj), side="outputs", kind="state-space"),
    ]


def rg_lru(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """The blocks of RecurrentGemma's recurrent layer, with their gates and a depthwise convolution."""
    heads, width = model.get_submodule(f"{path}.rg_lru").num_attention_heads, inputs_of(model, f"{path}.linear_out")
    unit = width // heads
    producers = (
        Projection("v", f"{path}.linear_x", heads, unit, 0),
        Projection("q", f"{path}.linear_y", heads, unit, 0),
    )
    units = {
        "conv_1d.weight": unit,
        "conv_1d.bias": unit,
        "rg_lru.recurrent_param": unit,
        **{f"rg_lru.{side}_gate_{name}": 1 for side in ("input", "recurrent") for name in ("weight", "bias")},
    }
    vectors = tuple(Vector(f"{path}.{name}", each) for name, each in units.items())
    return [Coupling("recurrent", layer, producers, Projection("o", f"{path}.linear_out", heads, unit, 1), vectors)]


# ---- convolutions --------------------------------------------------------------------------------------


def short_convolution(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """The channels of LFM2's gated short convolution: both gates, and what is convolved, are in one layer.

    As in a state space, the gates before and after the convolution have the keys of k and q, and its input that of v.
    """
    block, channels = model.get_submodule(path), inputs_of(model, f"{path}.out_proj")
    vectors = tuple(
        Vector(f"{path}.conv.{name}", 1) for name in ("weight", "bias") if getattr(block.conv, name) is not None
    )
    producers = in_one_weight(f"{path}.in_proj", "kqv", channels)
    return [Coupling("convolution", layer, producers, Projection("o", f"{path}.out_proj", channels, 1, 1), vectors)]
