"""The options of a server. This module imports none of the packages that serving needs."""

import ipaddress
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)
KEY = "S2FT_API_KEY"  # other users of the machine can read a command line, but not this variable


@dataclass(frozen=True)
class Limits:
    """Limits of requests.

    Attributes:
        api_key: The key that clients must send. None accepts all requests.
        timeout: Seconds from the arrival of a request to the end of its answer.
        max_body_bytes: Largest body of a request in bytes.
        max_tokens: Longest answer in tokens. None is the rest of the context.
        ignore_unsupported: Whether fields that the server does not support are ignored. The header
            X-Ignored-Parameters of the answer names them. Otherwise they are an error.

    Raises:
        ValueError: A value is not above 0.

    Example:
        >>> from s2ft.serve.options import Limits
        >>> Limits(timeout=60, max_tokens=256)
        Limits(api_key=None, timeout=60, max_body_bytes=2097152, max_tokens=256, ignore_unsupported=False)
    """

    api_key: str | None = None
    timeout: float = 300.0
    max_body_bytes: int = 2 << 20
    max_tokens: int | None = None
    ignore_unsupported: bool = False

    def __post_init__(self) -> None:
        for name in ("timeout", "max_body_bytes", "max_tokens"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name.replace('_', '-')} must be above 0, got {value}")


@dataclass(frozen=True)
class ServerOptions:
    """Options of a server.

    Attributes:
        host: Address to listen on.
        port: Port to listen on. 0 chooses a free one.
        max_batch_size: Number of answers that are generated together.
        queue_size: Number of requests that can wait. Further requests get status 429.
        max_batch_tokens: Largest number of tokens of prompts and answers in the batch. It bounds the memory of keys
            and values. None is no limit.
        adapter_bytes: Memory for adapters in bytes. The adapters that were used longest ago are removed. None is no
            limit.
        access_log: "text" or "json" for one line a request in the log, or "off".
        limits: Limits of requests.

    Example:
        >>> from s2ft.serve.options import Limits, ServerOptions
        >>> ServerOptions(port=0, limits=Limits(api_key="secret", max_tokens=512)).limits.timeout
        300.0
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch_size: int = 16
    queue_size: int = 256
    max_batch_tokens: int | None = None
    adapter_bytes: int | None = None
    access_log: str = "text"
    limits: Limits = field(default_factory=Limits)


def warn_if_open(host: str, key: str | None) -> None:
    """Log a warning if other machines can reach the server and it has no key."""
    try:
        is_open = host != "localhost" and not ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_open = True
    if key is None and is_open:
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
        >>> s2ft.serve.options.served_name("models/SmolLM2.gguf")
        'SmolLM2'
    """
    path = Path(model).expanduser()
    return path.resolve().stem if model.endswith(".gguf") else path.resolve().name if path.exists() else model
