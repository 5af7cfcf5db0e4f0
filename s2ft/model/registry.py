"""Lists the couplings of a model, by its model type or as the user describes them, and checks them."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from s2ft.layers import KINDS, S2Layer, kind_of
from s2ft.model.coupling import Coupling, Projection, Vector
from s2ft.model.custom import checked_couplings
from s2ft.model.families import FAMILIES, check_release
from s2ft.model.weights import find, weight_at

Declaration = Callable[[nn.Module], list[Coupling]]
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
        for model_type in model_types:
            _REGISTERED[model_type] = declaration
        return declaration

    return register


def known_architectures() -> list[str]:
    """The model types whose couplings are known."""
    return sorted({**FAMILIES, **_REGISTERED})


def couplings_of(model: nn.Module, custom: Sequence[Coupling] | None = None) -> list[Coupling]:
    """List the couplings of a model and check them against its weights.

    Args:
        model: The model.
        custom: The couplings that a user describes; default: those of the model's family.

    Returns:
        The couplings.

    Raises:
        TypeError: `custom` has something else than couplings.
        ValueError: The model type is not known, or a weight is missing or has another shape than its coupling states;
            the message names the known types or the module.
    """
    couplings = _declared(model) if custom is None else checked_couplings(custom)
    check_shapes(model, couplings)
    return couplings


def _declared(model: nn.Module) -> list[Coupling]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    declaration = _REGISTERED.get(model_type) or FAMILIES.get(model_type)
    if declaration is None:
        raise ValueError(
            f"{type(model).__name__} (model type {model_type!r}) is not a model family that s2ft knows; known are "
            f"{', '.join(known_architectures())}. Describe the couplings of this model in attach(..., "
            "couplings=[s2ft.Coupling.ffn(...), ...]), or those of its family by s2ft.register_architecture"
        )
    if model_type not in _REGISTERED:
        check_release(model_type)
    couplings = declaration(model)
    if not couplings:
        raise ValueError(
            f"{type(model).__name__}: s2ft finds no layers of model type {model_type!r} under their usual names"
        )
    return couplings


def check_shapes(model: nn.Module, couplings: list[Coupling]) -> None:
    """Check couplings against the weights of a model.

    Raises:
        ValueError: A module or parameter is missing, or its shape contradicts its coupling.
    """
    for coupling in couplings:
        for projection in coupling.projections:
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
    elif not isinstance(found, nn.Parameter) or found.dim() != 3 or projection.expert >= found.shape[0]:
        raise ValueError(
            f"{projection.path} must be a parameter [experts, outputs, inputs] with more than "
            f"{projection.expert} experts"
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
    if not isinstance(found, nn.Module) or isinstance(found, S2Layer) or kind_of(found).layers is None:
        groups = getattr(found, "groups", 1)
        raise ValueError(
            f"{path} is a {type(found).__name__}{f' of {groups} groups' * (groups != 1)}: S²FT trains units of "
            f"{', '.join(kind.name for kind in KINDS)}, and not of classes derived from them"
        )


def _check_vector(model: nn.Module, vector: Vector, counts: set[int]) -> None:
    try:
        parameter = find(model, vector.path)
    except AttributeError:
        parameter = None
    if not isinstance(parameter, Tensor):
        raise ValueError(f"{type(model).__name__} has no parameter or buffer {vector.path}")
    if parameter.dim() == 0 or parameter.shape[0] not in {count * vector.unit for count in counts}:
        raise ValueError(
            f"{vector.path}: expected {' or '.join(map(str, sorted(counts)))} units of {vector.unit} "
            f"in dim 0, got shape {tuple(parameter.shape)}"
        )
