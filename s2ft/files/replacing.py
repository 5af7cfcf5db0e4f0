"""Writing files in one step, so that no reader ever sees half of a file."""

import os
import tempfile
from pathlib import Path

WRITERS = ("PytorchStreamWriter failed", "unexpected pos", "I/O error")  # in messages of torch and safetensors


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file in one step: the content is written to a temporary file, which is renamed."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def reason_not_written(error: Exception) -> str | None:
    """Return the system's message if `error` is a file that could not be read or written, else None."""
    if isinstance(error, OSError):
        return str(error)
    text = str(error).strip().split("\n")[0]
    return f"a file could not be written ({text})" if any(word in text for word in WRITERS) else None
