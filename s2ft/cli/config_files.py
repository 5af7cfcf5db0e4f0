"""The YAML files that --config names. This module imports no PyTorch."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2ft.files.yaml_reading import parse_yaml


class UsageError(ValueError):
    """A mistake in the options of a command."""


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
