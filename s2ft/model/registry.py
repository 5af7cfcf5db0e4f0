"""Lists the couplings of a model, by its model type or as the user describes them, and checks them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from s2ft.config import S2FTConfig
from s2ft.distributed import full_shape
from s2ft.layers import KINDS, OTHER, S2Layer, kind_of
from s2ft.model import families
from s2ft.model.coupling import Coupling, Projection, Vector, checked_couplings
from s2ft.model.discovery import Discovery, WeightRow, discover
from s2ft.model.discovery.proposals import LayerMap
from s2ft.model.families import FAMILIES, check_release
from s2ft.model.parts import get, tower_of, trained_towers
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
        _REGISTERED.update(dict.fromkeys(model_types, declaration))
        return declaration

    return register


def known_architectures() -> list[str]:
    """The model types whose couplings are known."""
    return sorted({**FAMILIES, **_REGISTERED})


def is_known(model: nn.Module) -> bool:
    """Whether the couplings of a model's type, and of its parts', are declared, by s2ft or by register_architecture."""
    declaration = _declaration(model)
    return declaration is not None and not (declaration is families.couplings and families.undeclared_parts(model))


class FoundCouplings(NamedTuple):
    """The couplings of a model, and where they are from.

    Attributes:
        couplings: The couplings.
        is_custom: Whether adapters must store them, because no family has them.
        weights: What discovery says of every weight of the blocks; empty for all other couplings.
    """

    couplings: list[Coupling]
    is_custom: bool
    weights: tuple[WeightRow, ...] = ()


def couplings_of(model: nn.Module, custom: Sequence[Coupling] | None = None, example: Any = None) -> list[Coupling]:
    """List the couplings of a model as :func:`find_couplings` does, without the rest."""
    return find_couplings(model, custom, example).couplings


def find_couplings(
    model: nn.Module, custom: Sequence[Coupling] | None = None, example: Any = None, config: S2FTConfig | None = None
) -> FoundCouplings:
    """Find the couplings of a model and check them against its weights.

    Args:
        model: The model.
        custom: The couplings that a user describes; default: those of the model's family. Where no family is known,
            they are found by trials on a small copy of the model.
        example: Input for the trials: a tensor, a tuple of arguments or a dict of them. A transformers model needs
            none.
        config: What will be trained. Couplings in its `modules_to_save` are left out where trials found them, or where
            their tower is frozen. Default: no module is trained in full.

    Returns:
        The couplings, and where they are from.

    Raises:
        TypeError: `custom` has something else than couplings.
        ValueError: The couplings can't be found, or a weight is missing or has another shape than its coupling
            states; the message says what was tried, or names the module.
    """
    modules = (config and config.modules_to_save) or ()
    if custom is not None:
        found = FoundCouplings(checked_couplings(custom), is_custom=True)
    elif is_known(model):
        declared = _declared(model)
        trained = trained_towers(model, config.towers) if modules else ()
        couplings = [c for c in declared if _is_outside(c, modules) or tower_of(model, c.main.path) in trained]
        found = FoundCouplings(couplings, is_custom=len(couplings) < len(declared))
    else:
        discovery = discover(model, example)
        couplings = [coupling for coupling in discovery.couplings if _is_outside(coupling, modules)]
        found = FoundCouplings(couplings, True, tuple(row for row in discovery.weights if _is_free(row.path, modules)))
    check_shapes(model, found.couplings)
    return found


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
        return Discovery(found.couplings, list(found.weights))
    family = f"declared for model type {model.config.model_type}"
    rows = {p.path: WeightRow(p.path, c.status, family, c) for c in found.couplings for p in c.projections}
    structure = LayerMap(model)
    for path in filter(structure.block_of, structure.layers):
        rows.setdefault(path, WeightRow(path, "untouched", "in no coupling of its family"))
    return Discovery(found.couplings, list(rows.values()))


def _is_outside(coupling: Coupling, modules: Sequence[str]) -> bool:
    return all(_is_free(projection.path, modules) for projection in coupling.projections)


def _is_free(path: str, modules: Sequence[str]) -> bool:
    """Whether a path is in none of the modules, which are given by their paths or by the last parts of them.

    The dots around both let whole parts of a path match only.
    """
    return not any(f".{module}." in f".{path}." for module in modules)


def _declaration(model: nn.Module) -> Declaration | None:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return _REGISTERED.get(model_type) or FAMILIES.get(model_type)


def _declared(model: nn.Module) -> list[Coupling]:
    model_type = model.config.model_type
    if model_type not in _REGISTERED:
        check_release(model_type)
    couplings = _declaration(model)(model)
    if not couplings:
        raise ValueError(
            f"{type(model).__name__}: s2ft finds no layers of model type {model.config.model_type!r} under their usual "
            "names"
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
