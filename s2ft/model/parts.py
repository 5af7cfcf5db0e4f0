"""The parts of a model: language, vision and audio towers, and the projector between.

The configs inside a transformers model's config say in which tower a module is. Where they don't, its name decides.
"""

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from s2ft.config import TOWERS, S2FTConfig
from s2ft.model.coupling import Coupling

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
    config: Any = getattr(model, "config", None)
    if not _configs(config):
        return False
    if _tower_of_inputs(model) and "language" not in map(_tower_of_name, _configs(config)):
        return False  # it hears or sees, and has no more than a head for text, such as a model with CTC
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    if getattr(config, "is_encoder_decoder", False) and hasattr(base, "decoder"):
        return False
    if any("logit_scale" in name for one in (model, base) for name, _ in one.named_parameters(recurse=False)):
        return False  # it compares texts with images or sound
    if getattr(model, "can_generate", lambda: False)():
        return True
    from transformers.models.auto import modeling_auto  # not at the top: it would load transformers with every import

    names = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "VISION_2_SEQ", "CAUSAL_LM")
    mappings = (getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}) for name in names)
    return any(config.model_type in mapping for mapping in mappings)


def outermost(model: nn.Module, fits: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """The modules that fit, by path, without those inside another one of them."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if not any(path.startswith(f"{outer}.") for outer in found) and fits(module):
            found[path] = module
    return found
