"""Options from dataclasses: a field is an option. Nothing here imports PyTorch, so that ``--help`` is quick."""

import argparse
import difflib
import itertools
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

GROUPS = ("model and data", "selection")  # in this order in the help
MANY = 8  # so many choices of an option stand in its help text, fewer ones behind its name
MOST = 16  # so many choices are listed in an error, of more the closest ones
SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
TRUE, FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")
# Options by the names that other programs give them. They are suggested if the command has the option.
OTHER_NAMES = {
    "adapter": "adapter-path lora-path",
    "batch-size": "bs",
    "data": "dataset dataset-name",
    "dtype": "precision torch-dtype",
    "dtype bfloat16": "bf16",
    "dtype float16": "fp16",
    "limit": "max-samples",
    "lm-eval": "suite scoring length-normalized answer-form skip-missing",
    "match-lora-rank": "lora-rank r rank",
    "max-length": "cutoff-len max-seq-length",
    "max-new-tokens": "max-tokens",
    "model": "base-model model-name-or-path",
    "output": "out output-dir",
}

# Help texts that several commands share.
MODEL = "a checkpoint folder, a name on the hub, or a .gguf file"
BASE = f"the adapter's base model: {MODEL}"
ADAPTER = "an adapter: the output folder of a run, an adapter's folder, a checkpoint, or a name on the hub"
DTYPE = "dtype of the model's weights; auto: the dtype of the adapter's training, or without adapter the checkpoint's"


class UsageError(ValueError):
    """A mistake in the options of a command."""


class Collect(argparse._StoreAction):
    """Stores the value of an option. Another use of an option that takes several values adds its values to them."""

    given = False

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if self.given and isinstance(values, list):
            values = getattr(namespace, self.dest) + values
        self.given = True
        super().__call__(parser, namespace, values, option_string)


class Parser(argparse.ArgumentParser):
    """Raises UsageError with one line that names the help, where argparse prints the whole usage and exits."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for name in (None, "store"):
            self.register("action", name, Collect)

    def parse_args(self, arguments: list[str]) -> argparse.Namespace:  # type: ignore[override]
        known = list(self._option_string_actions)
        for word in itertools.takewhile(lambda word: word != "--", arguments):
            # Before argparse, which would first complain about the missing option that a wrong name stands for.
            if word.startswith("--") and " " not in word and word.partition("=")[0] not in known:
                self.error(_unknown(word, known))
        found, unknown = self.parse_known_args(arguments)
        if unknown:
            self.error(_unknown(unknown[0], known))
        return found

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"/--\w+(_\w+)+", "", message)  # the second spelling of each option
        message = re.sub(r"^argument ([^:]+): (must )?", lambda m: f"{m[1]} must " if m[2] else f"{m[1]}: ", message)
        message = message.replace("the following arguments are required:", "missing:")
        raise UsageError(f"{message} (see {self.prog} --help)")


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


def parse(
    command: str,
    description: str,
    kinds: list[type],
    arguments: list[str],
    example: str = "",
    groups: Mapping[type, str] | None = None,
) -> list:
    """Read the options of a command.

    Args:
        command: Name of the command.
        description: What the command does.
        kinds: Dataclasses whose fields are the options; see `s2ft.train.options.option` for their metadata.
        arguments: Words of the command line after the command's name.
        example: Command lines for the end of the help.
        groups: One of GROUPS by dataclass, for the fields that name none.

    Returns:
        One object of each dataclass.

    Raises:
        UsageError: An option is unknown, missing, or has a wrong value.
        SystemExit: The help was asked for and printed.
    """
    parser = _parser(command, description, kinds, example, groups or {})
    found = parser.parse_args(arguments)
    try:
        return [kind(**{one.name: getattr(found, one.name) for one in fields(kind)}) for kind in kinds]
    except ValueError as error:
        raise UsageError(f"{error} (see {parser.prog} --help)") from error


def given_options(words: Sequence[str]) -> set[str]:
    """Return the names of the options among the words of a command line, as the fields are called."""
    return {word[2:].partition("=")[0].replace("-", "_").removeprefix("no_") for word in words if word[:2] == "--"}


def _parser(command: str, description: str, kinds: list[type], example: str, groups: Mapping[type, str]) -> Parser:
    parser = Parser(
        prog=f"s2ft {command}",
        description=description,
        formatter_class=Help,
        allow_abbrev=False,
        epilog=f"example:\n{example}" if example else None,
    )
    options = [
        (one.metadata.get("group", groups.get(kind)), one, hint)
        for kind in kinds
        for one, hint in zip(fields(kind), _hints(kind))
    ]
    used = {group for group, _, _ in options}
    headings = {name: parser.add_argument_group(name) for name in GROUPS if name in used}
    for group, one, hint in options:
        _add(headings.get(group, parser), one, hint)
    required = [
        f"{action.option_strings[0]} {action.metavar}" if action.option_strings else _positional(action)
        for action in sorted(parser._actions, key=lambda action: bool(action.option_strings))
        if action.required or not action.option_strings
    ]
    parser.usage = " ".join([parser.prog, *required, "[options]"])
    return parser


def _hints(kind: type) -> list[Any]:
    hints = get_type_hints(kind)
    return [hints[one.name] for one in fields(kind)]


def _positional(action: argparse.Action) -> str:
    return f"[{action.metavar}]" if action.nargs == "?" else f"{action.metavar}{' ...' * (action.nargs == '+')}"


def _add(group: Any, one: Field, hint: Any) -> None:
    """Add the option of a field, as --d-ratio and as --d_ratio."""
    default = one.default if one.default_factory is MISSING else one.default_factory()
    kind, several = _kind(hint)
    names = _spellings(one.name)
    if kind is bool:
        shown = argparse.SUPPRESS if default else help_text(one.metadata, default)
        group.add_argument(*names, nargs="?", const=True, default=default, type=_switch, help=shown)
        if default:
            shown = help_text(one.metadata, None, "off")
            group.add_argument(*_spellings(f"no_{one.name}"), dest=one.name, action="store_false", help=shown)
        return
    choices = [name for name in one.metadata.get("choices", ()) if name is not None]
    read = choice(choices) if choices else {int: _whole, float: _number, str: str}[kind]
    settings = {
        "nargs": "+" if several else None,
        "default": None if default is MISSING else default,
        "type": read,
        "metavar": one.metadata.get("metavar") or _metavar(one.name, kind, choices),
        "help": help_text(one.metadata, default),
    }
    if not one.metadata.get("positional"):
        group.add_argument(*names, required=default is MISSING, **settings)
    elif default is MISSING:
        group.add_argument(one.name, **settings)
    else:
        group.add_argument(one.name, **{**settings, "nargs": "?"})


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}")))


def _kind(hint: Any) -> tuple[type, bool]:
    """Return bool, int, float or str, and whether the option takes several values. Text serves for all else."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [kind for kind in parts if kind is not type(None)]
    if str in kinds or len(kinds) > 1:
        return str, False
    several = get_origin(kinds[0]) is list
    return (get_args(kinds[0])[0] if several else kinds[0]), several


def _metavar(name: str, kind: type, choices: list[str]) -> str:
    if choices:
        return f"{{{','.join(choices)}}}" if len(choices) < MANY else "NAME"
    if kind is str:
        return name.upper()
    return "RATIO" if name.endswith("_ratio") else {int: "N", float: "X"}[kind]


def help_text(metadata: Mapping[str, Any], default: Any, key: str = "help") -> str:
    """Return the help text of a field with its default in its unit.

    Args:
        metadata: The metadata of the field, see `s2ft.train.options.option`.
        default: The default value.
        key: "help", or "off" for the text of ``--no-...``.
    """
    shown = metadata.get("shown")
    if shown is None and isinstance(default, (int, float, str)) and not isinstance(default, bool):
        shown = f"{f'{default:g}' if isinstance(default, float) else default} {metadata.get('unit', '')}".strip()
    text, choices = metadata.get(key, ""), metadata.get("choices", ())
    if len(choices) >= MANY:
        text += f": one of {', '.join(choices)}"
    if shown and key == "help":
        text += f" (default: {shown})"
    return text.replace("%", "%%")


def _switch(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() in TRUE


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


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


def did_you_mean(word: str, names: Sequence[str], others: Mapping[str, str] | None = None, prefix: str = "") -> str:
    """Return "; did you mean ...?" with the closest name, or "" if none is close.

    Args:
        word: The unknown word.
        names: The known words.
        others: Other names of known words, separated by blanks, by the known word. More text may follow that word.
        prefix: Text before the name in the answer.
    """
    own = [name for name, elsewhere in (others or {}).items() if word in elsewhere.split() and name.split()[0] in names]
    begun = [name for name in names if len(word) > 2 and name.startswith(word)]
    close = own or begun[:1] or difflib.get_close_matches(word, names, 1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _unknown(word: str, names: list[str]) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}"
    option = word.partition("=")[0]
    known = [name[2:] for name in names if name.startswith("--") and "_" not in name and name != "--help"]
    spelled = option.lstrip("-").replace("_", "-")
    return f"there is no option {option}{did_you_mean(spelled, known, OTHER_NAMES, '--')}"


def quiet_transformers() -> None:
    """Turn off the progress bars and hints of other libraries, which would stand between our own lines."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
