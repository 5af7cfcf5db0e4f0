"""Options of the training commands: TRL's parser, with short names, groups, config files and errors that help."""

import argparse
import copy
import json
import logging
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from functools import cache
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from trl import ModelConfig
from trl.scripts.utils import TrlParser

from s2ft.cli.config_files import read_config, set_environment
from s2ft.cli.option_table import (
    ELSEWHERE,
    GROUP_OF,
    HELP,
    HELP_OF,
    KIND_GROUPS,
    MORE_METADATA,
    NOT_USED,
    OPTIONS,
    OWN_NAMES,
    RENAMED,
    SHORT_NAMES,
)
from s2ft.cli.parse import FALSE, TRUE, Help, UsageError, choice, did_you_mean, help_text
from s2ft.train.arguments import RunArguments

SAVE_STEPS = next(one.default for one in fields(RunArguments) if one.name == "save_steps")
logger = logging.getLogger(__name__)
MORE = "more options of transformers and TRL"
REQUIRED = (("model_name_or_path",), ("data", "dataset_name", "datasets"), ("output_dir",))  # one of each
TAKEN = {short for names in SHORT_NAMES.values() for short in names}
# Secrets, and what concerns one call only.
WRITTEN = ("learning_rate",)  # always, since without it the rate follows from the model
NOT_WRITTEN = ("hub_token", "resume_from_checkpoint", "overwrite", "stop_after")
LATEST = "latest"  # --resume without a checkpoint
LORA = [one.name for one in fields(ModelConfig) if one.name.startswith("lora_") or one.name.startswith("use_")]
LORA = [name for name in LORA if name != "use_bnb_nested_quant"]


def _lora_options() -> type:
    """A dataclass of the options of `trl sft` that S²FT replaces."""
    kept = [(one.name, one.type, field(default=one.default)) for one in fields(ModelConfig) if one.name in LORA]
    return make_dataclass("LoraOptions", [*kept, (NOT_USED, bool, field(default=False))])


LoraOptions = _lora_options()


@dataclass
class Parsed:
    """The options of a training command.

    Attributes:
        objects: One object of each dataclass.
        given: The options that the command line or the config file sets, by their full names.
    """

    objects: dict[type, Any]
    given: dict[str, Any]

    def __getitem__(self, kind: type) -> Any:
        return self.objects[kind]

    def config(self) -> dict[str, Any]:
        """The learning rate, and the given options that differ from their defaults.

        Secrets and what concerns one call only are left out.
        """
        defaults = {
            RENAMED.get((kind.__name__, one.name), one.name): _default(one)
            for kind in self.objects
            for one in fields(kind)
        }
        return {
            key: value
            for key, value in self.given.items()
            if key not in NOT_WRITTEN and (key not in defaults or value != defaults[key] or key in WRITTEN)
        }

    def config_text(self) -> str:
        """The text of config.yaml, which `--config` reads."""
        import yaml

        body = yaml.safe_dump(self.config(), sort_keys=False, allow_unicode=True, width=110)
        return f"# {versions()}\n{body}"


def versions() -> str:
    """The versions of the packages that determine a run."""
    from importlib.metadata import version

    from s2ft import __version__

    return ", ".join(
        [f"s2ft {__version__}"]
        + [f"{package} {version(package)}" for package in ("torch", "transformers", "trl", "datasets")]
    )


def parse_training(
    command: str, kinds: Sequence[type], arguments: Sequence[str], description: str = "", example: str = ""
) -> Parsed:
    """Read the options of a training command from the command line and from the file of `--config`.

    The command line takes precedence over the file. An option has TRL's name, with dashes or underscores, and may have
    short names.

    Args:
        command: Name of the command.
        kinds: Dataclasses whose fields are the options.
        arguments: Words of the command line after the command's name.
        description: What the command does.
        example: Command lines for the end of the help.

    Returns:
        The objects, and what was given.

    Raises:
        UsageError: An option or a key is unknown, missing, given twice, or has a wrong value.
        SystemExit: The help was asked for and printed.
    """
    arguments = list(arguments)
    set_environment(arguments)
    parser = _parser((*kinds, LoraOptions), "--help-all" in arguments, command, description, example)
    given = parser.given(arguments)
    missing = [names[0] for names in REQUIRED if not any(given.get(name) for name in names)]
    if missing:
        parser.error(f"missing: {', '.join(parser.short_name(name) for name in missing)}")
    _take_lora(given)
    filled = {**given, **_evaluation(given), **_text_field(given)}
    objects: dict[type, Any] = {}
    for kind in kinds:
        values = {
            one.name: copy.deepcopy(filled[name])
            for one in fields(kind)
            if one.init and (name := RENAMED.get((kind.__name__, one.name), one.name)) in filled
        }
        try:
            objects[kind] = kind(**values)
        except ValueError as error:
            parser.error(str(error))
    _share_seed(objects, given)
    return Parsed(objects, given)


def _share_seed(objects: dict[type, Any], given: dict[str, Any]) -> None:
    """Give the selection the seed that the run is given, unless it has its own."""
    for kind, value in objects.items():
        if kind.__name__ == "S2FTConfig" and "selection_seed" not in given and "seed" in given:
            value.seed = given["seed"]


def _evaluation(given: dict[str, Any]) -> dict[str, Any]:
    """The options that follow from those of the evaluation: when to evaluate, and that the best checkpoint is kept."""
    found: dict[str, Any] = {}
    every, save = given.get("eval_steps"), given.get("save_strategy", "steps")
    best = given.get("load_best_model_at_end", bool(given.get("early_stopping_patience")))
    if best:
        found = {"load_best_model_at_end": True, "eval_strategy": "steps" if every or save == "best" else save}
    elif every:
        found = {"eval_strategy": "steps"}
    if every == 0:
        found["eval_steps"] = None
    if not every and {**found, **given}.get("eval_strategy") == "steps" and (best or "logging_steps" not in given):
        found["eval_steps"] = given.get("save_steps") or SAVE_STEPS  # transformers would take those of the log: 1
    if best and every and "save_steps" not in given:
        found["save_steps"] = every  # so that each evaluation has a checkpoint
    return {key: value for key, value in found.items() if key not in given or key == "eval_steps"}


def _text_field(given: dict[str, Any]) -> dict[str, Any]:
    """TRL's name of the field with the text, as one of the fields that are renamed."""
    if given.get("dataset_text_field", "text") == "text":
        return {}
    return {"field": [*given.get("field", []), f"text={given['dataset_text_field']}"]}


def _take_lora(given: dict[str, Any]) -> None:
    """Turn the rank of a LoRA into the size of the selection, drop its other options, and log that."""
    found = {name: given.pop(name) for name in [*LORA, NOT_USED] if name in given}
    if not found:
        return
    taken = {}
    sizes = ("match_lora_rank", "budget", "units")
    if found.get("use_peft", True) and not any(name.endswith("_ratio") or name in sizes for name in given):
        taken = {"match_lora_rank": found["lora_r"]} if "lora_r" in found else {}
    if found.get("lora_modules_to_save") and "modules_to_save" not in given:
        taken["modules_to_save"] = found["lora_modules_to_save"]
    given.update(taken)
    ignored = [name for name in found if name not in ("use_peft", "lora_r" if "match_lora_rank" in taken else "",
               "lora_modules_to_save" if "modules_to_save" in taken else "")]  # fmt: skip
    said = [f"{key} {value}" for key, value in taken.items()]
    logger.info(
        "S²FT takes the place of LoRA%s%s",
        f": {', '.join(said)}" if said else "",
        f"; not used: {', '.join(ignored)}" if ignored else "",
    )


def _default(one: Field) -> Any:
    return one.default_factory() if one.default_factory is not MISSING else one.default


class TrainingParser(TrlParser):
    """TRL's parser with short names and groups. An error is one line.

    Args:
        kinds: Dataclasses whose fields are the options. Dataclasses that have a field in common share the option.
        everything: Whether the help shows all options.
        command: Name of the command.
        description: What the command does.
        example: Command lines for the end of the help.
    """

    def __init__(
        self, kinds: Iterable[type], everything: bool = False, command: str = "", description: str = "", example=""
    ) -> None:
        self.everything, self.groups, self.hints = everything, {}, {}
        self.options: dict[str, argparse.Action] = {}
        super().__init__(
            [],
            prog=f"s2ft {command}",
            description=description,
            formatter_class=Help,
            allow_abbrev=False,
            epilog=f"example:\n{example}" if example else None,
            add_help=False,
        )
        self.add_argument("--help", "-h", action="help", help="show the options that are often needed")
        self.add_argument("--help-all", action="help", help="show all options, also TRL's and transformers' others")
        self.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="read options from a YAML file")
        self.groups = {name: self.add_argument_group(name) for name in [*OPTIONS, MORE]}
        self.own_names = {name for kind in kinds for name in OWN_NAMES.get(kind.__name__, ())}
        ordered = [(one, kind) for kind in kinds for one in self._fields(kind)]
        places = {name: place for place, name in enumerate(GROUP_OF)}
        for one, kind in sorted(ordered, key=lambda pair: places.get(pair[0].name, len(places))):
            self._add(one, kind)
        self.usage = f"{self.prog} [--config FILE] --model MODEL --data DATA --output DIR [options]"

    def _fields(self, kind: type) -> list[Field]:
        """Copies of a dataclass's fields, with resolved types and their names on the command line."""
        hints, found = get_type_hints(kind), []
        for one in fields(kind):
            if one.init:
                one = copy.copy(one)
                one.type = hints[one.name]
                one.name = RENAMED.get((kind.__name__, one.name), one.name)
                found.append(one)
        return found

    def _add(self, one: Field, kind: type) -> None:
        """Add the option of a field to its group, unless another dataclass has it, or another option has its name."""
        if one.name in self.options or (one.name in TAKEN and one.name not in self.own_names):
            return
        own, metadata, hint = one.name in GROUP_OF or kind.__name__ in KIND_GROUPS, one.metadata, one.type
        hidden = kind is LoraOptions or not (own or self.everything)
        group = self.groups[GROUP_OF.get(one.name) or KIND_GROUPS.get(kind.__name__, MORE)]
        short = [name for name in SHORT_NAMES.get(one.name, ()) if name not in self.own_names]
        one.metadata = {"aliases": [word for name in short for word in _spellings(name)]}
        if _list_of(hint):
            one.metadata["action"] = "extend"  # --field a=b --field c=d
        before = len(group._group_actions)
        self._parse_dataclass_field(group, one)
        for action in group._group_actions[before:]:
            negated = action.nargs == 0
            _complete(action, metadata, hint)
            action.help = argparse.SUPPRESS if hidden else _help(one, metadata, negated, kind)
        self.options[one.name] = group._group_actions[before]
        self.hints[one.name] = hint
        if self.options[one.name].const is True and _default(one) is True and not hidden:
            self.options[one.name].help = argparse.SUPPRESS  # the help shows --no-... in its place
        if one.name == "resume_from_checkpoint":
            self.options[one.name].nargs, self.options[one.name].const = "?", LATEST

    # ---- reading -------------------------------------------------------------------------------------------

    def given(self, arguments: list[str]) -> dict[str, Any]:
        """Return the options that the command line and the config file set. Raises UsageError."""
        self._check_names(arguments)
        found, unknown = self.parse_known_args(arguments)
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        given = vars(found)
        given = {key: value for key, value in given.items() if key not in ("help", "help_all")}
        path = given.pop("config", None)
        return {**(self._from_file(path) if path else {}), **given}

    def _check_names(self, arguments: list[str]) -> None:
        """Check for unknown options and for two names of one option, before argparse complains about others."""
        spelled: dict[str, str] = {}
        for word in arguments:
            if word == "--":
                break
            name = word.partition("=")[0]
            if not word.startswith("--") or " " in name:
                continue
            action = self._option_string_actions.get(name)
            if action is None:
                self.error(f"there is no option {name}{self._nearest(name)}")
            plain = name.replace("_", "-")
            if spelled.setdefault(action.dest, plain) != plain and not action.dest == "help":
                self.error(f"{spelled[action.dest]} and {plain} are the same option: give one of them")

    def _nearest(self, name: str) -> str:
        known = [word[2:] for word in self._option_string_actions if word.startswith("--") and "_" not in word]
        return did_you_mean(name.lstrip("-").replace("_", "-"), known, ELSEWHERE, "--")

    def _from_file(self, path: str) -> dict[str, Any]:
        """Return the options of a config file by their full names."""
        values = read_config(path)
        values.pop("env", None)
        found: dict[str, Any] = {}
        spelled: dict[str, str] = {}
        for key, value in values.items():
            action = self._option_string_actions.get(f"--{str(key).replace('-', '_')}")
            if action is None or action.dest in ("config", "help", "help_all"):
                nearest = self._nearest(str(key)).replace("--", "").replace("-", "_")
                self.error(f"config {path}: there is no option {key!r}{nearest}")
            if action.dest in found:
                self.error(f"config {path}: {spelled[action.dest]} and {key} are the same option: keep one of them")
            spelled[action.dest] = str(key)
            try:
                found[action.dest] = self._value(action, value)
            except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                self.error(f"config {path}: {key} {error}")
        return found

    def _value(self, action: argparse.Action, value: Any) -> Any:
        """Convert a value of YAML as argparse converts the words of a command line."""
        hint = self.hints[action.dest]
        if value is None or _takes(hint, type(value)) and isinstance(value, (list, dict)):
            read = action.type if isinstance(value, list) and action.nargs == "+" else None
            return [read(str(item)) if not isinstance(item, dict) else item for item in value] if read else value
        if isinstance(value, dict) and action.dest == "field":  # `field: {instruction: question}`
            return value
        if isinstance(value, (list, dict)):
            raise ValueError(f"must be one value, got {value!r}")
        if action.nargs == 0:  # no_...: true
            return not _switch(str(value))
        if isinstance(value, bool) and not _takes(hint, bool):
            value = _word_of(value, action)
        found = (action.type or str)(str(value))
        if action.choices is not None and found not in action.choices:
            known = [str(known) for known in action.choices]
            raise ValueError(f"must be one of {', '.join(known)}, got {value!r}{did_you_mean(str(value), known)}")
        return [found] if action.nargs == "+" else found

    # ---- what is said --------------------------------------------------------------------------------------

    def short_name(self, name: str) -> str:
        """The name of an option on the command line: the shorter one of its full name and its first short name."""
        return f"--{min([*SHORT_NAMES.get(name, ())[:1], name], key=len).replace('_', '-')}"

    def _argument(self, match: re.Match) -> str:
        name = self.short_name(self._option_string_actions[match[1].split("/")[0]].dest)
        return f"{name} must " if match[2] else f"{name}: "

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with one line."""
        message = re.sub(r"^argument ([^:]+): (must )?", self._argument, " ".join(message.split()))
        raise UsageError(f"{message} (see {self.prog} --help)")


_parser = cache(TrainingParser)


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _takes(hint: Any, kind: type) -> bool:
    """Whether a type takes values of `kind`."""
    if hint is Any:
        return True
    if get_origin(hint) in (Union, types.UnionType):
        return any(_takes(part, kind) for part in get_args(hint))
    return (get_origin(hint) or hint) is kind


def _list_of(hint: Any) -> Any:
    """The type of the items if a type takes lists, else None."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((get_args(part)[0] for part in parts if get_origin(part) is list), None)


def _word_of(value: bool, action: argparse.Action) -> str:
    """The word that YAML reads as true or false: `eval_strategy: no`."""
    if value is False and action.choices is not None and "no" in action.choices:
        return "no"
    if value is True and action.const == LATEST:
        return LATEST
    raise ValueError(f"must not be {str(value).lower()}; put a word into quotes")


def _switch(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() in TRUE


def _number(kind: type, optional: bool):
    what = "a whole number" if kind is int else "a number"

    def read(text: str) -> Any:
        if optional and text.lower() in ("none", "null"):
            return None
        for as_kind in dict.fromkeys((int, kind)):  # a whole number stays one: it is shown and written so
            try:
                return as_kind(text)
            except ValueError:
                continue
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")

    return read


def _dictionary(text: str) -> Any:
    """Read a dictionary in JSON. Another text is the name of a file."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a dictionary in JSON, got {text!r}: {error}") from None


def _default_of(one: Field) -> Any:
    return None if one.default is MISSING and one.default_factory is MISSING else _default(one)


def _complete(action: argparse.Action, metadata: Any, hint: Any) -> None:
    """Replace what argparse does on its own: defaults, requirements, errors about numbers and choices."""
    action.default, action.required = argparse.SUPPRESS, False
    if action.nargs == 0:
        return
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    plain = [part for part in parts if part is not type(None)]
    if plain[0] is bool:
        action.nargs, action.const, action.type, action.choices = "?", True, _switch, None
        return
    if action.dest == "datasets":
        action.type = lambda path: {"path": path}
    elif item := _list_of(hint):
        action.nargs, action.type = "+", _number(item, False) if item in (int, float) else str
    elif str not in plain and plain[0] in (int, float):
        action.type = _number(plain[0], type(None) in parts)
    elif any(_takes(part, dict) for part in plain):
        action.type = _dictionary
    choices = [str(value) for value in metadata.get("choices") or action.choices or () if value is not None]
    if choices:
        action.type, action.choices = choice(choices), choices
    action.metavar = metadata.get("metavar") or _metavar(action, plain, choices)


def _metavar(action: argparse.Action, plain: list, choices: list[str]) -> str:
    if choices:
        return f"{{{','.join(choices)}}}" if len(choices) < 8 else "NAME"
    if any(_takes(part, dict) for part in plain):
        return "JSON"
    if action.dest.endswith("_ratio"):
        return "RATIO"
    kinds = {int: "N", float: "X"}
    return kinds.get(plain[0], "N" if int in plain and str not in plain else action.dest.split("_")[-1].upper())


def _help(one: Field, metadata: Any, negated: bool, kind: type) -> str:
    """The help text of an option, with its default. Of a long text of another package, the first sentence."""
    text = (
        HELP_OF.get((kind.__name__, one.name)) or HELP.get(one.name) or metadata.get("help", one.name.replace("_", " "))
    )
    text = re.split(r"\. (?=[A-Z])", text)[0]
    text = text if text.endswith("...") else text.rstrip(".")
    if negated:
        return help_text(
            {**metadata, "off": metadata.get("off", f"turn off: {text[:1].lower()}{text[1:]}")}, None, "off"
        )
    return help_text({**metadata, "help": text, **MORE_METADATA.get(one.name, {})}, _default_of(one))
