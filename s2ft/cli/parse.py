"""Options from dataclasses: a new field is a new option, as --d-ratio and as --d_ratio."""

import argparse


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says a default only where there is one."""

    def _get_help_string(self, action):
        says_default = action.default is not None and not _is_negation(action)
        return super()._get_help_string(action) if says_default else action.help


def _is_negation(action: argparse.Action) -> bool:
    """Whether this is the --no-… that transformers adds to a switch that is on by default."""
    return any(option.startswith("--no_") for option in action.option_strings) and action.const is False


def parse(command: str, description: str, kinds: list[type], arguments: list[str]) -> list:
    """One object of every dataclass in `kinds`. Exits with 2 on a usage error, with 0 after --help."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        kinds, prog=f"s2ft {command}", description=description, formatter_class=Help, allow_abbrev=False
    )
    for action in parser._actions:
        if _is_negation(action):  # else it has the help text of the switch that it turns off
            action.help = f"turn --{action.dest.replace('_', '-')} off"
        action.option_strings.sort(key=lambda option: "_" in option)  # help shows the dashed form first
    return list(parser.parse_args_into_dataclasses(arguments))


def quiet_transformers() -> None:
    """Its progress bars and hints would stand between our own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
