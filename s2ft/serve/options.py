"""What a server is started with; needs none of the packages that serving needs."""

import ipaddress
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)
KEY = "S2FT_API_KEY"  # where other users of the machine don't read it, as they do a command line


@dataclass(frozen=True)
class Limits:
    """What the server allows. `api_key` None lets everyone in."""

    api_key: str | None = None
    timeout: float = 300.0  # seconds from a request's arrival to its answer's end
    max_body_bytes: int = 2 << 20
    max_tokens: int | None = None  # of an answer; None: what the context leaves

    def __post_init__(self) -> None:
        for name in ("timeout", "max_body_bytes", "max_tokens"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name.replace('_', '-')} must be above 0, got {value}")


@dataclass(frozen=True)
class ServerOptions:
    """Where to listen, and how much at once."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch_size: int = 16
    queue_size: int = 256
    max_batch_tokens: int | None = None
    adapter_bytes: int | None = None
    grace: float = 20.0
    limits: Limits = field(default_factory=Limits)


def warn_if_open(host: str, key: str | None) -> None:
    if key is None and not is_loopback(host):
        logger.warning(
            "warning: %s can be reached from other machines and there is no --api-key: anyone may use this "
            "server, and load and unload its adapters",
            host,
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def key_of(given: str | None) -> str | None:
    """The key by option or by environment. Raises: ValueError for one that no header can carry."""
    key = given if given is not None else os.environ.get(KEY) or None
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise ValueError("the API key must be printable ASCII without spaces")
    return key


def served_name(model: str) -> str:
    """What clients call the base: a name on the hub, or the last part of a path."""
    return (
        Path(model).expanduser().resolve().stem
        if model.endswith(".gguf")
        else Path(model).expanduser().resolve().name
        if Path(model).expanduser().exists()
        else model
    )
