"""Decoders, and the families whose blocks no row of names describes.

First come the functions that describe a block with the sizes of its layers, which `named.py` uses too. Each part of a
decoder's layer has its own couplings, by the name of its module in `PARTS`.

**Attention.** Biases of q, k and v are reordered with their rows. Norms of q and k over all heads (OLMo 2, Cohere,
MiniMax M2) and sinks (Flint) move with the heads; a norm that all heads share stays. A gate of the heads' outputs
(Trinity, Laguna) belongs to the queries; Qwen3-Next and Qwen3.5 compute it in the layer of q, so that a head of q is
twice as wide as one of o. Rotary embeddings and sliding windows are the same for every head. The attention of Llama 3.2
Vision that reads the image runs only with an image.

Heads stay in DiffLlama, which subtracts the output of a head from that of another one, half of the heads away; in Doge,
which computes the mask of a head from the values of all heads, by dt_proj, which is not trained; and in StableLM with
qk_layernorm, a norm module for every head.

**Low-rank attention** (DeepSeek-V2 and V3). q_proj, or q_b_proj after a low-rank q_a_proj, computes the queries.
kv_b_proj computes keys and values, [key, value] for each head in turn. The rotated part of the keys is shared by all
heads. The low-rank dimensions are not units of a coupling, so q_a_proj and kv_a_proj_with_mqa are not trained. Neither
is the indexer of DeepSeek-V3.2 and GLM-5: it chooses tokens, and no gradient passes a choice.

**Mixtures.** Channels are selected in each expert separately. An expert that processes every token (shared) is a
coupling of its own. The router is not part of a coupling. GPT-OSS stores [experts, inputs, outputs], gate and up of
each channel in turn, with a bias that moves with its channel. Aria and Llama 4 are transposed too. Every expert of
Llama 4 gets every token, with weight 0 if it was not chosen. Nemotron-H has no gate; a layer of it is one block, which
is a mixture, an FFN, an attention or a state space. Muse Spark has a norm after each expert. The last two may project
tokens to a smaller width for their experts, and back.

**Conformers** (Wav2Vec2-BERT, Wav2Vec2-Conformer, Parakeet): two FFNs, attention and a convolution module in each
layer. Relative positions are projected to each head (linear_pos, relative_k_proj) and have biases of each head: both
move with the heads. So do the depthwise convolution, and the norm after it, with the channels of the convolution
module.

**Gemma 3n and 4**: attention and gated FFN of Gemma 3, and small paths beside them. Sizes of heads and numbers of
key/value heads may differ between layers (Gemma 4). A layer with full attention may use its keys as values. Later
layers may use the keys and values of an earlier one (num_kv_shared_layers). Then heads of several layers belong
together and stay. The outputs of per_layer_input_gate are multiplied by vectors that the embeddings give, so these
channels stay. LAuReL is a low-rank pair of layers. AltUp mixes four streams and is not trained.

**JetMoE**: mixtures of FFNs, and of the queries and outputs of attention. An expert of the attention has query heads of
its own, and all experts share keys and values. So heads can't move within one expert, and each expert's queries and
outputs are trained in place. Two modules, `input_linear` and `output_linear`, have the weights of all experts.

**CodeGen and Falcon**: q, k and v in one weight, in an order of their own, and a two-layer FFN. CodeGen's weight has
four parts, each with q, v and k of its heads. A unit of attention is such a part. In Falcon with several key/value
heads (new_decoder_architecture), each has its query heads before it. A unit then is such a group, with all its query
heads. Otherwise a unit is a head: with one key/value head (multi_query) all of q come first, and else q, k and v of
each head in turn. ALiBi numbers the heads, so that they stay.

**XLM and FlauBERT**: attentions and FFNs are in two lists, with biases in all layers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial, wraps
from itertools import chain
from typing import Any, cast

from torch import nn

from s2ft.distributed import full_shape
from s2ft.model.coupling import Coupling, Projection, Vector, in_one_weight
from s2ft.model.weights import get
from s2ft.ops.act_mul import ACTIVATIONS

MODEL_TYPES = (
    "afmoe",
    "aria_text",
    "axk1",
    "bailing_hybrid",
    "bamba",
    "beam",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "cwm",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "diffllama",
    "doge",
    "dots1",
    "emu3_text_model",
    "ernie4_5",
    "ernie4_5_moe",
    "esmc",
    "eurobert",
    "exaone",
    "exaone4",
    "exaone_moe",
    "falcon_h1",
    "falcon_mamba",
    "flex_olmo",
    "flint",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe_text",
    "glm_moe_dsa",
    "gpt_oss",
    "granite",
    "granite_swa",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "gte",
    "helium",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jamba",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "lara_mini",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "llama",
    "llama4_text",
    "mamba",
    "mamba2",
    "mellum",
    "mimo_v2_flash",
    "minicpm3",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "ministral",
    "ministral3",
    "mistral",
    "mistral4",
    "mixtral",
    "mllama_text_model",
    "molmo2_text",
    "muse_spark_text",
    "nemotron_h",
    "nomic_bert",
    "olmo",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "olmoe",
    "openai_privacy_filter",
    "paddleocr_vl_text",
    "phimoe",
    "qwen2",
    "qwen2_5_omni_text",
    "qwen2_5_vl_text",
    "qwen2_moe",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl_moe_text",
    "qwen3_vl_text",
    "recurrent_gemma",
    "sarvam_mla",
    "sarvam_moe",
    "seed_oss",
    "smollm3",
    "solar_open",
    "stablelm",
    "ultrabert",
    "vaultgemma",
    "youtu",
)
Part = Callable[[nn.Module, int, str], list[Coupling]]
SHARED = ("shared_expert", "shared_experts", "shared_mlp")  # names of the expert that processes every token
GATES = ("gate_proj", "g_proj")  # names of the gate of an attention's output
# Layers from the model's width to that of the experts, and back
WIDTHS = ("pre_expert_proj", "post_expert_proj", "fc1_latent_proj", "fc2_latent_proj")
# Names of a feed-forward block's layers: up, down and gate, or up and gate in one
FFNS = (
    ("up_proj", "down_proj", "gate_proj"),
    ("w3", "w2", "w1"),
    ("gate_up_proj", "down_proj", None),
    ("input_linear", "output_linear", None),
)


# ---- how a block is described: sizes and paths of its layers --------------------------------------------------------

# hidden_act of a config → activation of act_mul
HIDDEN_ACTS = {hidden_act: name for name, act in ACTIVATIONS.items() for hidden_act in act.hidden_acts}


def attention_paths(block: str, q: str = "q_proj", k: str = "k_proj", v: str = "v_proj", o: str = "o_proj") -> dict:
    """The paths of an attention block's projections, as :meth:`Coupling.attention` takes them."""
    return {"q": f"{block}.{q}", "k": f"{block}.{k}", "v": f"{block}.{v}", "o": f"{block}.{o}"}


def config_of(model: nn.Module) -> Any:
    """The config of a transformers model."""
    return model.config


def inputs_of(model: nn.Module, path: str) -> int:
    """The number of inputs of a linear layer."""
    layer: Any = model.get_submodule(path)
    return layer.nx if hasattr(layer, "nx") else layer.in_features


def outputs_of(model: nn.Module, path: str) -> int:
    """The number of outputs of a linear layer."""
    layer: Any = model.get_submodule(path)
    return layer.nf if hasattr(layer, "nf") else layer.out_features


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
    sizes: dict[str, Any] = {"heads": heads, "head_dim": head_dim, "kv_heads": kv_heads}
    return Coupling.packed_attention(layer, qkv=qkv, o=o, **sizes, interleaved=interleaved and kv_heads == heads)


def ffn(model: nn.Module, layer: int, up: str, down: str, gate: str | None = None, *, kind: str = "ffn") -> Coupling:
    """Describe a feed-forward block with the sizes of its layers: packed if `up` also computes the gate."""
    channels = inputs_of(model, down)
    if gate is not None:
        return Coupling.gated_ffn(layer, up=up, gate=gate, down=down, channels=channels, kind=kind)
    if outputs_of(model, up) == 2 * channels:
        return Coupling.packed_gated_ffn(layer, gate_up=up, down=down, channels=channels, kind=kind)
    return Coupling.ffn(layer, up=up, down=down, channels=channels, kind=kind)


def heads_in(model: nn.Module, path: str) -> int:
    """The number of query heads of an attention block, by its module or the module inside, else by its config."""
    block = model.get_submodule(path)
    names = ("num_heads", "num_attention_heads", "n_heads", "nh", "n_head")
    found = (getattr(module, name, None) for module in (block, *block.children()) for name in names)
    heads = next((heads for heads in found if isinstance(heads, int)), None)
    return getattr(block, "config", config_of(model)).num_attention_heads if heads is None else heads


def experts(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """One coupling for each expert of a module of transformers that has the weights of all experts in one parameter.

    The module says how it stores them: transposed, gate and up in turn, with biases, without a gate.
    """
    block: Any = model.get_submodule(path)
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


def activation_of(model: nn.Module, mlp: str) -> str | None:
    """The activation that the config names, if the block computes :func:`_gated` with it and nothing else.

    None too for another class of activation than this name stands for.
    """
    from transformers.activations import ACT2FN  # not at the top, where it would load transformers with every import

    # gemma has both attributes, and uses the first
    name = getattr(config_of(model), "hidden_activation", None) or config_of(model).hidden_act
    block = model.get_submodule(mlp)
    act = getattr(block, "act_fn", None)
    untouched = name in HIDDEN_ACTS and type(act) is type(ACT2FN[name]) and "forward" not in vars(act)
    # The same instructions: nothing that computes more is taken for it, as a derived class, or a forward put in later.
    code = getattr(type(block).forward, "__code__", None)
    return HIDDEN_ACTS[name] if untouched and code is not None and (code.co_code, code.co_names) in GATED else None


# Forwards of transformers: their instructions are compared, so a variable more or less makes another one.


def _gated(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _gated_with_result(self, x):
    result = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return result


def _gated_with_gate(self, x):
    gate = self.act_fn(self.gate_proj(x))
    return self.down_proj(gate * self.up_proj(x))


GATED = [(one.__code__.co_code, one.__code__.co_names) for one in (_gated, _gated_with_result, _gated_with_gate)]


def moving_with_heads(model: nn.Module, block: str, head_dim: int) -> dict[str, int]:
    """The norms, sinks and biases of an attention block that move, as :meth:`Coupling.attention` takes them.

    A norm with `head_dim` entries is shared by all heads, and is left out. A weight may also be [heads, head_dim].
    """
    attention, found = cast(Any, model.get_submodule(block)), {}
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


def layers_of(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over (path, module) of the layers in a list of modules of the base model, if it has that list.

    A tower with a head, and in older releases of transformers every tower, has the list inside one more module. So have
    the language models of Llama 3.2 Vision and Llama 4 with their heads.
    """
    for path in (under_base(model, name), f"text_model.{name}", f"vision_model.{name}", f"model.{name}"):
        if (layers := get(model, path)) is not None:
            yield from ((f"{path}.{i}", module) for i, module in enumerate(layers))
            return


# ---- layers of decoders ---------------------------------------------------------------------------------------------


def of_layers(*stacks: str) -> Callable:
    """Decorate a function that lists the couplings of one layer, so that it lists those of a model.

    Args:
        *stacks: Lists of layers in the base model. The function gets the model, and the number, the path and the module
            of each layer.
    """

    def decorate(of_one: Callable[[nn.Module, int, str, Any], Iterator[Coupling]]) -> Callable:
        @wraps(of_one)
        def of_all(model: nn.Module) -> list[Coupling]:
            layers = chain.from_iterable(layers_of(model, stack) for stack in stacks)
            return [one for i, (path, layer) in enumerate(layers) for one in of_one(model, i, path, layer)]

        return of_all

    return decorate


@of_layers("layers")
def couplings(model: nn.Module, i: int, path: str, layer: nn.Module) -> Iterator[Coupling]:
    for name, describe in PARTS.items():
        if getattr(layer, name, None) is not None:
            yield from describe(model, i, f"{path}.{name}")


# ---- feed-forward blocks -------------------------------------------------------------------------------


def mixture(model: nn.Module, layer: int, path: str, kind: str = "ffn") -> list[Coupling]:
    """List the couplings of a block: of a mixture, with its shared expert if it has one, or of a plain FFN."""
    mlp = model.get_submodule(path)
    if not hasattr(mlp, "experts"):
        return [dense(model, layer, path, kind)]
    found = experts(model, layer, f"{path}.experts")
    shared = [name for name in SHARED if getattr(mlp, name, None) is not None]
    found += [dense(model, layer, f"{path}.{name}", kind="shared-expert") for name in shared]
    widths = [f"{path}.{name}" for name in WIDTHS if isinstance(getattr(mlp, name, None), nn.Linear)]
    return found + [Coupling.one_sided(layer, path=width, count=inputs_of(model, width)) for width in widths]


def dense(model: nn.Module, layer: int, path: str, kind: str = "ffn") -> Coupling:
    """Describe a gated feed-forward block under any of its names."""
    block = model.get_submodule(path)
    up, down, gate = next(names for names in FFNS if hasattr(block, names[0]))
    has_gate = gate is not None and hasattr(block, gate)
    found = ffn(model, layer, f"{path}.{up}", f"{path}.{down}", f"{path}.{gate}" if has_gate else None, kind=kind)
    if not has_gate or gate != "gate_proj":
        return found
    return replace(found, block=path, activation=activation_of(model, path))  # of llama and similar families


# ---- attention -----------------------------------------------------------------------------------------


def self_attention(model: nn.Module, layer: int, path: str, kind: str = "attention") -> list[Coupling]:
    """Describe an attention with separate q, k and v, and with what moves with its heads."""
    block, heads, config = model.get_submodule(path), heads_in(model, path), config_of(model)
    paths = attention_paths(path, o="o_proj" if hasattr(block, "o_proj") else "out_proj")
    moving = moving_with_heads(model, path, inputs_of(model, paths["o"]) // heads)
    more = {f"{path}.{name}": "q" for name in GATES if getattr(block, name, None) is not None}
    fixed = config.model_type in ("diffllama", "doge") or config.model_type == "stablelm" and config.qk_layernorm
    return [attention(model, layer, **paths, heads=heads, more=more, moving=moving, fixed=fixed, kind=kind)]


def latent_attention(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """Describe an attention with low-rank keys and values, and the gate and the sinks of its heads."""
    block, heads = model.get_submodule(path), heads_in(model, path)
    q = f"{path}.q_b_proj" if getattr(block, "q_b_proj", None) is not None else f"{path}.q_proj"
    value, both = inputs_of(model, f"{path}.o_proj") // heads, outputs_of(model, f"{path}.kv_b_proj") // heads
    gates = [f"{path}.{name}" for name in GATES if getattr(block, name, None) is not None]
    producers = (
        Projection("q", q, heads, outputs_of(model, q) // heads, 0),
        *in_one_weight(f"{path}.kv_b_proj", [("k", heads, both - value), ("v", heads, value)], in_turn=True),
        *(Projection("q", gate, heads, outputs_of(model, gate) // heads, 0) for gate in gates),
    )
    vectors = (Vector(f"{path}.sinks", 1),) if getattr(block, "sinks", None) is not None else ()
    return [Coupling("attention", layer, producers, Projection("o", f"{path}.o_proj", heads, value, 1), vectors)]


# ---- linear attention ----------------------------------------------------------------------------------


def delta_net(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """The heads of a Gated DeltaNet (Qwen3-Next, Qwen3.5, OLMo Hybrid): a key head with its value heads is a unit.

    One depthwise convolution runs over all of q, k and v, so its weight moves in three parts. Each head also has
    entries of the decay (A_log, dt_bias), and outputs of the layers that compute decay, step and gate.
    """
    block: Any = model.get_submodule(path)
    heads, values = block.num_k_heads, block.num_v_heads // block.num_k_heads
    key, value = block.head_k_dim, values * block.head_v_dim
    parts = [("q", heads, key), ("k", heads, key), ("v", heads, value)]
    o = f"{path}.out_proj" if hasattr(block, "out_proj") else f"{path}.o_proj"
    convolved = [f"{path}.conv1d.{name}" for name in ("weight", "bias") if getattr(block.conv1d, name) is not None]
    vectors = [
        *(Vector(p.path, p.unit, None, p.start, p.size) for name in convolved for p in in_one_weight(name, parts)),
        *(Vector(f"{path}.{name}", values) for name in ("A_log", "dt_bias")),
    ]
    producers = _delta_producers(model, path, block, parts)
    return [Coupling("linear-attention", layer, tuple(producers), Projection("o", o, heads, value, 1), tuple(vectors))]


def _delta_producers(model: nn.Module, path: str, block: Any, parts: list[tuple[str, int, int]]) -> list[Projection]:
    q, k, (_, heads, value) = parts
    if hasattr(block, "in_proj_qkvz"):  # q, k, v and the gate of each key head in turn; the gate is beside v
        found = [*in_one_weight(f"{path}.in_proj_qkvz", [q, k, ("v", heads, 2 * value)], in_turn=True)]
        others: tuple[str, ...] = ("in_proj_ba",)
    elif hasattr(block, "in_proj_qkv"):
        found = [*in_one_weight(f"{path}.in_proj_qkv", parts)]
        others = ("in_proj_z", "in_proj_b", "in_proj_a")
    else:
        found = [Projection(key, f"{path}.{key}_proj", heads, unit, 0) for key, _, unit in parts]
        others = ("g_proj", "b_proj", "a_proj")
    more = [f"{path}.{name}" for name in others if getattr(block, name, None) is not None]
    return [*found, *(Projection("q", name, heads, outputs_of(model, name) // heads, 0) for name in more)]


def delta_attention(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """The heads of Kimi Delta Attention. They stay, for A_log, [1, 1, heads, 1], can't be reordered."""
    block: Any = model.get_submodule(path)
    gates = ("forget_gate.f_b_proj", "forget_gate.f_proj", "b_proj", "g_b_proj", "g_proj")
    more = {f"{path}.{name}": "q" for name in gates if get(block, name) is not None}
    return [attention(model, layer, **attention_paths(path), heads=block.num_heads, more=more, fixed=True)]


def lightning_attention(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """The heads of MiniMax's lightning attention. They stay, for their decay is computed from their numbers."""
    heads = cast(int, model.get_submodule(path).num_attention_heads)
    packed = packed_attention(model, layer, f"{path}.qkv_proj", f"{path}.out_proj", heads, interleaved=True)
    gate = replace(packed.main, key="q", path=f"{path}.output_gate", dim=0)
    return [replace(packed, kind="linear-attention", producers=(*packed.producers, gate), fixed=True)]


# ---- state spaces --------------------------------------------------------------------------------------


def mamba(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """The first layer of a Mamba or Mamba-2 block, by its outputs.

    In training, the kernels of mamba_ssm read the weights of the other layers past their forward, so a slice in one
    of these would change nothing and get no gradient. Jamba's run as layers.
    """
    if config_of(model).model_type == "jamba":
        return _jamba_mamba(model, layer, path)
    path = f"{path}.in_proj"
    return [Coupling.one_sided(layer, path=path, count=outputs_of(model, path), side="outputs", kind="state-space")]


def _jamba_mamba(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """The channels of Jamba's Mamba block, whose layers run as layers, but for dt_proj. They stay.

    The inputs of x_proj are these channels too, and a coupling has one consumer. x_proj is trained by its outputs.
    """
    channels, x_proj = inputs_of(model, f"{path}.out_proj"), f"{path}.x_proj"
    producers = in_one_weight(f"{path}.in_proj", [("u", channels, 1), ("g", channels, 1)])
    return [
        Coupling("state-space", layer, producers, Projection("d", f"{path}.out_proj", channels, 1, 1), fixed=True),
        Coupling.one_sided(layer, path=x_proj, count=outputs_of(model, x_proj), side="outputs", kind="state-space"),
    ]


def rg_lru(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """The blocks of RecurrentGemma's recurrent layer, with their gates and a depthwise convolution."""
    heads = cast(int, model.get_submodule(f"{path}.rg_lru").num_attention_heads)
    unit = inputs_of(model, f"{path}.linear_out") // heads
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
    producers = in_one_weight(f"{path}.in_proj", [(key, channels, 1) for key in "kqv"])
    return [Coupling("convolution", layer, producers, Projection("o", f"{path}.out_proj", channels, 1, 1), vectors)]


# ---- what takes the place of attention -----------------------------------------------------------------


# name of a layer or parameter that only such a block has → its couplings; the first that fits counts
MIXERS: dict[str, Part] = {
    "output_gate": lightning_attention,
    "forget_gate": delta_attention,
    "kv_b_proj": latent_attention,
    "rg_lru": rg_lru,
    "q_proj": self_attention,
    "in_proj": mamba,
}


def mixer(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """List the couplings of an attention, of what takes its place, or of the only block of a layer of Nemotron-H."""
    block = model.get_submodule(path)
    describe = next((describe for name, describe in MIXERS.items() if hasattr(block, name)), mixture)
    return describe(model, layer, path)


# name of a module of a layer → its couplings
PARTS: dict[str, Part] = {
    "mlp": mixture,
    "mlp_block": mixture,
    "feed_forward": mixture,
    "block_sparse_moe": mixture,
    "shared_mlp": partial(mixture, kind="shared-expert"),  # GraniteMoE's, beside the mixture
    "self_attn": mixer,
    "cross_attn": partial(self_attention, kind="cross-attention"),
    "temporal_block": mixer,
    "linear_attn": delta_net,
    "mamba": mixer,
    "mixer": mixer,
    "conv": short_convolution,
}


# ---- families whose blocks no row of names describes, a function for each -------------------------------------------


# ---- conformers ----------------------------------------------------------------------------------------

WAV2VEC2 = (("intermediate_dense", "output_dense"), ("linear_q", "linear_k", "linear_v", "linear_out"), "linear_pos")
PARAKEET = (("linear1", "linear2"), ("q_proj", "k_proj", "v_proj", "o_proj"), "relative_k_proj")
CONFORMERS = {  # model type → layers of an FFN, layers of the attention, layer of the positions
    "lasr_ctc": PARAKEET,
    "parakeet_ctc": PARAKEET,
    "wav2vec2-bert": WAV2VEC2,
    "wav2vec2-conformer": WAV2VEC2,
}


@of_layers("encoder.layers")
def conformer(model: nn.Module, i: int, path: str, layer: nn.Module) -> Iterator[Coupling]:
    (up, down), names, positions = CONFORMERS[config_of(model).model_type]
    for name in ("ffn1", "ffn2", "feed_forward1", "feed_forward2"):
        if hasattr(layer, name):
            yield ffn(model, i, f"{path}.{name}.{up}", f"{path}.{name}.{down}")
    block, paths = layer.self_attn, attention_paths(f"{path}.self_attn", *names)
    more = {f"{path}.self_attn.{positions}": "k"} if hasattr(block, positions) else {}
    moving = {
        f"{path}.self_attn.{name}": 1
        for name in ("pos_bias_u", "pos_bias_v", "bias_u", "bias_v")
        if hasattr(block, name)
    }
    yield attention(model, i, **paths, heads=heads_in(model, f"{path}.self_attn"), more=more, moving=moving)
    yield from (_convolution(model, i, f"{path}.{name}") for name in ("conv_module", "conv") if hasattr(layer, name))


def _convolution(model: nn.Module, layer: int, path: str) -> Coupling:
    """Two pointwise convolutions, the first with a gate (GLU), and a depthwise one between them."""
    block: Any = model.get_submodule(path)
    down, channels = f"{path}.pointwise_conv2", block.pointwise_conv2.in_channels
    vectors = tuple(
        Vector(f"{path}.{name}.{tensor}", 1)
        for name in ("depthwise_conv", "batch_norm", "depthwise_layer_norm", "norm")
        if hasattr(block, name)
        for tensor in ("weight", "bias", "running_mean", "running_var")
        if getattr(block.get_submodule(name), tensor, None) is not None
    )
    producers = in_one_weight(f"{path}.pointwise_conv1", [("u", channels, 1), ("g", channels, 1)])
    return Coupling("convolution", layer, producers, Projection("d", down, channels, 1, 1), vectors)


# ---- Gemma 3n and 4 ------------------------------------------------------------------------------------


@of_layers("layers")
def gemma(model: nn.Module, i: int, path: str, layer: Any) -> Iterator[Coupling]:
    yield dense(model, i, f"{path}.mlp")
    if getattr(layer, "enable_moe_block", False):
        yield from experts(model, i, f"{path}.experts")
    block, unit = layer.self_attn, layer.self_attn.head_dim
    own = [(key, f"{path}.self_attn.{key}_proj") for key in "qkv" if getattr(block, f"{key}_proj", None) is not None]
    producers = tuple(Projection(key, name, outputs_of(model, name) // unit, unit, 0) for key, name in own)
    o = Projection("o", f"{path}.self_attn.o_proj", config_of(model).num_attention_heads, unit, 1)
    yield Coupling("attention", i, producers, o, fixed=bool(getattr(config_of(model), "num_kv_shared_layers", 0)))
    if hasattr(layer, "laurel"):
        yield ffn(model, i, f"{path}.laurel.linear_left", f"{path}.laurel.linear_right", kind="laurel")
    if hasattr(layer, "per_layer_projection"):
        sides = f"{path}.per_layer_input_gate", f"{path}.per_layer_projection"
        yield replace(ffn(model, i, *sides, kind="per-layer-input"), fixed=True)


# ---- JetMoE --------------------------------------------------------------------------------------------


@of_layers("layers")
def jetmoe(model: nn.Module, i: int, path: str, layer: Any) -> Iterator[Coupling]:
    heads, size = config_of(model).num_key_value_heads, config_of(model).kv_channels
    count, _, channels = full_shape(layer.mlp.output_linear.weight)
    sides: dict[str, Any] = {"gate_up": f"{path}.mlp.input_linear.weight", "down": f"{path}.mlp.output_linear.weight"}
    yield from Coupling.experts(i, **sides, channels=channels, experts=count)
    around = f"{path}.self_attention"
    yield Coupling("attention", i, in_one_weight(f"{around}.kv_proj", [("k", heads, size), ("v", heads, size)]), None)
    for expert in range(config_of(model).num_local_experts):
        q = Projection("q", f"{around}.experts.input_linear.weight", heads, size, 0, expert=expert)
        o = Projection("o", f"{around}.experts.output_linear.weight", heads, size, 1, expert=expert)
        yield Coupling("attention experts", i, (q,), o, fixed=True)


# ---- CodeGen and Falcon --------------------------------------------------------------------------------

LAYERS = {  # model type → up, down; qkv and o
    "codegen": ("mlp.fc_in", "mlp.fc_out", "attn.qkv_proj", "attn.out_proj"),
    "falcon": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "self_attention.query_key_value", "self_attention.dense"),
}
CODEGEN_PARTS = 4  # transformers has this number in the code of CodeGen's attention


@of_layers("h")
def packed(model: nn.Module, i: int, path: str, layer: nn.Module) -> Iterator[Coupling]:
    config = config_of(model)
    up, down, qkv, o = (f"{path}.{name}" for name in LAYERS[config.model_type])
    yield ffn(model, i, up, down)
    if config.model_type == "codegen":
        yield _in_turn(i, qkv, o, [(key, CODEGEN_PARTS, inputs_of(model, o) // CODEGEN_PARTS) for key in "qvk"])
    elif config.new_decoder_architecture:
        heads, size = config.num_kv_heads, config.head_dim
        parts = [("q", heads, config.num_attention_heads // heads * size), ("k", heads, size), ("v", heads, size)]
        yield replace(_in_turn(i, qkv, o, parts), fixed=config.alibi)
    else:
        whole = packed_attention(model, i, qkv, o, config.num_attention_heads, not config.multi_query)
        yield replace(whole, fixed=config.alibi)


def _in_turn(layer: int, qkv: str, o: str, parts: list[tuple[str, int, int]]) -> Coupling:
    """Describe an attention with q, k and v of each unit in turn in one weight; `parts` starts with q."""
    producers = sorted(in_one_weight(qkv, parts, in_turn=True), key=lambda one: "qkv".index(one.key))
    return Coupling("attention", layer, tuple(producers), Projection("o", o, *parts[0][1:], 1))


# ---- XLM -----------------------------------------------------------------------------------------------


def xlm(model: nn.Module) -> list[Coupling]:
    ffns = [ffn(model, i, f"{path}.lin1", f"{path}.lin2") for i, (path, _) in enumerate(layers_of(model, "ffns"))]
    names, heads = ("q_lin", "k_lin", "v_lin", "out_lin"), config_of(model).n_heads
    return ffns + [
        attention(model, i, **attention_paths(path, *names), heads=heads)
        for i, (path, _) in enumerate(layers_of(model, "attentions"))
    ]


BY_FUNCTION: dict[str, Callable[[nn.Module], list[Coupling]]] = {
    **dict.fromkeys(CONFORMERS, conformer),
    **dict.fromkeys(("gemma3n_text", "gemma4_text", "gemma4_unified_text"), gemma),
    "jetmoe": jetmoe,
    **dict.fromkeys(LAYERS, packed),
    **dict.fromkeys(("flaubert", "xlm"), xlm),
}
