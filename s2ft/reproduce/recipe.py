"""Recipes: YAML files that describe an experiment. This module imports no PyTorch.

A recipe names its kind, a module of s2ft/reproduce/studies, and gives values to the options of that kind. A new
experiment of a known kind is one YAML file; a new kind is one Python file with a :class:`~s2ft.reproduce.kind.Kind`.
"""

import copy
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib.resources import files
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from s2ft.files.yaml_reading import parse_yaml

FOLDER = files("s2ft.reproduce") / "recipes"


@dataclass(frozen=True)
class Recipe:
    """One experiment.

    Attributes:
        name: Its name on the command line: the name of the file without ".yaml".
        kind: The kind of experiment: a module of s2ft/reproduce/studies.
        title: What it is, in a few words.
        repeats: Which part of which paper it repeats.
        needs: The data and the hardware that a run at full size needs.
        options: Values of the kind's options.
        smoke: Values that replace them in a run on a tiny model, which shows that the recipe works.
        published: Published numbers to compare with: rows with the keys of the recipe's table, and their source.

    Example:
        >>> from s2ft.reproduce.recipe import read_recipe
        >>> recipe = read_recipe("commonsense")
        >>> recipe.kind, recipe.options["batch_size"]
        ('accuracy', 64)
    """

    name: str
    kind: str
    title: str
    repeats: str
    needs: str
    options: dict[str, Any] = field(default_factory=dict)
    smoke: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)


def recipe_names() -> list[str]:
    """Return the names of all recipes, sorted.

    Example:
        >>> from s2ft.reproduce.recipe import recipe_names
        >>> "commonsense" in recipe_names()
        True
    """
    return sorted(file.name.removesuffix(".yaml") for file in FOLDER.iterdir() if file.name.endswith(".yaml"))


def read_recipe(name: str) -> Recipe:
    """Read a recipe.

    Args:
        name: Its name, or the path of a YAML file of your own, which ends with ".yaml" or ".yml".

    Returns:
        The recipe.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: There is no such recipe, or its file is not a recipe. The message names the key.
    """
    from pathlib import Path

    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise FileNotFoundError(f"recipe {name} doesn't exist")
        return recipe_of(Path(name).stem, Path(name).read_text(encoding="utf-8"))
    known = recipe_names()
    if name not in known:
        raise ValueError(f"there is no recipe {name!r}{closest(name, known)}; recipes are {', '.join(known)}")
    return recipe_of(name, (FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def recipe_of(name: str, text: str) -> Recipe:
    """Read a recipe from the text of its file.

    Args:
        name: The name of the recipe.
        text: YAML with the attributes of :class:`Recipe` as keys.

    Raises:
        ValueError: The text is no recipe.

    Example:
        >>> from s2ft.reproduce.recipe import recipe_of
        >>> recipe_of("mine", "kind: accuracy\\ntitle: My data\\nrepeats: nothing\\nneeds: a GPU").title
        'My data'
    """
    import yaml

    try:
        found = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {name} can't be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"recipe {name} must hold lines such as 'kind: accuracy', got {type(found).__name__}")
    known = {one.name: one for one in fields(Recipe) if one.name != "name"}
    check_keys(f"recipe {name}", found, known)
    missing = [key for key, one in known.items() if one.default_factory is MISSING and key not in found]
    if missing:
        raise ValueError(f"recipe {name} lacks {', '.join(missing)}")
    for key, one in known.items():
        wanted = str if one.default_factory is MISSING else dict
        if key in found and not isinstance(found[key], wanted):
            what = "text" if wanted is str else "lines such as 'name: value'"
            raise ValueError(f"recipe {name}: {key} must be {what}, got {found[key]!r}")
    return Recipe(name, **{key: value.strip() if isinstance(value, str) else value for key, value in found.items()})


# ---- options -------------------------------------------------------------------------------------------


def options_of(kind: type, *settings: Mapping[str, Any]) -> Any:
    """Make the options of a kind from several settings, of which later ones replace earlier ones.

    Args:
        kind: The dataclass of the options.
        *settings: Values by the name of the option. A name with dots sets a part of an option that is a mapping:
            `variants.s2ft.learning_rate`.

    Returns:
        The options.

    Raises:
        ValueError: An option is unknown, is missing, or has a wrong value. The message names it.

    Example:
        >>> from dataclasses import dataclass
        >>> from s2ft.reproduce.recipe import options_of
        >>> @dataclass
        ... class Options:
        ...     rate: float
        ...     methods: dict
        >>> options_of(Options, {"rate": 1, "methods": {"lora": {"r": 8}}}, {"methods.lora.r": 32})
        Options(rate=1.0, methods={'lora': {'r': 32}})
    """
    values: dict[str, Any] = {}
    known = {one.name: one for one in fields(kind)}
    for layer in settings:
        for name, value in layer.items():
            _set(values, name.split("."), copy.deepcopy(value), name, known)
    missing = [
        name
        for name, one in known.items()
        if one.default is MISSING and one.default_factory is MISSING and name not in values
    ]
    if missing:
        raise ValueError(f"option{'s' * (len(missing) > 1)} {', '.join(missing)} must be given, by --set NAME=VALUE")
    hints = get_type_hints(kind)
    return kind(**{name: typed(name, value, hints[name]) for name, value in values.items()})


def _set(values: dict[str, Any], path: list[str], value: Any, name: str, known: Mapping[str, Any]) -> None:
    check_keys("options", [path[0]], known)
    place = values
    for part in path[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ValueError(f"{name}: {part} holds {place!r}, not parts with names")
    place[path[-1]] = value


def parse_setting(text: str) -> dict[str, Any]:
    """Parse NAME=VALUE, in which the value is YAML.

    Raises:
        ValueError: There is no "=", or the value is not YAML.

    Example:
        >>> from s2ft.reproduce.recipe import parse_setting
        >>> parse_setting("learning_rate=[1e-4, 1e-3]")
        {'learning_rate': [0.0001, 0.001]}
    """
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"--set must be NAME=VALUE, such as learning_rate=1e-3, got {text!r}")
    try:
        return {name.strip(): parse_yaml(value)}
    except yaml.YAMLError as error:
        raise ValueError(f"--set {name}: the value can't be read: {' '.join(str(error).split())}") from error


def typed(name: str, value: Any, hint: Any) -> Any:
    """Return a value in the type of an option: a whole number also serves for a float, and one value for a list.

    Raises:
        ValueError: The value has another type. The message names the option.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in sorted(kinds, key=lambda kind: get_origin(kind) is list):
        base = get_origin(kind) or kind
        if base is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if base is Any or (isinstance(value, base) and (base is bool or not isinstance(value, bool))):
            items = get_args(kind)
            return [typed(name, one, items[0]) for one in value] if base is list and items else value
        if base is list and value is not None and not isinstance(value, dict):
            return [typed(name, value, get_args(kind)[0])]
    listed = " or ".join(WORDS.get(get_origin(kind) or kind, str(kind)) for kind in kinds)
    raise ValueError(f"{name} must be {listed}, got {value!r}")


WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "lines such as 'name: value'",
    type(None): "null",
}


def check_keys(where: str, found: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for a name that is not known, with the closest one that is.

    Args:
        where: What has the names, for the message.
        found: The names to check.
        known: The names that are allowed.
    """
    known = list(known)
    for name in found:
        if name not in known:
            raise ValueError(f"{where}: there is no {name!r}{closest(name, known)}; known are {', '.join(known)}")


def closest(word: Any, names: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the closest name, or an empty string."""
    close = difflib.get_close_matches(str(word), list(names), 1)
    return f"; did you mean {close[0]}?" if close else ""
