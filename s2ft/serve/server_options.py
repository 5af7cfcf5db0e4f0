"""The options of a server. This module imports none of the packages that serving needs."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from s2ft.config import check_fields, option, refuse

logger = logging.getLogger(__name__)
KEY = "S2FT_API_KEY"  # other users of the machine can read a command line, but not this variable
SERVER = {"group": "server"}  # heading of the help


@dataclass(frozen=True)
class ServerOptions:
    """Options of a server. The help text of each field describes it, see `s2ft serve --help`.

    Raises:
        ValueError: A value is out of range. The message names the field.

    Example:
        >>> from s2ft.serve.server_options import ServerOptions
        >>> ServerOptions(port=0, api_key="secret", max_tokens_limit=512).timeout
        300.0
    """

    host: str = option("127.0.0.1", "address to listen on; the default is reached from this machine only", **SERVER)
    port: int = option(8000, "port to listen on; 0 takes a free one", **SERVER)
    api_key: str | None = option(
        None,
        "key that clients must send for all paths under /v1 (/health and /metrics are open)",
        shown="the variable S2FT_API_KEY, if it is set",
        metavar="KEY",
        **SERVER,
    )
    max_batch_size: int = option(16, "answers that are generated at once", unit="answers", least=1, **SERVER)
    max_batch_tokens: int | None = option(
        None,
        "tokens of all prompts and answers in the batch, which limits the memory of keys and values",
        shown="no limit",
        least=1,
        **SERVER,
    )
    queue_size: int = option(
        256, "requests that may wait; more are refused with status 429", unit="requests", least=1, **SERVER
    )
    timeout: float = option(
        300.0, "longest time of a request, waiting included", unit="seconds", metavar="SECONDS", **SERVER
    )
    max_tokens_limit: int | None = option(
        None, "longest answer in tokens", shown="the rest of the context", least=1, **SERVER
    )
    max_body_bytes: int = option(
        2 << 20, "largest request in bytes", shown="2097152, which is 2 MiB", least=1, **SERVER
    )
    adapter_bytes: int | None = option(
        None,
        "memory for adapters in bytes; the least recently used ones are removed",
        shown="no limit",
        least=1,
        **SERVER,
    )
    access_log: str = option(
        "text", "one line a request in the log, as text or as JSON, or off", choices=("text", "json", "off"), **SERVER
    )
    ignore_unsupported: bool = option(
        False,
        "ignore fields of requests that the server does not support, such as tools; the header X-Ignored-Parameters "
        "of the answer names them",
        **SERVER,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        refuse(
            (not 0 <= self.port < 1 << 16, f"port must be 0 to 65535, got {self.port}"),
            (not self.timeout > 0, f"timeout must be above 0, got {self.timeout}"),
        )


def warn_if_open(host: str, key: str | None) -> None:
    """Log a warning if other machines can reach the server and it has no key."""
    if key is None and host not in ("localhost", "127.0.0.1", "::1"):
        logger.warning(
            "warning: %s can be reached from other machines and there is no --api-key: anyone may use this "
            "server, and load and unload its adapters",
            host,
        )


def key_of(option: str | None) -> str | None:
    """Return the key of an option, or that of the environment variable S2FT_API_KEY if the option is None.

    Args:
        option: The value of the option.

    Raises:
        ValueError: The key cannot be sent in an HTTP header.
    """
    key = option if option is not None else os.environ.get(KEY) or None
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise ValueError("the API key must be printable ASCII without spaces")
    return key


def served_name(model: str) -> str:
    """Return the name of the base for clients: its name on the hub, or the last part of its path.

    Args:
        model: A name on the hub, a folder, or a .gguf file.

    Example:
        >>> s2ft.serve.server_options.served_name("models/SmolLM2.gguf")
        'SmolLM2'
    """
    path = Path(model).expanduser()
    return path.resolve().stem if model.endswith(".gguf") else path.resolve().name if path.exists() else model
