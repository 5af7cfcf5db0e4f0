"""Options from dataclasses: a field is an option. Nothing here imports PyTorch, so that ``--help`` is quick.

transformers' HfArgumentParser and TRL's TrlParser were tried. They import PyTorch, take an option under two names at
once, do not check the values of a YAML file, know no nearest name, and print the whole usage for an error.
"""

import argparse
import copy
import difflib
import enum
import functools
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from s2ft.config import did_you_mean
from s2ft.files.plain_text import check_output, parse_yaml

MANY = 8  # so many choices of an option stand in its help text, fewer ones behind its name
MOST = 16  # so many choices are listed in an error, of more the closest ones
SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
TRUE, FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")
LATEST = "latest"  # --resume without a checkpoint
# Options by the names that other programs give them. They are suggested if the command has the option.
OTHER_NAMES = {
    "adapter": "adapter-path lora-path",
    "batch-size": "bs",
    "bf16": "autocast precision mixed-precision",
    "data": "dataset dataset-name train-file",
    "dtype": "precision torch-dtype torchdtype",
    "dtype bfloat16": "bf16",
    "dtype float16": "fp16",
    "eval-data": "eval-dataset validation-file",
    "limit": "max-samples",
    "match-lora-rank": "lora-rank r rank",
    "max-length": "cutoff-len max-seq-length max-seq-len sequence-len",
    "max-new-tokens": "max-tokens",
    "model": "base-model model-name-or-path",
    "output": "out output-dir",
    "train-sampling-strategy group_by_length": "group-by-length",
    "use-cpu": "no-cuda",
    "weight-decay": "wd",
}

# Help texts that several commands share.
MODEL = "a checkpoint folder, a name on the hub, or a .gguf file"
BASE_MODEL = {"text": f"the adapter's base model: {MODEL}", "shown": "the one that the adapter records"}
ADAPTER = "an adapter: the output folder of a run, an adapter's folder, a checkpoint, or a name on the hub"
DTYPE = "dtype of the model's weights; auto: the dtype of the adapter's training, or without adapter the checkpoint's"


class UsageError(ValueError):
    """A mistake in the options of a command."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of description and example, and shows each option once."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(110, shutil.get_terminal_size().columns - 2))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(name for name in action.option_strings if "_" not in name)
        takes_value = action.nargs != 0 and action.const is None
        return f"{names} {self._format_args(action, action.dest.upper())}" if takes_value else names


class OptionParser(argparse.ArgumentParser):
    """The parser of a command whose options are the fields of dataclasses.

    It raises UsageError with one line that names the help, where argparse prints the whole usage and exits.

    Args:
        command: Name of the command.
        description: What the command does.
        kinds: Dataclasses; see `s2ft.config.option` for the metadata of their fields. Dataclasses that have a field in
            common share the option.
        example: Command lines for the end of the help.
        groups: Headings by dataclass, for the fields that are in no other place.
        table: By heading of the help: option → its short names, and a help text that replaces the field's. The help
            has this order.
        rest: Heading of all other fields. `--help` leaves it out, and `--help-all` shows it.
        renamed: Names of options by the dataclass's name and the field's.
        required: Names of which one must be given, for each requirement. Default: the fields without a default.
        everything: Whether the help shows the options under `rest` too.
    """

    def __init__(
        self,
        command: str,
        description: str,
        kinds: Sequence[type],
        example: str = "",
        groups: Mapping[type, str] | None = None,
        *,
        table: Mapping[str, Mapping[str, tuple[str, str]]] | None = None,
        rest: str | None = None,
        renamed: Mapping[tuple[str, str], str] | None = None,
        required: Sequence[Sequence[str]] = (),
        everything: bool = False,
    ) -> None:
        self.kinds, self.everything = list(kinds), everything
        self.groups, self.rest, self.renamed = groups or {}, rest, renamed or {}
        super().__init__(
            prog=f"s2ft {command}",
            description=description,
            formatter_class=Help,
            allow_abbrev=False,
            epilog=f"example:\n{example}" if example else None,
            add_help=rest is None,
        )
        if rest is not None:
            self.add_argument("--help", "-h", action="help", help="show the options that are often needed")
            self.add_argument("--help-all", action="help", help="show all options, also TRL's and transformers' others")
            self.add_argument(
                "--config", metavar="FILE", default=argparse.SUPPRESS, help="read options from a YAML file"
            )
        known = [(one, kind) for kind in self.kinds for one in fields(kind) if one.init]
        # By name: heading, short names, help text.
        self.entries = {
            name: (heading, *entry) for heading, options in (table or {}).items() for name, entry in options.items()
        }
        own = {one.name for one, _ in known if one.name in self.entries}  # is no short name of another option
        self.short = {
            name: [short for short in names.split() if short.replace("-", "_") not in own]
            for name, (_, names, _) in self.entries.items()
        }
        taken = {short.replace("-", "_") for names in self.short.values() for short in names}
        self.options: dict[str, argparse.Action] = {}
        self.hints: dict[str, Any] = {}
        self.defaults: dict[str, Any] = {}
        self.headings: dict[str, Any] = {}
        places = {name: place for place, name in enumerate(self.entries)}
        for one, kind in sorted(known, key=lambda pair: places.get(self.name_of(*pair), len(places))):
            if (name := self.name_of(one, kind)) not in self.options and name not in taken:
                self._add(name, one, kind)
        needed = [self.options[name] for name, default in self.defaults.items() if default is MISSING]
        self.required = required or [(one.dest,) for one in needed if one.option_strings]
        self.positional = [one for one in self.options.values() if not one.option_strings]
        words = [
            f"[{one.metavar}]" if one.nargs == "?" else one.metavar + " ..." * (one.nargs == "+")
            for one in self.positional
        ]
        words += [f"{self.short_name(names[0])} {self.options[names[0]].metavar}" for names in self.required]
        words = ["[--config FILE]"] * (rest is not None) + words
        self.usage = " ".join([self.prog, *words, "[options]"])

    def name_of(self, one: Field, kind: type) -> str:
        """The name of the option of a field."""
        return self.renamed.get((kind.__name__, one.name), one.name)

    def _add(self, name: str, one: Field, kind: type) -> None:
        """Add the option of a field, as --d-ratio and as --d_ratio."""
        hint, metadata = _hints(kind)[one.name], one.metadata
        heading, _, text = self.entries.get(name, ("", "", ""))
        heading = heading or metadata.get("group") or self.groups.get(kind, self.rest)
        default = one.default if one.default_factory is MISSING else one.default_factory()
        hidden = (heading == self.rest is not None and not self.everything) or "hidden" in metadata
        shown = {**metadata, "help": text or metadata.get("help", name.replace("_", " "))}
        settings = {"default": argparse.SUPPRESS, **_reading(name, hint, metadata)}
        settings["help"] = argparse.SUPPRESS if hidden else help_text(shown, default)
        if default is True and settings.get("const") is True:
            settings["help"] = argparse.SUPPRESS  # the help shows --no-... in its place
        if heading is not None and heading not in self.headings:
            self.headings[heading] = self.add_argument_group(heading)
        group = self.headings.get(heading, self)
        self.hints[name], self.defaults[name] = hint, default
        if metadata.get("positional"):
            several = {"nargs": "?"} if default is not MISSING and "nargs" not in settings else {}
            self.options[name] = group.add_argument(name, **{**settings, "action": None, **several})
            return
        words = [name, *self.short.get(name, ())]
        self.options[name] = group.add_argument(*(word for each in words for word in _spellings(each)), **settings)
        if default is True and settings.get("const") is True:
            off = metadata.get("off", f"turn off: {shown['help'][:1].lower()}{shown['help'][1:]}")
            off = argparse.SUPPRESS if hidden else help_text({"help": off}, None)
            group.add_argument(
                *_spellings(f"no_{name}"), dest=name, action="store_false", default=argparse.SUPPRESS, help=off
            )

    # ---- reading -------------------------------------------------------------------------------------------

    def parse_args(self, arguments: list[str]) -> argparse.Namespace:  # type: ignore[override]
        # Before argparse, which would first complain about the missing option that a wrong name stands for.
        spelled: dict[str, str] = {}
        for word in itertools.takewhile(lambda word: word != "--", arguments):
            name = word.partition("=")[0]
            if not word.startswith("--") or " " in name:
                continue
            action = self._option_string_actions.get(name)
            if action is None:
                self.error(self.unknown(name))
            plain = name.replace("_", "-")
            if spelled.setdefault(action.dest, plain) != plain and action.nargs != 0:
                self.error(f"{spelled[action.dest]} and {plain} are the same option: give one of them")
        # argparse would take FILE for the value of a switch before it: `--undo FILE`.
        actions = self._option_string_actions if self.positional else {}
        found, unknown = self.parse_known_args(
            [
                f"{word}=true"
                if word in actions and actions[word].const is True and after.lower() not in TRUE + FALSE
                else word
                for word, after in zip(arguments, [*arguments[1:], ""])
            ]
        )
        if unknown:
            is_option = unknown[0].startswith("-")
            self.error(self.unknown(unknown[0]) if is_option else f"unexpected argument {unknown[0]!r}")
        return found

    def given(self, words: Sequence[str]) -> dict[str, Any]:
        """Return the options that the command line and the file of --config set, by their full names.

        Raises:
            UsageError: An option or a key is unknown, missing, given twice, or has a wrong value.
        """
        found = {key: value for key, value in vars(self.parse_args(list(words))).items() if "help" not in key}
        path = found.pop("config", None)
        found = {**(self._from_file(path) if path else {}), **found}
        missing = [names[0] for names in self.required if not any(found.get(name) for name in names)]
        if missing:
            self.error(f"missing: {', '.join(self.short_name(name) for name in missing)}")
        return found

    def objects(self, given: Mapping[str, Any]) -> list[Any]:
        """Return an object of each dataclass. A ValueError of one becomes a UsageError."""
        made = []
        for kind in self.kinds:
            names = {one.name: self.name_of(one, kind) for one in fields(kind) if one.init}
            values = {name: copy.deepcopy(given[option]) for name, option in names.items() if option in given}
            try:
                made.append(kind(**values))
            except ValueError as error:
                self.error(str(error))
        return made

    def _from_file(self, path: str) -> dict[str, Any]:
        """Return the options of a config file by their full names."""
        found: dict[str, Any] = {}
        spelled: dict[str, str] = {}
        for key, value in read_config(path).items():
            if key == "env" or (key in ("streaming", "dataset_streaming") and value is False):  # TRL's default
                continue
            action = self._option_string_actions.get(f"--{str(key).replace('-', '_')}")
            if action is None or action.dest not in self.options:
                self.error(f"config {path}: {self.unknown(str(key))}")
            if action.dest in found:
                self.error(f"config {path}: {spelled[action.dest]} and {key} are the same option: keep one of them")
            spelled[action.dest] = str(key)
            hint = self.hints[action.dest]
            if value is None and (NoneType not in get_args(hint) or _takes(hint, list)):
                continue  # not filled in
            try:
                found[action.dest] = self._value(action, value)
            except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                self.error(f"config {path}: {key} {error}")
        return found

    def _value(self, action: argparse.Action, value: Any) -> Any:
        """Convert a value of YAML as argparse converts the words of a command line."""
        hint = self.hints[action.dest]
        if isinstance(value, list) and _takes(hint, list) and action.nargs == "+":
            return [item if isinstance(item, dict) else action.type(str(item)) for item in value]
        of_field = isinstance(value, dict) and action.dest == "field"  # `field: {instruction: question}`
        if value is None or of_field or (isinstance(value, (list, dict)) and _takes(hint, type(value))):
            return value
        if isinstance(value, (list, dict)):
            raise ValueError(f"must be one value, got {value!r}")
        if action.nargs == 0:  # no_...: true
            return not _switch(str(value))
        if isinstance(value, bool) and not _takes(hint, bool):
            value = _word_of(value, action)
        found = action.type(str(value))
        return [found] if action.nargs == "+" else found

    # ---- what is said --------------------------------------------------------------------------------------

    def unknown(self, name: str) -> str:
        """Say that there is no such option, and which one is near."""
        known = [word[2:] for word in self._option_string_actions if word.startswith("--") and "_" not in word]
        return f"there is no option {name}" + did_you_mean(name.lstrip("-").replace("_", "-"), known, OTHER_NAMES, "--")

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with one line."""
        message = re.sub(
            r"^argument ([^:]+): (must )?", lambda m: self.shown(m[1]) + (" must " if m[2] else ": "), message
        )
        message = message.replace("the following arguments are required:", "missing:")
        raise UsageError(f"{' '.join(message.split())} (see {self.prog} --help)")

    def short_name(self, name: str) -> str:
        """The name of an option on the command line: the shorter one of its full name and its first short name."""
        return f"--{min([*self.short.get(name, ())[:1], name], key=len).replace('_', '-')}"

    def shown(self, names: str) -> str:
        """The name of an option for a message; argparse gives all of its names, separated by slashes."""
        action = self._option_string_actions.get(names.split("/")[0])
        return self.short_name(action.dest) if action else names


def parse(
    command: str,
    description: str,
    kinds: list[type],
    arguments: list[str],
    example: str = "",
    groups: Mapping[type, str] | None = None,
) -> tuple[list, dict[str, Any]]:
    """Read the options of a command.

    Args:
        command: Name of the command.
        description: What the command does.
        kinds: Dataclasses whose fields are the options.
        arguments: Words of the command line after the command's name.
        example: Command lines for the end of the help.
        groups: Headings of the help by dataclass, for the fields that name none.

    Returns:
        One object of each dataclass, and the options that were given, by the names of their fields.

    Raises:
        UsageError: An option is unknown, missing, or has a wrong value.
        SystemExit: The help was asked for and printed.
    """
    parser = OptionParser(command, description, kinds, example, groups)
    given = parser.given(arguments)
    return parser.objects(given), given


def command(description: str, example: str = "", groups: Mapping[type, str] | None = None, quiet: bool = True):
    """Decorate the function of a command, `run_NAME`, which then takes the words of the command line.

    The types of its parameters are the dataclasses of the options, or `dict` for the options that were given.

    Args:
        description: What the command does.
        example: Command lines for the end of the help.
        groups: As in :func:`parse`.
        quiet: Whether other libraries are made quiet, which imports transformers.
    """

    def decorate(function: Callable[..., None]) -> Callable[[list[str]], None]:
        kinds = {name: kind for name, kind in get_type_hints(function).items() if name != "return"}
        options = [kind for kind in kinds.values() if kind is not dict]

        @functools.wraps(function)
        def run(arguments: list[str]) -> None:
            made, given = parse(
                function.__name__.removeprefix("run_"), description, options, arguments, example, groups
            )
            if quiet:
                quiet_transformers()
            function(*made, *([given] if len(kinds) > len(options) else []))

        return run

    return decorate


# ---- the file of --config ------------------------------------------------------------------------------


def set_environment(arguments: Sequence[str]) -> None:
    """Set the variables under `env` in the config file. Libraries read some of them when they are imported.

    Args:
        arguments: Words of the command line. Nothing is done without `--config FILE`.

    Raises:
        UsageError: See :func:`read_config`.
    """
    for word, after in zip(arguments, [*arguments[1:], None]):
        path = after if word == "--config" else word[9:] if word.startswith("--config=") else None
        if path is not None:
            for key, value in (read_config(path).get("env") or {}).items():
                os.environ[str(key)] = str(value)


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the content of a YAML file of options.

    Raises:
        UsageError: The file does not exist, is not YAML, or holds no options.
    """
    import yaml

    try:
        found = parse_yaml(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"config {path} doesn't exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config {path} can't be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"config {path} can't be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UsageError(f"config {path} must hold lines such as 'learning_rate: 2e-4', got {type(found).__name__}")
    if not isinstance(found.get("env") or {}, dict):
        raise UsageError(f"config {path}: env must hold lines such as 'NAME: value', got {found['env']!r}")
    return found


# ---- one option ----------------------------------------------------------------------------------------


_hints = cache(get_type_hints)  # of a dataclass


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name.replace('-', '_')}")))


def _parts(hint: Any) -> list[Any]:
    """The types of which a value may be one, without None."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [part for part in parts if part is not NoneType]


def _takes(hint: Any, kind: type) -> bool:
    """Whether a type takes values of `kind`."""
    return any(part is Any or (get_origin(part) or part) is kind for part in _parts(hint))


def _reading(name: str, hint: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What argparse is told of an option: how its words are read, how many there are, and the name of its value."""
    parts = _parts(hint)
    first = parts[0]
    if first is bool:
        return {"nargs": "?", "const": True, "type": _switch}
    items = next((get_args(part)[0] for part in parts if get_origin(part) is list), None)
    kind = items or first
    choices = metadata.get("choices") or next(filter(None, map(_choices, parts)), ())
    choices = [str(value) for value in choices if value is not None]
    metavar = metadata.get("metavar")
    of_resume = {"nargs": "?", "const": LATEST}
    several = of_resume if name == "resume_from_checkpoint" else {"nargs": "+", "action": "extend"} if items else {}
    if choices:
        names = f"{{{','.join(choices)}}}" if len(choices) < MANY else "NAME"
        return {"type": choice(choices), "metavar": metavar or names, **several}
    if kind in (int, float) and (items or str not in parts):
        unit = "RATIO" if name.endswith("_ratio") else {int: "N", float: "X"}[kind]
        return {"type": _number(kind, NoneType in get_args(hint)), "metavar": metavar or unit, **several}
    if items and get_origin(items) is dict:
        return {"type": lambda path: {"path": path}, "metavar": metavar or "PATH", **several}
    if any(_takes(part, dict) for part in parts):
        return {"type": _dictionary, "metavar": metavar or "JSON", **several}
    return {"type": str, "metavar": metavar or name.split("_")[-1].upper(), **several}


def _choices(part: Any) -> list[Any]:
    """The values of an enumeration or of a Literal."""
    if get_origin(part) is Literal:
        return list(get_args(part))
    return [one.value for one in part] if isinstance(part, type) and issubclass(part, enum.Enum) else []


def help_text(metadata: Mapping[str, Any], default: Any) -> str:
    """Return the help text of a field with its default in its unit. Of several sentences it is the first one.

    Args:
        metadata: The metadata of the field, see `s2ft.config.option`.
        default: The default value.
    """
    shown = metadata.get("shown")
    if shown is None and isinstance(default, (int, float, str)) and not isinstance(default, bool):
        shown = f"{f'{default:g}' if isinstance(default, float) else default} {metadata.get('unit', '')}".strip()
    text, choices = re.split(r"\. (?=[A-Z])", metadata["help"])[0], metadata.get("choices", ())
    text = text if text.endswith("...") else text.rstrip(".")
    if len(choices) >= MANY:
        text += f": one of {', '.join(choices)}"
    if shown and "(default:" not in text:
        text += f" (default: {shown})"
    return text.replace("%", "%%")


def _word_of(value: bool, action: argparse.Action) -> str:
    """The word that YAML reads as true or false: `eval_strategy: no`."""
    if value is False and "no" in (action.metavar or "").strip("{}").split(","):
        return "no"
    if value is True and action.const == LATEST:
        return LATEST
    raise ValueError(f"must not be {str(value).lower()}; put a word into quotes")


def _switch(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() in TRUE


def _number(kind: type, optional: bool) -> Callable[[str], Any]:
    what = "a whole number" if kind is int else "a number"

    def read(text: str) -> Any:
        if optional and text.lower() in ("none", "null"):
            return None
        try:  # a whole number stays one: it is shown and written so
            return int(text) if kind is int or re.fullmatch(r"[-+]?\d+", text) else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}") from None

    return read


def _dictionary(text: str) -> Any:
    """Read a dictionary in JSON. Another text is the name of a file."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a dictionary in JSON, got {text!r}: {error}") from None


def choice(choices: Sequence[str]) -> Callable[[str], str]:
    """Return a reader of one of the choices, which also takes the short name of a dtype."""

    def read(text: str) -> str:
        value = text if text in choices else SHORT.get(text, text)
        if value not in choices:
            some = choices if len(choices) <= MOST else difflib.get_close_matches(text, choices, 5, 0) + ["..."]
            raise argparse.ArgumentTypeError(
                f"must be one of {', '.join(some)}, got {text!r}{did_you_mean(text, choices)}"
            )
        return value

    return read


def new_file(name: str | None) -> Path | None:
    """Check that a file can be written, before anything is computed for it.

    Args:
        name: The option `output`, or None.

    Returns:
        The file's path, or None.

    Raises:
        FileExistsError: The file exists.
        FileNotFoundError: Its folder does not exist.
    """
    output = Path(name).expanduser() if name else None
    if output:
        check_output(output)
    return output


def quiet_transformers() -> None:
    """Turn off the progress bars and hints of other libraries, which would stand between our own lines."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
