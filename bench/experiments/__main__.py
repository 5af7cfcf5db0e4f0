"""Make the runs of an experiment and print its tables.

    python -m bench.experiments --list
    python -m bench.experiments arithmetic --smoke
    python -m bench.experiments arithmetic --model meta-llama/Meta-Llama-3-8B --data LLM-Adapters --only s2ft lora
    python -m bench.experiments evidence --tables --output bench/experiments/results

NAME is a file of bench/experiments/recipes, or the path of a YAML file of your own. docs/reproduce.md describes them.
Results are lines of OUTPUT/NAME.jsonl; a run that has one is not made again. Tables lie in OUTPUT/NAME-*.md.
"""

import argparse
import copy
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.experiments import runner
from bench.experiments.matched_methods import trained_parameters
from bench.experiments.printing import Column, Table, save_figures
from bench.experiments.runner import check_names
from s2ft.files.plain_text import parse_yaml
from s2ft.text.models import hollow_model
from s2ft.train.demo import default_model

RECIPES = Path(__file__).parent / "recipes"
ABOUT = ("kind", "title", "repeats", "needs", "only", "published", "smoke")  # keys of every recipe
# The modules of this folder that make the runs of a kind, and that print them
KINDS = {
    "comparison": ("comparison", "comparison_report"),
    "sequence": ("sequence", "sequence"),
    "fusion": ("fusion", "fusion"),
    "efficiency": ("efficiency", "efficiency"),
    "serving": ("serving", "serving"),
    "metamath": ("metamath", "metamath"),
}


def read(name: str) -> dict[str, Any]:
    """Read a recipe.

    Args:
        name: The name of a file of the folder recipes, or the path of a YAML file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: There is no such recipe, or a key is unknown or missing. The message names it.
    """
    known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        if path.parent != RECIPES:
            raise FileNotFoundError(f"recipe {name} doesn't exist")
        check_names("recipes", [name], known)
    found = parse_yaml(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("kind") not in KINDS:
        raise ValueError(f"recipe {name}: kind must be one of {', '.join(KINDS)}")
    check_recipe(f"recipe {name}", found)
    return found


def check_recipe(where: str, recipe: dict[str, Any]) -> None:
    """Raise ValueError if a key of a recipe is unknown or missing, or a value has another type than it needs."""
    module = import_module(f"bench.experiments.{KINDS[recipe['kind']][0]}")
    check_names(where, recipe, [*ABOUT, *module.KEYS])
    missing = [key for key in ("title", "settings", *module.NEEDED) if recipe.get(key) is None]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    check_names(f"{where}, settings", recipe["settings"], module.SETTINGS)
    for name, row in recipe.get("rows", {}).items():
        if not isinstance(row, dict):
            raise ValueError(f"{where}, row {name}: must hold lines such as 'method: s2ft', got {row!r}")
        check_names(f"{where}, row {name}", row, module.ROW)
    for key in ("seeds", "tasks"):
        if key in recipe and (not isinstance(recipe[key], list) or not recipe[key]):
            raise ValueError(f"{where}: {key} must be a list with at least one value, got {recipe[key]!r}")


def changed(recipe: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe with other values.

    Args:
        recipe: The recipe.
        changes: Values by name: a key of the recipe, a name of its settings, or a path with dots, such as
            `rows.lora.rates`.

    Raises:
        ValueError: A name is unknown.
    """
    recipe = copy.deepcopy(recipe)
    module = import_module(f"bench.experiments.{KINDS[recipe['kind']][0]}")
    for name, value in changes.items():
        path = name.split(".")
        check_names("--set", path[:1], [*ABOUT, *module.KEYS, *module.SETTINGS])
        path = path if path[0] in (*ABOUT, *module.KEYS) else ["settings", *path]
        place = recipe
        for part in path[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(f"{name}: {part} holds {place!r}, not parts with names")
        place[path[-1]] = value
    check_recipe("--set", recipe)
    return recipe


def for_smoke(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a recipe that shows in seconds that everything works: on a tiny random model and made-up rows."""
    from bench.experiments.smoke import smoke_data, smoke_model

    found = changed(recipe, recipe.get("smoke", {}))
    settings = import_module(f"bench.experiments.{KINDS[recipe['kind']][0]}").SETTINGS
    made = {}
    if isinstance(found["settings"].get("model", 0), (str, type(None))) and "model" in settings:
        made["model"] = smoke_model(folder / "model")
    return changed(found, {**made, **({"data": smoke_data(folder / "data")} if "data" in settings else {})})


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = argparse.ArgumentParser(
        "python -m bench.experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("name", nargs="?", metavar="NAME")
    made.add_argument("--list", action="store_true", help="print the recipes, what they repeat and what they need")
    made.add_argument("--smoke", action="store_true", help="show in seconds that it works; no number means anything")
    made.add_argument("--plan", action="store_true", help="check everything, print the runs, and make none")
    made.add_argument("--tables", action="store_true", help="print the tables of what has a result, and make no run")
    made.add_argument(
        "--output", type=Path, default=Path(".experiments"), help="folder of results (default: %(default)s)"
    )
    made.add_argument("--figures", type=Path, help="folder of figures (default: that of the results)")
    made.add_argument("--model", help="the base model")
    made.add_argument("--data", help="folder of the public files, such as a checkout of LLM-Adapters")
    made.add_argument("--seeds", type=int, nargs="+", help="a run for each seed")
    made.add_argument("--only", nargs="+", metavar="ROW", help="only these rows, or the rows of these methods")
    made.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="other values of the recipe, as YAML")
    made.add_argument("--workers", type=int, help="processes of one thread (default: cores); 0: this process")
    made.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS", help="then start no further run")
    made.add_argument("--part", default="1/1", metavar="K/N", help="every N-th run, from the K-th on: one part a GPU")
    return made


def chosen(recipe: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return a recipe with the changes of the command line."""
    given = {"model": options.model, "data": options.data, "seeds": options.seeds}
    changes = {name: value for name, value in given.items() if value is not None}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set must be NAME=VALUE, such as rates=[1e-3], got {text!r}")
        changes[name.strip()] = parse_yaml(value)
    recipe = changed(recipe, changes)
    rows, only = recipe.get("rows", {}), options.only or recipe.get("only")
    if only:
        check_names("--only", only, [*rows, *{row.get("method", "") for row in rows.values()}])
        recipe["rows"] = {
            name: row
            for name, row in rows.items()
            if name in only or row.get("method") in [word for word in only if word not in rows]
        }
    if recipe.get("equal_to"):  # as many trained weights as a row has, at most
        check_names("equal_to", [recipe["equal_to"]], rows)
        row, model = rows[recipe["equal_to"]], hollow_model(recipe["settings"]["model"] or default_model())
        recipe["settings"]["parameters"] = trained_parameters(model, row["method"], row.get("options"))
    return recipe


def report(name: str, recipe: dict[str, Any], results: runner.Results, figures: Path) -> list[Table]:
    """Write the tables and figures of an experiment, and return the tables."""
    module = import_module(f"bench.experiments.{KINDS[recipe['kind']][1]}")
    tables = module.tables(recipe, results)
    published = recipe.get("published", {})
    if published:
        keys = list(dict.fromkeys(key for row in published["rows"] for key in row))
        rows = [[row.get(key) for key in keys] for row in published["rows"]]
        tables.append(Table("published", f"Published: {published['source']}", list(map(Column, keys)), rows))
    for table in tables:
        Table(f"{name}-{table.name}", table.title, table.columns, table.rows, table.notes).save(results.file.parent)
    if hasattr(module, "figures"):
        save_figures(module.figures(recipe, results), figures, f"{name}-")
    return tables


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 if every run has a result, 3 if the limit or a failure left some out.
    """
    made = parser()
    options = made.parse_args(arguments)
    if options.list or not options.name:
        for file in sorted(RECIPES.glob("*.yaml")):
            recipe = read(file.stem)
            print(f"{file.stem}: {recipe['title']}\n  repeats: {recipe['repeats']}\n  needs: {recipe['needs']}")
        return 0
    try:
        return run(options)
    except (ValueError, FileNotFoundError, ImportError) as error:
        made.error(str(error))


def run(options: argparse.Namespace) -> int:
    """Do what the options say. Bad input raises ValueError or FileNotFoundError before anything is trained."""
    name = Path(options.name).stem
    recipe = read(options.name)
    if options.smoke:
        name = f"{name}-smoke"
        recipe = for_smoke(recipe, options.output / "smoke")
    recipe = chosen(recipe, options)
    kind, _ = KINDS[recipe["kind"]]
    part, parts = map(int, options.part.split("/"))
    if not 1 <= part <= parts:
        raise ValueError(f"--part must be K/N with K from 1 to N, got {options.part}")
    results = runner.Results(options.output / f"{name}.jsonl")
    stages = [] if options.tables else import_module(f"bench.experiments.{kind}").stages(recipe)
    if options.plan:
        for one in (one for stage in stages for one in stage.runs):
            print(f"{one.name}: {'to be made' if results.needs(one) else 'has a result'}")
        return 0
    complete = options.tables or runner.make(
        kind, stages, results, workers=options.workers, seconds=options.limit, part=(part - 1, parts)
    )
    for table in report(name, recipe, results, options.figures or options.output):
        print(f"\n{table.markdown()}")
    hours = sum(line["seconds"] for line in results.lines.values()) / 3600
    print(f"{len(results.lines)} runs, {hours:.2f} hours; results, tables and figures: {options.output}")
    return 0 if complete else 3


if __name__ == "__main__":
    raise SystemExit(main())
