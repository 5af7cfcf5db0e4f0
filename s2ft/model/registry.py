"""Lists the couplings of a model, by its model type or as the user describes them, and checks them.

A model of several parts, a language model, a vision tower or an audio encoder, and a projector between them, has the
couplings of its parts, each under the part's path, and the FFN of its projector, if that is two linear layers with an
activation. Layers are counted through the language model, then the towers, then the projector.

Layers of a vision tower that the model computes but does not use are left out, because their slices get no gradient:
those after the last `vision_feature_layer`, and a pooling head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from packaging.version import Version
from torch import Tensor, nn

from s2ft.config import S2FTConfig
from s2ft.distributed import full_shape
from s2ft.layers import KINDS, OTHER, S2Layer, kind_of
from s2ft.model.coupling import Coupling, Projection, Vector, check_projection_name, checked_couplings, in_one_weight
from s2ft.model.discovery import Discovery, WeightRow, discover
from s2ft.model.discovery.proposals import LayerMap
from s2ft.model.families import decoders, named
from s2ft.model.families.decoders import config_of, inputs_of
from s2ft.model.parts import outermost, tower_of, trained_towers
from s2ft.model.weights import find, get, weight_at

# ---- families: which function lists the couplings of which model type ----------------------------------------------

Declaration = Callable[[nn.Module], list[Coupling]]

# model type → the first release of transformers whose models have the modules that its function describes, if that is
# later than the first one that s2ft works with, see pyproject.toml
SINCE = {
    **dict.fromkeys(("hunyuan_v1_moe", "phimoe"), "5.1"),
    "moonshine": "5.2",
    "afmoe": "5.5",
    "videomae": "5.6",
    "gpt_oss": "5.7",
    **dict.fromkeys(("audio-spectrogram-transformer", "beit", "deit", "ijepa", "pixio", "segformer", "swin"), "5.9"),
    **dict.fromkeys(("vit", "vit_mae", "vit_msn", "vivit"), "5.9"),
    **dict.fromkeys(("granitemoe", "granitemoehybrid", "granitemoeshared", "recurrent_gemma"), "5.14"),
    **dict.fromkeys(("nemotron_h", "olmo_hybrid"), "5.15"),
    **dict.fromkeys(("aria_text", "dinov2", "dinov2_with_registers", "sew-d"), "5.18"),
    "fsmt": "5.18",  # before, its decoder sees the first token only
    "layoutlmv3": "5.24",
}


def is_too_old(release: str, model_type: str) -> bool:
    """Whether a release of transformers is older than the family of a model type needs.

    A development version counts as the release that it precedes.
    """
    return Version(release).release < Version(SINCE.get(model_type, "0")).release


def check_release(model_type: str) -> None:
    """Check that the installed transformers is new enough for the family of a model type.

    Raises:
        ValueError: It is older; the message names both releases.
    """
    from transformers import __version__  # not at the top, where it would load transformers with every import

    if is_too_old(__version__, model_type):
        needed = SINCE[model_type]
        raise ValueError(
            f"model type {model_type!r} needs transformers >= {needed}, and this is transformers {__version__}, whose "
            f"modules have other names or shapes: pip install --upgrade 'transformers>={needed}'"
        )


# ---- models of several parts ----------------------------------------------------------------------------------------

# model type → the projector's path and its layers, or None if it is not an FFN
LLAVA = ("multi_modal_projector", ("linear_1", "linear_2"))
PROJECTORS: dict[str, tuple[str, tuple[str, ...]] | None] = {
    "aria": ("multi_modal_projector.feed_forward", ("linear_in", "linear_out")),
    "audioflamingo3": LLAVA,
    "aya_vision": LLAVA,
    "blip-2": None,
    "cohere2_vision": LLAVA,
    "exaone4_5": None,
    "gemma3": None,
    "gemma4": None,
    "gemma4_unified": None,
    "glm46v": None,
    "glm4v": None,
    "glm4v_moe": None,
    "glm_ocr": None,
    "glmga": None,
    "got_ocr2": None,
    "hyperclovax_vision_v2": None,
    "idefics2": ("connector.modality_projection", named.GATED),
    "idefics3": None,
    "instructblip": None,
    "internvl": LLAVA,
    "janus": ("aligner", ("fc1", "hidden_layers.0")),
    "kimi_k25": ("mm_projector", ("in_proj", "out_proj")),
    "lfm2_vl": LLAVA,
    "lighton_ocr": ("vision_projection", ("linear_1", "linear_2")),
    "llama4": None,
    "llava": LLAVA,
    "llava_next": LLAVA,
    "llava_next_video": LLAVA,
    "llava_onevision": LLAVA,
    "mistral3": LLAVA,
    "mllama": None,
    "ovis2": None,
    "paddleocr_vl": ("projector", ("linear_1", "linear_2")),
    "paligemma": None,
    "pp_chart2table": None,
    "qianfan_ocr": LLAVA,
    "qwen2_5_omni_thinker": None,
    "qwen2_5_vl": None,
    "qwen2_audio": None,
    "qwen2_vl": None,
    "qwen3_5": None,
    "qwen3_5_moe": None,
    "qwen3_vl": None,
    "qwen3_vl_moe": None,
    "shieldgemma2": None,
    "smolvlm": None,
    "video_llama_3": LLAVA,
    "vipllava": LLAVA,
    "voxtral": LLAVA,
}
HALVED = ("aya_vision", "cohere2_vision")  # the projector's first layer has value and gate in one weight


def _couplings_of_parts(model: nn.Module) -> list[Coupling]:
    """The couplings of a model of several parts: those of its parts, and the FFN of its projector."""
    found, layer = [], 0
    for path, part in _parts(model):
        kind = part_type(config_of(model), config_of(part))
        check_release(kind)
        own = named.couplings(part, kind) if kind in named.BY_TYPE else FAMILIES[kind](part)
        used = [coupling for coupling in own if coupling.layer < _layers_used(model, part)]
        found += [_under(path, layer, coupling) for coupling in used]
        layer += 1 + max((coupling.layer for coupling in used), default=-1)
    return found + _projector(model, layer)


def part_type(whole: Any, part: Any) -> str:
    """The model type in the config of a part.

    In older releases of transformers the configs of some vision towers have no model type, or that of the whole.
    """
    return f"{whole.model_type}_vision" if part.model_type in ("", whole.model_type) else part.model_type


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over path and module of the models in a model, the language model first."""
    from transformers import PreTrainedModel

    def is_part(module: nn.Module) -> bool:
        own = isinstance(module, PreTrainedModel) and type(module.config) is not type(config_of(model))
        return own and any(isinstance(child, nn.Linear) for child in module.modules())

    language = config_of(model).get_text_config(decoder=True).model_type
    return iter(sorted(outermost(model, is_part).items(), key=lambda part: config_of(part[1]).model_type != language))


def _layers_used(model: nn.Module, part: nn.Module) -> int | float:
    """The number of layers of a part whose outputs the model uses."""
    older = getattr(config_of(model), "vision_feature_layers", None)  # VipLLaVA's name in older releases
    chosen = getattr(config_of(model), "vision_feature_layer", older)
    vision = getattr(config_of(model), "vision_config", None)
    if chosen is None or vision is None or config_of(part).model_type != vision.model_type:
        return float("inf")
    depth = vision.num_hidden_layers
    return max(
        layer if layer >= 0 else depth + 1 + layer for layer in ([chosen] if isinstance(chosen, int) else chosen)
    )


def _projector(model: nn.Module, layer: int) -> list[Coupling]:
    row = PROJECTORS[config_of(model).model_type]
    if row is None:
        return []
    path, names = row
    build = _halved if config_of(model).model_type in HALVED else named.ffn_of
    return [build(model, layer, projector, names, kind="projector") for projector in named.modules_of(model, path)]


def _halved(model: nn.Module, layer: int, path: str, names: tuple[str, ...], kind: str) -> Coupling:
    """A gated FFN whose first layer computes the values, then the gate."""
    up, down = (f"{path}.{name}" for name in names)
    channels = inputs_of(model, down)
    producers = in_one_weight(up, [("u", channels, 1), ("g", channels, 1)])
    return Coupling(kind, layer, producers, Projection("d", down, channels, 1, 1))


def _under(path: str, first: int, coupling: Coupling) -> Coupling:
    """The coupling of a part as one of the whole model."""

    def moved(one):
        return replace(one, path=f"{path}.{one.path}")

    return replace(
        coupling,
        layer=first + coupling.layer,
        producers=tuple(map(moved, coupling.producers)),
        consumer=coupling.consumer and moved(coupling.consumer),
        vectors=tuple(map(moved, coupling.vectors)),
        block=coupling.block and f"{path}.{coupling.block}",
    )


# ---- the couplings of a model ---------------------------------------------------------------------------------------

# model type → the function that lists the couplings of such a model
FAMILIES: dict[str, Declaration] = {
    **dict.fromkeys(decoders.MODEL_TYPES, decoders.couplings),
    **dict.fromkeys(named.MODEL_TYPES, named.couplings),
    **decoders.BY_FUNCTION,
    **dict.fromkeys(PROJECTORS, _couplings_of_parts),
}
_REGISTERED: dict[str, Declaration] = {}  # by register_architecture, before FAMILIES


def register_architecture(*model_types: str) -> Callable[[Declaration], Declaration]:
    """Decorate a function that lists the couplings of a model family.

    Args:
        *model_types: Values of ``model.config.model_type`` that the function is for.

    Returns:
        A decorator. The function that it decorates gets a model and returns a list of :class:`Coupling`. It takes
        precedence over a built-in family.

    Example:
        >>> @s2ft.register_architecture("my-model")
        ... def couplings(model):
        ...     blocks = [f"blocks.{i}" for i in range(model.config.num_layers)]
        ...     return [
        ...         s2ft.Coupling.ffn(i, up=f"{block}.fc1", down=f"{block}.fc2", channels=model.config.width)
        ...         for i, block in enumerate(blocks)
        ...     ]
    """

    def register(declaration: Declaration) -> Declaration:
        _REGISTERED.update(dict.fromkeys(model_types, declaration))
        return declaration

    return register


def is_known(model: nn.Module) -> bool:
    """Whether the couplings of a model's type, and of its parts', are declared, by s2ft or by register_architecture."""
    return _declaration(model) is not None


def _declaration(model: nn.Module) -> Declaration | None:
    model_type: Any = getattr(getattr(model, "config", None), "model_type", None)
    found = _REGISTERED.get(model_type) or FAMILIES.get(model_type)
    if found is not _couplings_of_parts:
        return found
    return found if all(part_type(config_of(model), config_of(part)) in FAMILIES for _, part in _parts(model)) else None


def couplings_of(model: nn.Module, custom: Sequence[Coupling] | None = None, example: Any = None) -> list[Coupling]:
    """List the couplings of a model as :func:`find_couplings` does, without the rest."""
    return find_couplings(model, custom, example).couplings


def find_couplings(
    model: nn.Module, custom: Sequence[Coupling] | None = None, example: Any = None, config: S2FTConfig | None = None
) -> Discovery:
    """Find the couplings of a model and check them against its weights.

    Args:
        model: The model.
        custom: The couplings that a user describes; default: those of the model's family. Where no family is known,
            they are found by trials on a small copy of the model.
        example: Input for the trials: a tensor, a tuple of arguments or a dict of them. A transformers model needs
            none.
        config: What will be trained: with `i_ratio`, inputs in place of couplings. Couplings in its `modules_to_save`
            are left out where trials found them, or where their tower is frozen. Default: no module is trained in full.

    Returns:
        The couplings, and where they are from.

    Raises:
        TypeError: `custom` has something else than couplings.
        ValueError: The couplings can't be found, or a weight is missing or has another shape than its coupling
            states; the message says what was tried, or names the module.
    """
    modules = (config and config.modules_to_save) or ()
    if custom is not None:
        found = Discovery(checked_couplings(custom))
    elif (declaration := _declaration(model)) is not None:
        declared = _declared(model, declaration)
        trained = trained_towers(model, config.towers) if config is not None and modules else ()
        couplings = [c for c in declared if _is_outside(c, modules) or tower_of(model, c.main.path) in trained]
        found = Discovery(couplings, is_custom=len(couplings) < len(declared))
    else:
        found = discover(model, example)
        couplings = [coupling for coupling in found.couplings if _is_outside(coupling, modules)]
        found = Discovery(couplings, tuple(row for row in found.weights if _is_free(row.path, modules)))
    if not found.couplings:
        raise ValueError(f"modules_to_save leaves {type(model).__name__} no coupling to train")
    check_shapes(model, found.couplings)
    if config is not None and config.trains_inputs:
        return replace(found, couplings=input_couplings(model, found.couplings), is_custom=True)
    return found


def input_couplings(model: nn.Module, couplings: list[Coupling]) -> list[Coupling]:
    """Return a coupling for each weight of some couplings, of its inputs alone, as `i_ratio` trains them."""
    found = {}
    for coupling in couplings:
        for one in coupling.projections:
            inputs = Projection(
                "i", one.path, weight_at(model, one).shape[1], 1, 1, expert=one.expert, transposed=one.transposed
            )
            found[one.weight_key] = Coupling(coupling.kind, coupling.layer, (), inputs)
    return list(found.values())


def explain(model: nn.Module, example: Any = None) -> Discovery:
    """Say of every weight of a model's blocks how it is trained, and why.

    Args:
        model: The model. It may be on the meta device.
        example: As for :func:`couplings_of`.

    Returns:
        The couplings, declared or found by trials, with a row for each weight. It prints as a table.

    Raises:
        ValueError: As for :func:`couplings_of`.
    """
    found = find_couplings(model, example=example)
    if found.weights:
        return found
    family = f"declared for model type {config_of(model).model_type}"
    rows = {p.path: WeightRow(p.path, c.status, family, c) for c in found.couplings for p in c.projections}
    structure = LayerMap(model)
    for path in filter(structure.block_of, structure.layers):
        rows.setdefault(path, WeightRow(path, "untouched", "in no coupling of its family"))
    return replace(found, weights=tuple(rows.values()))


def _is_outside(coupling: Coupling, modules: Sequence[str]) -> bool:
    return all(_is_free(projection.path, modules) for projection in coupling.projections)


def _is_free(path: str, modules: Sequence[str]) -> bool:
    """Whether a path is in none of the modules, which are given by their paths or by the last parts of them.

    The dots around both let whole parts of a path match only.
    """
    return not any(f".{module}." in f".{path}." for module in modules)


def _declared(model: nn.Module, declaration: Declaration) -> list[Coupling]:
    model_type = config_of(model).model_type
    if model_type not in _REGISTERED:
        check_release(model_type)
    try:
        couplings = list(declaration(model))
    except (AttributeError, RuntimeError, StopIteration) as error:
        raise ValueError(
            f"{type(model).__name__}: a block lacks what those of model type {model_type!r} have ({error}): give "
            "couplings=, or another config.model_type, so that they are searched for"
        ) from error
    if not couplings:
        raise ValueError(
            f"{type(model).__name__}: s2ft finds no layers of model type {model_type!r} under their usual names: give "
            "couplings=, or another config.model_type, so that they are searched for"
        )
    return couplings


def check_shapes(model: nn.Module, couplings: list[Coupling]) -> None:
    """Check couplings against the weights of a model.

    Raises:
        ValueError: A module or parameter is missing, or its shape contradicts its coupling.
    """
    for coupling in couplings:
        for projection in coupling.projections:
            check_projection_name(projection.name, "couplings")  # else a trained adapter could not be saved
            _check_projection(model, projection)
        for vector in coupling.vectors:
            _check_vector(model, vector, {projection.count for projection in coupling.producers})


def _check_projection(model: nn.Module, projection: Projection) -> None:
    try:
        found = find(model, projection.path)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no module {projection.path}") from None
    if projection.expert is None:
        check_module(found, projection.path)
    elif not (isinstance(found, nn.Parameter) and len(size := full_shape(found)) == 3 and projection.expert < size[0]):
        sides = "inputs, outputs" if projection.transposed else "outputs, inputs"
        raise ValueError(
            f"{projection.path} must be a parameter [experts, {sides}] with more than {projection.expert} experts"
        )
    handle = weight_at(model, projection)
    if not handle.read_only and not handle.tensor.is_floating_point():
        raise ValueError(f"{projection.path} has {handle.tensor.dtype} weights; S²FT needs floating point")
    shape = tuple(handle.shape)
    if shape[projection.dim] != projection.extent:
        parts = "" if projection.size is not None else f" = {projection.count} units of {projection.unit}"
        raise ValueError(
            f"{projection.path}: expected a weight with {projection.extent}{parts} in dim "
            f"{projection.dim}, got shape {shape}"
        )


def check_module(found: Any, path: str) -> None:
    """Raise ValueError unless `found` is a layer of a kind that S²FT trains."""
    kind = kind_of(found)
    if not isinstance(found, nn.Module) or isinstance(found, S2Layer) or kind.layers is None:
        groups = getattr(found, "groups", 1)
        reason = "" if kind is OTHER else f", {kind.name}"
        raise ValueError(
            f"{path} is a {type(found).__name__}{f' of {groups} groups' * (groups != 1)}{reason}: S²FT trains units of "
            f"{', '.join(kind.name for kind in KINDS if kind.layers is not None)}"
        )


def _check_vector(model: nn.Module, vector: Vector, counts: set[int]) -> None:
    parameter = get(model, vector.path)
    if not isinstance(parameter, Tensor):
        raise ValueError(f"{type(model).__name__} has no parameter or buffer {vector.path}")
    dim, sizes = int(vector.expert is not None), {count * vector.unit for count in counts}
    if vector.size is not None:
        sizes = {vector.size} if vector.start + min(sizes) <= vector.size else set()
    shape = full_shape(parameter)
    if len(shape) <= dim or shape[dim] not in sizes or vector.expert and vector.expert >= shape[0]:
        of = "" if vector.size is None else f" from {vector.start} to {vector.size}"
        raise ValueError(
            f"{vector.path}: expected {' or '.join(map(str, sorted(counts)))} units of {vector.unit}{of} "
            f"in dim {dim}, got shape {tuple(shape)}"
        )
