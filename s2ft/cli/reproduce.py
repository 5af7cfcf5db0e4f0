"""s2ft reproduce: repeat an experiment."""

import shlex
from dataclasses import dataclass

from s2ft.cli.parse import MODEL, UsageError, parse, quiet_transformers
from s2ft.train.options import check_fields, option

EXAMPLE = """  s2ft reproduce --list
  s2ft reproduce commonsense --smoke
  s2ft reproduce commonsense --model meta-llama/Meta-Llama-3-8B --data LLM-Adapters --method s2ft lora --seeds 0 1 2
  s2ft reproduce arithmetic --model my-model --set train=my-data.jsonl learning_rate=[1e-4,1e-3]"""


@dataclass
class ReproduceArguments:
    name: str | None = option(None, "a recipe, or a YAML file with one of your own", positional=True, metavar="NAME")
    model: str | None = option(None, MODEL, shown="the recipe's")
    data: str | None = option(
        None, "folder of the public data files, such as a checkout of LLM-Adapters", metavar="DIR"
    )
    method: list[str] | None = option(None, "methods to run", metavar="METHOD", shown="the recipe's")
    seeds: list[int] | None = option(None, "a run for each seed", metavar="SEED", shown="the recipe's")
    output: str | None = option(None, "folder of the results", metavar="DIR", shown="reproduce-NAME")
    set: list[str] | None = option(
        None, "values of the recipe's options; VALUE is YAML; --options prints them", metavar="NAME=VALUE"
    )
    options: bool = option(False, "print the recipe's options with their values and meanings, and run nothing")
    dry_run: bool = option(False, "check options, data and methods, print the runs, and run nothing")
    smoke: bool = option(False, "show in seconds that the recipe works, on a tiny random model and made-up data")
    resume: bool = option(False, "go on in --output, and make the runs that have no result or failed")
    list: bool = option(False, "print the recipes, what they repeat and what they need")  # last: it hides the type

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dry_run and self.smoke:
            raise ValueError("dry_run and smoke exclude each other: a smoke run takes seconds")


def run(arguments: list[str]) -> None:
    description = (
        "Repeat an experiment of the S²FT paper, or one of your own.\nWrite tables, figures and a JSON of each run."
    )
    (job,) = parse("reproduce", description, [ReproduceArguments], arguments, EXAMPLE)
    if job.list:
        print(listing())
        return
    from s2ft.reproduce.recipe import read_recipe, recipe_names

    if job.name is None:
        raise UsageError(f"name a recipe: {', '.join(recipe_names())} (see s2ft reproduce --list)")
    recipe = read_recipe(job.name)
    if job.options:
        print(described_options(recipe, settings_of(job, recipe)))
        return
    make(job, recipe, shlex.join(["s2ft", "reproduce", *arguments]))


def make(job: ReproduceArguments, recipe, command: str) -> None:
    """Make the runs of a recipe and print its tables.

    Args:
        job: The options of the command.
        recipe: The recipe.
        command: The command line.

    Raises:
        SystemExit: A run failed. All others were made.
    """
    from s2ft.packages import check_packages
    from s2ft.reproduce.experiment import planned_runs, run_recipe

    settings = settings_of(job, recipe)
    check_packages("s2ft reproduce")
    quiet_transformers()
    output = job.output or f"reproduce-{recipe.name}{'-smoke' * job.smoke}"
    if job.dry_run:
        print("\n".join(map(line_of, planned_runs(recipe, output, settings))))
        return
    found = run_recipe(recipe, output, settings, smoke=job.smoke, resume=job.resume, command=command)
    for table in found.tables:
        print(f"\n{table.text()}")
    print(f"\ntables, figures and runs: {output}")
    if job.smoke:
        print("a smoke run shows that the recipe works; its numbers mean nothing")
    if found.failed:
        raise SystemExit(1)


def line_of(run) -> str:
    """Return a run of the plan as a line: its name, the parameters that it trains if they are known, its status."""
    parameters = run.configuration.get("parameters")
    status = {"missing": "to be made", "done": "has a result", "failed": "failed, to be made again"}[run.status]
    return f"{run.name}: {f'{parameters:,} parameters, ' if parameters else ''}{status}"


def settings_of(job: ReproduceArguments, recipe) -> dict:
    """Return the settings of the command line, by the names of the recipe's options.

    Raises:
        UsageError: The recipe has no such option.
    """
    from dataclasses import fields

    from s2ft.reproduce.kind import kind_of
    from s2ft.reproduce.recipe import parse_setting

    known = [one.name for one in fields(kind_of(recipe.kind).options)]
    given = {"model": job.model, "data": job.data, "methods": job.method, "seeds": job.seeds}
    settings = {name: value for name, value in given.items() if value is not None}
    for name in settings:
        if name not in known:
            raise UsageError(f"recipe {recipe.name} takes no --{'method' if name == 'methods' else name}")
    for text in job.set or ():
        try:
            settings |= parse_setting(text)
        except ValueError as error:
            raise UsageError(str(error)) from error
    return settings


def listing() -> str:
    """Return all recipes with what they repeat and what they need."""
    import textwrap

    from s2ft.reproduce.recipe import read_recipe, recipe_names

    parts = []
    for name in recipe_names():
        recipe = read_recipe(name)
        lines = [f"repeats: {recipe.repeats}", f"needs: {recipe.needs}"]
        wrapped = ["\n".join(textwrap.wrap(line, 108, initial_indent="  ", subsequent_indent="    ")) for line in lines]
        parts.append("\n".join([f"{name}: {recipe.title}", *wrapped]))
    return "\n\n".join([*parts, "s2ft reproduce NAME --options prints the options of a recipe."])


def described_options(recipe, settings: dict) -> str:
    """Return the options of a recipe as YAML, with their meanings as comments."""
    from dataclasses import asdict, fields

    import yaml

    from s2ft.reproduce.experiment import make_options
    from s2ft.reproduce.kind import kind_of

    kind = kind_of(recipe.kind)
    options = make_options(recipe, kind, settings)
    values = asdict(options)
    lines = []
    for one in fields(options):
        text = yaml.safe_dump({one.name: values[one.name]}, sort_keys=False, allow_unicode=True, width=100).rstrip()
        lines += [f"# {one.metadata.get('help', '')}", text]
    return "\n".join(lines)
