"""The parts of a model: paths and sizes of its layers, the activation of an FFN, its towers.

The configs inside a transformers model's config say in which tower a module is. Where they don't, its name decides.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

from torch import nn

from s2ft.config import TOWERS, S2FTConfig
from s2ft.distributed import full_shape
from s2ft.model.coupling import Coupling, Projection, Vector
from s2ft.ops.act_mul import ACTIVATIONS

# ---- sizes, paths of layers, the activation of an FFN ---------------------------------------------------------------

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


def gated_mlp(model: nn.Module, layer: int, path: str, kind: str = "ffn") -> Coupling:
    """The block of llama and similar families: ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``."""
    found = ffn(model, layer, f"{path}.up_proj", f"{path}.down_proj", f"{path}.gate_proj", kind=kind)
    return replace(found, block=path, activation=activation_of(model, path))


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
    is_gated = code is not None and (code.co_code, code.co_names) in GATED
    return HIDDEN_ACTS[name] if untouched and is_gated else None


def _gated(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _gated_with_result(self, x):
    result = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return result


def _gated_with_gate(self, x):
    gate = self.act_fn(self.gate_proj(x))
    return self.down_proj(gate * self.up_proj(x))


GATED = [(one.__code__.co_code, one.__code__.co_names) for one in (_gated, _gated_with_result, _gated_with_gate)]


def moving_with_heads(model: nn.Module, block: str, heads: int, head_dim: int) -> dict[str, int]:
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


def get(module: Any, path: str) -> Any:
    """What has this path in a module, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def outermost(model: nn.Module, fits: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """The modules that fit, by path, without those inside another one of them."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if not any(path.startswith(f"{outer}.") for outer in found) and fits(module):
            found[path] = module
    return found


def layers_of(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over (path, module) of the layers in a list of modules of the base model, if it has that list.

    A tower with a head, and in older releases of transformers every tower, has the list inside one more module. So have
    the language models of Llama 3.2 Vision and Llama 4 with their heads.
    """
    for path in (under_base(model, name), f"text_model.{name}", f"vision_model.{name}", f"model.{name}"):
        if (layers := get(model, path)) is not None:
            yield from ((f"{path}.{i}", module) for i, module in enumerate(layers))
            return


# ---- towers: language, vision, audio, and the projector between -----------------------------------------------------

# Words of module names and of configs' names
PROJECTOR = set("projector merger connector aligner resampler perceiver qformer adapter abstractor".split())
PROJECTION = {"projection", "proj"}  # words that layers inside a tower have too
WORDS = {
    "audio": {"audio", "speech", "sound", "acoustic", "talker", "mimi", "token2wav", "code2wav"},
    "vision": {"vision", "visual", "image", "images", "img", "video", "vqmodel", "vq", "pixel", "vit"},
    "language": {"language", "text", "llm", "lm"},
}
TOKENS = {  # entries of configs
    **dict.fromkeys(("audio_token_id", "audio_token_index"), "audio"),
    **dict.fromkeys(("image_token_id", "image_token_index"), "vision"),
}
INPUTS = {  # how a model's main input begins
    "pixel": "vision",
    "flattened": "vision",
    "image": "vision",
    "input_features": "audio",
    "input_values": "audio",
}


def tower_of(model: nn.Module, path: str) -> str:
    """Return the tower of a module or parameter.

    Args:
        model: The model that has it.
        path: Its path in the model.

    Returns:
        One of "language", "vision", "audio", "projector". A model of one tower has one name for all of its paths. In a
        composite model, everything outside the other towers is language.
    """
    if has_one_tower(model):
        return _tower_of_inputs(model) or "language"
    config, in_layers = getattr(model, "config", None), False
    configs, module = _configs(config), cast("nn.Module | None", model)
    tower: str | None = None
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
        in_layers = in_layers or name.isdigit()
        words = set(name.lower().split("_"))
        projects = not in_layers and words & PROJECTION and name != "proj_out"
        if tower in ("vision", "audio"):
            tower = "projector" if words & PROJECTOR or (projects and words & WORDS[tower]) else tower
        elif tower is None and projects and len(words) > 1:
            tower = "projector"
        elif tower is None:
            tower = _tower_of_name(name) or _tower_of_module(config, configs, name, module)
    return tower or "language"


def towers_of(model: nn.Module) -> list[str]:
    """Return the towers that a model has, in the order of TOWERS. They contain all of its parameters."""
    if has_one_tower(model):
        return [tower_of(model, "")]
    found = {tower_of(model, path) for path in {name.rpartition(".")[0] for name, _ in model.named_parameters()}}
    return [tower for tower in TOWERS if tower in found]


def trained_towers(model: nn.Module, towers: list[str] | None) -> list[str]:
    """Return the towers to train.

    Args:
        model: The model.
        towers: The config's `towers`. Default: the language model where a model generates text by one and has other
            towers, else all.

    Raises:
        ValueError: The model does not have one of `towers`.
    """
    present = towers_of(model)
    if towers is None:
        return ["language"] if len(present) > 1 and _has_language_model(model) else present
    missing = [tower for tower in towers if tower not in present]
    if missing:
        raise ValueError(
            f"towers names {', '.join(missing)}, which {type(model).__name__} does not have: it has "
            f"{', '.join(present)}"
        )
    return [tower for tower in present if tower in towers]


def couplings_in_towers(model: nn.Module, couplings: list[Coupling], config: S2FTConfig) -> list[Coupling]:
    """Return the couplings that a config may choose units from: those in its towers, or all where it names units.

    Args:
        model: The model.
        couplings: Couplings of the model.
        config: What to train.

    Raises:
        ValueError: The model does not have one of the towers, or no coupling is in one of them.
    """
    if config.units is not None:
        return couplings
    trained = trained_towers(model, config.towers)
    places = [tower_of(model, coupling.main.path) for coupling in couplings]
    found = [coupling for coupling, place in zip(couplings, places) if place in trained]
    empty = [tower for tower in trained if tower not in places]
    if empty and (config.towers is not None or not found):
        raise ValueError(
            f"towers: no coupling is in {', '.join(empty)}, so nothing can be trained there; {type(model).__name__} "
            f"has couplings in {', '.join(tower for tower in TOWERS if tower in places)}"
        )
    return found


# ---- what a module is ----------------------------------------------------------------------------------


def _tower_of_name(name: str) -> str | None:
    words = set(name.lower().split("_"))
    if words & PROJECTOR or name.startswith(("embed_vision", "embed_audio")):
        return "projector"
    return next((tower for tower, known in WORDS.items() if words & known), None)


def _tower_of_module(config: Any, configs: dict[str, Any], name: str, module: nn.Module | None) -> str | None:
    """The tower of a module whose name tells nothing: by its config inside the model's config, or by its input."""
    own = getattr(module, "config", None)
    if name == "decoder":
        return "language"
    if own is None or own is config:
        return _tower_of_inputs(module) if name == "encoder" else None
    same = [key for key, one in configs.items() if one is own] or [
        key for key, one in configs.items() if type(one) is type(own)
    ]
    if len(same) != 1:
        return None
    tower = _tower_of_name(same[0]) or _tower_of_inputs(module)
    if tower is None and name == "encoder":  # of a language model that is no encoder-decoder
        tower = next((tower for key, tower in TOKENS.items() if hasattr(config, key)), None)
    return tower


def _tower_of_inputs(module: nn.Module | None) -> str | None:
    main = str(getattr(module, "main_input_name", None))
    return next((tower for start, tower in INPUTS.items() if main.startswith(start)), None)


# ---- what a model is -----------------------------------------------------------------------------------


def _configs(config: Any) -> dict[str, Any]:
    """The configs inside a config, by name, also those of a config inside that is itself composite."""
    found: dict[str, Any] = {}
    for key in getattr(config, "sub_configs", None) or ():
        inside = getattr(config, key, None)
        found.update({key: inside} if inside is None else _configs(inside) or {key: inside})
    return found


def has_one_tower(model: nn.Module) -> bool:
    """Whether a transformers model has no parts for text besides parts for something else."""
    config = getattr(model, "config", None)
    if not hasattr(config, "sub_configs"):  # not a model of transformers: only names can tell
        return False
    configs = _configs(config)
    if {"encoder", "decoder"} <= configs.keys() or any(_tower_of_name(key) for key in configs):
        return False
    return not getattr(config, "is_encoder_decoder", False) or _tower_of_inputs(model) is None


def _has_language_model(model: nn.Module) -> bool:
    """Whether a composite model generates text by one of its towers, which is not one side of an encoder-decoder."""
    config = getattr(model, "config", None)
    if not _configs(config):
        return False
    if _tower_of_inputs(model) and "language" not in map(_tower_of_name, _configs(config)):
        return False  # it hears or sees, and has no more than a head for text, such as a model with CTC
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    if getattr(config, "is_encoder_decoder", False) and hasattr(base, "decoder"):
        return False
    if any("logit_scale" in name for one in (model, base) for name, _ in one.named_parameters(recurse=False)):
        return False  # it compares texts with images or sound
    return _generates(model, config)


def _generates(model: nn.Module, config: Any) -> bool:
    if getattr(model, "can_generate", lambda: False)():
        return True
    from transformers.models.auto import modeling_auto  # not at the top: it would load transformers with every import

    names = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "VISION_2_SEQ", "CAUSAL_LM")
    mappings = (getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}) for name in names)
    return any(config.model_type in mapping for mapping in mappings)
