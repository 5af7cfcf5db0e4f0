"""The YAML files that --config names. This module imports no PyTorch."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2ft.cli.parse import UsageError


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
        found = yaml.load(Path(path).expanduser().read_text(encoding="utf-8"), _loader())
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


def _loader() -> type:
    """PyYAML's safe loader, which also reads 1e-6 as a number, and refuses a key that stands twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = [key for place, key in enumerate(keys) if key in keys[:place]]
            if twice:
                raise yaml.YAMLError(f"{twice[0]} stands twice, on line {node.start_mark.line + 1} or below")
            return super().construct_mapping(node, deep)

    number = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, [*"-+0123456789"])
    return Loader
