"""Model families: a file for each, which lists the couplings of the model types that it names.

A new family is one file, with MODEL_TYPES and couplings(model), and its row in `FILES`. If an earlier release of
transformers than FLOOR has other modules for it, the file has SINCE: the first release whose modules it describes, for
all its model types ("5.2") or for some of them ({"vit": "5.2"}).
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from torch import nn

from s2ft.model.coupling import Coupling

FILES = ("composite", "conformer", "decoders", "gemma", "jetmoe", "named", "packed", "t5", "towers", "xlm")

FLOOR = "5.0"  # the first release of transformers that s2ft works with, as in pyproject.toml


def since_of(family: ModuleType, model_type: str) -> str:
    """The first release of transformers whose models of this type have the modules that the family's file describes."""
    since = getattr(family, "SINCE", FLOOR)
    return since if isinstance(since, str) else since.get(model_type, FLOOR)


_FAMILY_OF: dict[str, ModuleType] = {
    model_type: family
    for family in (import_module(f"{__name__}.{file}") for file in FILES)
    for model_type in family.MODEL_TYPES
}

# model type → the function that lists the couplings of such a model
FAMILIES: dict[str, Callable[[nn.Module], list[Coupling]]] = {
    model_type: family.couplings for model_type, family in _FAMILY_OF.items()
}

# model type → the first release of transformers with which the function works
SINCE: dict[str, str] = {model_type: since_of(family, model_type) for model_type, family in _FAMILY_OF.items()}


def is_too_old(release: str, model_type: str) -> bool:
    """Whether a release of transformers is older than the family of a model type needs. Other types need none."""
    return _numbers(release) < _numbers(SINCE.get(model_type, "0"))


def _numbers(release: str) -> tuple[int, int]:
    """The first two numbers of a release: a development version counts as the release that it precedes."""
    major, minor = release.split(".")[:2] if "." in release else (release, "0")
    return int(major), int(minor)


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
