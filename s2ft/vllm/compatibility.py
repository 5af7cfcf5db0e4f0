"""Names of vLLM that are not part of its documented interface, looked up in one place.

vLLM moves such names between releases. A feature whose name is missing is left out with a message that says so, and
vLLM runs on without it.
"""

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

logger = logging.getLogger("vllm.s2ft")  # vLLM prints what loggers below its own say

TESTED = ("0.32.0",)  # releases of vLLM that s2ft was tested with
EXPORT = "use `s2ft export --format lora`, which writes a LoRA folder that vLLM serves without s2ft"


class MissingInVLLM(ValueError):
    """This release of vLLM lacks a name that s2ft needs."""

    def __init__(self, module: str, attribute: str = "") -> None:
        """Say what is missing.

        Args:
            module: The module of vLLM, or a class of it.
            attribute: What is missing in it; empty if the module is missing.
        """
        name = f"{module}.{attribute}" if attribute else module
        release = getattr(sys.modules.get("vllm"), "__version__", "unknown")
        super().__init__(
            f"vLLM {release} has no {name}, which s2ft needs. s2ft was tested with vLLM {', '.join(TESTED)}: install "
            f"one of these releases, or {EXPORT}"
        )


def private(module: str, attribute: str = "") -> Any:
    """Import a module of vLLM and return something of it.

    Args:
        module: Name of the module, for example ``vllm.lora.worker_manager``.
        attribute: Name in the module, with dots for an attribute of a class: ``WorkerLoRAManager._load_adapter``.
            Empty for the module itself.

    Returns:
        What has this name.

    Raises:
        MissingInVLLM: This release of vLLM has no such module or attribute.
    """
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the module is there, and lacks a package that it imports
        raise MissingInVLLM(module) from error
    for name in attribute.split(".") if attribute else ():
        if not hasattr(found, name):
            raise MissingInVLLM(module, attribute)
        found = getattr(found, name)
    return found


def part_of(thing: Any, attribute: str) -> Any:
    """Return an attribute of an object of vLLM that exists only while it runs.

    Args:
        thing: The object.
        attribute: Name of the attribute.

    Raises:
        MissingInVLLM: The object has no such attribute.
    """
    if not hasattr(thing, attribute):
        raise MissingInVLLM(f"{type(thing).__module__}.{type(thing).__qualname__}", attribute)
    return getattr(thing, attribute)


# ---- changes of vLLM -------------------------------------------------------------------------------------


def in_place_of(module: str, name: str) -> Callable[[Callable], Callable]:
    """Decorate a function that stands in the place of a method or a function of vLLM from then on.

    The function gets what it replaces as its first argument, and then the arguments of the call.

    Args:
        module: Name of the module.
        name: Name in the module, such as ``Executor.add_lora``.

    Raises:
        MissingInVLLM: This release of vLLM has no such name. Nothing has changed.
    """
    owner, _, attribute = name.rpartition(".")
    holder, original = private(module, owner), private(module, name)

    def put(function: Callable) -> Callable:
        @functools.wraps(original)
        def changed(*args: Any, **options: Any) -> Any:
            return function(original, *args, **options)

        setattr(holder, attribute, changed)
        return function

    return put


def when_imported(module: str, feature: str, change: Callable[[], None]) -> None:
    """Change a module of vLLM as soon as it is imported, and at once if it is already.

    A process of vLLM that does not use the module does not import it for s2ft. An error of `change` is logged, because
    it would stop vLLM's own import.

    Args:
        module: Name of the module.
        feature: What the change brings, for the log.
        change: Makes the change. It is called once, after the module was imported.

    Raises:
        MissingInVLLM: There is no such module.
    """
    if module in sys.modules:
        change()
        return
    if module not in _WAITING.changes and not _exists(module):
        raise MissingInVLLM(module)
    if _WAITING not in sys.meta_path:
        sys.meta_path.insert(0, _WAITING)
    _WAITING.changes.setdefault(module, []).append((feature, change))


def _exists(module: str) -> bool:
    """Whether there is a module. Its packages are not imported, because that takes seconds for some of vLLM's."""
    name, *rest = module.split(".")
    found = find_spec(name)
    for part in rest:
        name = f"{name}.{part}"
        found = found and PathFinder.find_spec(name, found.submodule_search_locations)
    return found is not None


class _Waiting(MetaPathFinder):
    """Finds the modules that are waited for as the other finders do, and lets changes follow their import."""

    def __init__(self) -> None:
        self.changes: dict[str, list[tuple[str, Callable[[], None]]]] = {}  # by module, in their order

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        changes = self.changes.pop(fullname, None)
        if changes is None:
            return None
        spec: Any = find_spec(fullname)  # of the other finders; `when_imported` has found that there is one
        self.changes[fullname] = changes
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            for feature, change in self.changes.pop(fullname, ()):
                guarded(feature, change)

        spec.loader.exec_module = exec_module
        return spec


_WAITING = _Waiting()


def guarded(feature: str, change: Callable[[], None]) -> None:
    """Call a function that adds a feature to vLLM. An error is logged, with the feature that is missing now."""
    try:
        change()
    except Exception as error:  # an exception here would stop every vLLM on this machine
        logger.warning("s2ft: %s are not available in this vLLM: %s: %s", feature, type(error).__name__, error)
