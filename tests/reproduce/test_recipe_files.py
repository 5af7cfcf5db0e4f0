"""Recipes are read with all their keys checked, and have the settings of the paper."""

from dataclasses import dataclass

import pytest

from s2ft.reproduce.experiment import make_options
from s2ft.reproduce.kind import kind_of
from s2ft.reproduce.recipe import options_of, parse_setting, read_recipe, recipe_names, recipe_of

LINES = "kind: accuracy\ntitle: Mine\nrepeats: nothing\nneeds: a GPU\n"


@dataclass
class Options:
    rate: float
    rates: list[float]
    rows: int = 1
    name: str | None = None
    on: bool = False
    parts: dict | None = None


GIVEN = {"rate": 1, "rates": [1]}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_complete_and_its_options_are_those_of_its_kind(name):
    recipe = read_recipe(name)
    assert recipe.title and recipe.repeats and recipe.needs and recipe.smoke
    kind = kind_of(recipe.kind)
    assert type(make_options(recipe, kind, {})) is kind.options
    assert type(options_of(kind.options, recipe.options, recipe.smoke)) is kind.options


def test_the_settings_of_the_paper():
    """From the paper and the scripts of the reference code."""
    options = {name: make_options(read_recipe(name), kind_of("accuracy"), {}) for name in NAMES}
    for one in options.values():
        assert (one.betas, one.weight_decay, one.warmup_steps, one.batch_size) == ([0.9, 0.95], 0.0, 100, 64)
        assert (one.epochs, one.max_length, one.dtype, one.prompt, one.order) == (
            3,
            2048,
            "bfloat16",
            "alpaca",
            "random",
        )
        assert one.gradient_checkpointing
    for name in ("commonsense", "selection", "projections"):
        one = options[name]
        assert (one.learning_rate, one.schedule) == ([2e-4], "linear")
        assert (one.validation_rows, one.eval_steps, one.eval_from, one.best) == (120, 80, 0.5, True)
        assert (one.num_beams, one.max_new_tokens) == (4, 256)
    arithmetic, instruction = options["arithmetic"], options["instruction"]
    assert (arithmetic.learning_rate, arithmetic.schedule, arithmetic.best) == ([1e-3], "linear", False)
    assert (arithmetic.num_beams, arithmetic.max_new_tokens) == (4, 256)
    assert (instruction.learning_rate, instruction.schedule) == ([2e-5], "cosine")
    for name in ("commonsense", "arithmetic"):
        variants = options[name].variants
        assert variants["s2ft"]["options"] == {"d_ratio": 0.03, "allocation": "global"}
        assert variants["lora"]["options"] == {"r": 32, "lora_alpha": 64, "lora_dropout": 0.05}


NAMES = ("commonsense", "arithmetic", "instruction", "selection", "projections")


def test_selection_has_five_metrics_and_both_ends():
    variants = read_recipe("selection").options["variants"].values()
    found = {(one["options"].get("selection", "random"), one["options"].get("order")) for one in variants}
    scored = ("weight", "activation", "product", "gradient")
    assert found == {("random", None), *((metric, order) for metric in scored for order in ("largest", "smallest"))}


@pytest.mark.parametrize(
    "text,message",
    [
        (LINES + "optoins: {}", "there is no 'optoins'; did you mean options"),
        (LINES + "title: Twice", "title stands twice"),
        ("kind: accuracy\ntitle: Mine", "lacks repeats, needs"),
        (LINES + "options: [a]", "options must be lines such as"),
        (LINES.replace("Mine", "[1]"), "title must be text"),
        ("- a", "must hold lines such as"),
        ("a: [", "can't be read as YAML"),
    ],
)
def test_a_file_that_is_no_recipe(text, message):
    with pytest.raises(ValueError, match=message):
        recipe_of("mine", text)


def test_an_unknown_recipe_and_kind():
    with pytest.raises(ValueError, match="there is no recipe 'commonsence'; did you mean commonsense"):
        read_recipe("commonsence")
    with pytest.raises(ValueError, match="there is no kind of experiment 'acuracy'; did you mean accuracy"):
        kind_of("acuracy")
    with pytest.raises(FileNotFoundError, match="recipe mine.yaml doesn't exist"):
        read_recipe("mine.yaml")


def test_a_recipe_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text(LINES + "options: {epochs: 1e0}")
    recipe = read_recipe(str(tmp_path / "mine.yaml"))
    assert (recipe.name, recipe.options) == ("mine", {"epochs": 1.0})


@pytest.mark.parametrize(
    "settings,message",
    [
        ({**GIVEN, "rtae": 1}, "there is no 'rtae'; did you mean rate"),
        ({"rate": 1}, "option rates must be given"),
        ({**GIVEN, "rate": "1"}, "rate must be a number, got '1'"),
        ({**GIVEN, "rate": True}, "rate must be a number, got True"),
        ({**GIVEN, "rows": 1.5}, "rows must be a whole number, got 1.5"),
        ({**GIVEN, "rows": True}, "rows must be a whole number, got True"),
        ({**GIVEN, "name": 3}, "name must be text or null, got 3"),
        ({**GIVEN, "on": 1}, "on must be true or false, got 1"),
        ({**GIVEN, "rates": ["a"]}, "rates must be a number, got 'a'"),
        ({**GIVEN, "rates": None}, "rates must be a list, got None"),
        ({**GIVEN, "rate.x": 3}, "rate holds 1, not parts with names"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        options_of(Options, settings)


def test_later_settings_replace_earlier_ones_also_in_parts():
    first = {"rate": 1, "rates": 1e-3, "parts": {"a": {"b": 1, "c": 2}}}
    found = options_of(Options, first, {"parts.a.b": 5, "parts.d": 6}, {"rate": 2.5})
    assert found == Options(2.5, [1e-3], parts={"a": {"b": 5, "c": 2}, "d": 6})
    assert first["parts"] == {"a": {"b": 1, "c": 2}}  # a recipe is not changed by a run


@pytest.mark.parametrize(
    "text,found",
    [
        ("rate=1e-3", {"rate": 1e-3}),
        ("rates=[1e-3, 2]", {"rates": [1e-3, 2]}),
        ("name=null", {"name": None}),
        ("name=a=b", {"name": "a=b"}),
        ("parts.a={b: 1}", {"parts.a": {"b": 1}}),
    ],
)
def test_settings_of_the_command_line(text, found):
    assert parse_setting(text) == found


@pytest.mark.parametrize("text", ["rate", "=1", "rate=["])
def test_settings_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="--set"):
        parse_setting(text)
