"""Plain text: tables, YAML, names, files replaced in one step. Nothing here imports PyTorch."""

import hashlib
import os
import re
import secrets
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any


def table(lines: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """Return lines of cells as text with aligned columns.

    Args:
        lines: The lines, of one length; the first one may be the headings.
        right: Columns that are aligned at their right side, counted from 0. All others are aligned at their left side.

    Example:
        >>> from s2ft.files.plain_text import table
        >>> print(table([("layer", "units"), ("q_proj", "7")], right={1}))
        layer   units
        q_proj      7
    """
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def parse_yaml(text: str) -> Any:
    """Parse YAML by PyYAML's safe loader, which then also reads 1e-6 as a number, and refuses a key that stands twice.

    Args:
        text: The text of a file, or of a value.

    Raises:
        yaml.YAMLError: The text is not YAML, or a key stands twice.

    Example:
        >>> from s2ft.files.plain_text import parse_yaml
        >>> parse_yaml("learning_rate: 1e-3")
        {'learning_rate': 0.001}
    """
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
    return yaml.load(text, Loader)


# ---- names ----------------------------------------------------------------------------------------------------------

MAX_NAME = 500  # characters


def shortened(value: Any) -> str:
    """The value in quotes, at most about 100 characters long and without control characters for a terminal."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


# ---- replacing files ------------------------------------------------------------------------------------------------

WRITERS = ("PytorchStreamWriter failed", "unexpected pos", "I/O error")  # in messages of torch and safetensors


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file in one step: the content is written to a temporary file, which is renamed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_output(output: Path) -> None:
    """Check that an output can be made, before anything is computed for it.

    Raises:
        FileExistsError: It exists.
        FileNotFoundError: Its folder does not exist.
    """
    if output.exists():
        raise FileExistsError(f"output {output} exists: choose another")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"output {output} is in a folder that doesn't exist")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def reason_not_written(error: Exception) -> str | None:
    """Return the system's message if `error` is a file that could not be read or written, else None."""
    if isinstance(error, OSError):
        return str(error)
    text = first_line(error)
    return f"a file could not be written ({text})" if any(word in text for word in WRITERS) else None


def sha256_of(*paths: Path) -> str:
    """The SHA-256 of a file's content, or of several files' one after the other, in hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()
