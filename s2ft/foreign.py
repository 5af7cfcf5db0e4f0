"""What s2ft knows of other packages: the releases that it was tested with, and names that are not documented.

A check that reads a private name refuses when the name is gone. `getattr(owner, name, None)` would take a name that a
later release has renamed for one that says nothing, and the check would pass. tests/support/foreign_names.py has the
table of all such names.
"""

import json
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType
from typing import Any

from packaging.version import Version

# The newest release of each package that the tests have passed with; `make constraints` writes it.
TESTED = Path(__file__).with_name("tested.json")


class MissingForeignName(RuntimeError):
    """A name of another package, which a check of s2ft needs, is gone.

    Args:
        package: The package, by its name in the package index.
        name: The name that was expected.
        purpose: What s2ft does with it.
    """

    def __init__(self, package: str, name: str, purpose: str) -> None:
        super().__init__(
            f"{package} {_release(package)} has no {name!r}, by which s2ft finds {purpose}. The check can't be made, "
            f"so nothing is done: install a release of {package} that s2ft is tested with, and report this one"
        )


def read(owner: Any, name: str, package: str, purpose: str) -> Any:
    """Return an attribute that every owner of this kind has.

    Raises:
        MissingForeignName: The owner does not have it.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        raise MissingForeignName(package, name, purpose) from None


@cache  # a release is the same for the whole process
def check_mentioned(function: Any, name: str, package: str, purpose: str) -> None:
    """Check that a package's function still uses a name. It is for attributes that few objects have.

    An object without the attribute is then one that the function has not changed.

    Args:
        function: The function that sets the attribute, or the class whose methods do.
        name: The attribute.
        package: The function's package, by its name in the package index.
        purpose: What s2ft finds by the attribute, for the message.

    Raises:
        MissingForeignName: The function does not mention the name.
    """
    functions = [function]
    if isinstance(function, type):
        functions = [method for method in vars(function).values() if hasattr(method, "__code__")]
    codes = [getattr(one, "__wrapped__", one).__code__ for one in functions]
    if not any(name in _names_in(code) for code in codes):
        raise MissingForeignName(package, name, purpose)


@cache
def _names_in(code: CodeType) -> frozenset[str]:
    return frozenset(_walk(code))


def _walk(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _walk(constant)
        elif isinstance(constant, str):
            yield constant


def newer_than_tested() -> str:
    """Name the installed packages that are newer than any release that s2ft was tested with.

    Returns:
        A sentence; empty if there is none.
    """
    newer = []
    for package, tested in json.loads(TESTED.read_text()).items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        # `release` leaves out the part that names a build, as in 2.15.0+cpu
        if Version(installed).release > Version(tested).release:
            newer.append(f"{package} {installed} (tested up to {tested})")
    return f"newer than any release that s2ft was tested with: {', '.join(newer)}" if newer else ""


def _release(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(unknown release)"
