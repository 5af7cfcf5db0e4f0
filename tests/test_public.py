"""The public names: imported at first use, described in full, and each on a page of the reference.

``python docs/hooks/public_api.py`` prints everything that is missing.
"""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import griffe
import public_api
import pytest
from support.sources import ROOT

import s2ft


def test_type_checkers_see_what_is_imported_at_first_use():
    """The imports below ``if TYPE_CHECKING`` of s2ft/__init__.py have each public name and its module."""
    tree = ast.parse(Path(s2ft.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert s2ft._HOMES == {
        alias.name: f"s2ft.{alias.name}" if node.module == "s2ft" else node.module
        for node in block.body
        for alias in node.names
    }


def test_every_public_name_can_be_imported():
    assert [name for name in s2ft.__all__ if getattr(s2ft, name) is None or name not in dir(s2ft)] == []


def test_the_version_is_there_before_anything_is_imported():
    code = "import s2ft; print(s2ft.__version__, '__version__' in dir(s2ft))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.split() == [version("s2ft"), "True"]


@pytest.mark.parametrize("name", public_api.public_names())
def test_a_public_name_is_documented(name):
    assert public_api.lacks(name) == []


def test_griffe_reads_every_public_docstring_without_a_warning(caplog):
    """A warning makes `make docs` fail."""
    for name in public_api.public_names():
        found = public_api.target(name)
        for one in (found, *(found.members.values() if found.is_class else ())):
            if not one.is_alias and one.docstring:
                one.docstring.parse("google", warn_missing_types=False)
    assert caplog.messages == []


def not_in(file, names):
    text = (public_api.ROOT / file).read_text(encoding="utf-8")
    return [name for name in names if name not in text]


MISSING = {
    "a page of the reference": public_api.ungrouped,
    "the navigation": lambda: not_in("mkdocs.yml", [f"reference/{group.page}.md" for group in public_api.GROUPS]),
    # `make types` checks only what this program uses
    "the typed program": lambda: not_in("tests/typing_use.py", [f"s2ft.{name}" for name in s2ft.__all__]),
}


@pytest.mark.parametrize("place", MISSING)
def test_every_public_name_is_on(place):
    assert MISSING[place]() == []


# ---- the check itself ------------------------------------------------------------------------------------

GOOD = '''
def double(x: int) -> int:
    """Double a number.

    Args:
        x: The number.

    Returns:
        The doubled number.

    Raises:
        ValueError: `x` is negative.

    Example:
        >>> double(1)
        2
    """
    if x < 0:
        raise ValueError("negative")
    return 2 * x
'''


@pytest.mark.parametrize(
    "removed, lack",
    [
        ("nothing", None),
        ("        x: The number.\n", "no description of x"),
        ("    Returns:\n        The doubled number.\n", "no Returns"),
        ("        ValueError: `x` is negative.\n", "no Raises for ValueError"),
        ("        >>> double(1)\n", "no example"),
        (": int)", "no type of x"),
    ],
)
def test_the_check_finds_what_is_missing(removed, lack):
    with griffe.temporary_visited_module(GOOD.replace(removed, ")" if lack == "no type of x" else "")) as module:
        found = list(public_api._lacks_of_function(module["double"], "double", example=True))
    assert found == [] if lack is None else f"double: {lack}" in found
