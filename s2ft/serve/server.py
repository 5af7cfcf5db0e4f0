"""Run a server until it gets a signal."""

import logging
import resource
import signal
import socket
from collections.abc import Sequence
from functools import partial

import torch
import uvicorn
from fastapi import FastAPI
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from uvicorn.protocols.http.h11_impl import H11Protocol

from s2ft.attached.bank import AdapterBank
from s2ft.attached.loading import read_adapter
from s2ft.serve.access import Metrics
from s2ft.serve.answer import Service
from s2ft.serve.app import create_app
from s2ft.serve.engine import Engine
from s2ft.serve.served_adapters import Adapters
from s2ft.serve.server_options import ServerOptions, warn_if_open

logger = logging.getLogger(__name__)
KEEP_ALIVE = 75  # seconds; longer than clients and proxies keep idle connections, which then never meet a closed one
SHUTDOWN = 10  # seconds to finish running requests after SIGTERM or SIGINT
HEADER_TIME = 10  # seconds
MOST_CONNECTIONS = 2048


def build_app(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    adapters: str | Sequence[str] | None,
    options: ServerOptions,
) -> tuple[FastAPI, Service]:
    """Make the ASGI app of a server, to run it in a server of your own.

    Args:
        model: A causal language model of transformers without adapters, on its device.
        tokenizer: The model's tokenizer.
        base: The name that clients use for the base.
        adapters: One or several directories of adapters or of runs, adapters, or outputs of runs, also as NAME=DIR.
            None serves the base alone.
        options: The options of the server. `host` and `port` are not used.

    Returns:
        The app and its service.

    Raises:
        NotADirectoryError: A directory does not exist.
        ValueError: Two models have the same name, or an adapter that was named by itself, or all that were found,
            can't be served.

    Example:
        >>> from s2ft.serve.server_options import ServerOptions
        >>> from s2ft.serve.server import build_app
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"hello": 0, "world": 1, "?": 2}, "?"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
        >>> app, service = build_app(model, tokenizer, "base", None, ServerOptions())
        >>> service.engine.stop()
    """
    metrics = Metrics()
    known = adapters_of(model, base, adapters, options.adapter_bytes)
    known.log_adapters()
    engine = Engine(model, known, options.max_batch_size, options.queue_size, options.max_batch_tokens, metrics=metrics)
    service = Service(engine, tokenizer, base, options)
    service.log_templates()
    return create_app(service, metrics, options.access_log), service


def adapters_of(
    model: PreTrainedModel, base: str, adapters: str | Sequence[str] | None, limit_bytes: int | None = None
) -> Adapters:
    """Return the adapters of a server, see :func:`build_app`. `limit_bytes` limits those in memory."""
    sources = [] if adapters is None else [adapters] if isinstance(adapters, str) else list(adapters)
    return Adapters(AdapterBank(model, limit_bytes=limit_bytes), sources, reserved=[base])


def check_adapters(model: PreTrainedModel, base: str, adapters: str | Sequence[str] | None) -> None:
    """Read every adapter of a server completely, and compare it with the base. One is in memory at a time.

    Args:
        model: The base.
        base: The name that clients use for the base.
        adapters: As in :func:`build_app`.

    Raises:
        NotADirectoryError: A directory does not exist.
        ValueError: Two models have the same name, or adapters can't be served. The log has the reasons.
    """
    known = adapters_of(model, base, adapters, limit_bytes=1)
    for name in known.names:
        served = known.acquire(name)
        try:
            read_adapter(served.folder)
        except (ValueError, OSError) as error:
            known.refuse(served, error)
        finally:
            known.release(served)
    known.log_adapters(strictly=True)


def serve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    adapters: str | Sequence[str] | None,
    options: ServerOptions,
) -> None:
    """Serve a model and its adapters until SIGTERM or SIGINT. Then finish what runs within 10 seconds, and return.

    The model is moved to the GPU if there is one, unless it is quantized.

    Args:
        model: A causal language model of transformers without adapters.
        tokenizer: The model's tokenizer.
        base: The name that clients use for the base.
        adapters: As in :func:`build_app`.
        options: The options of the server.

    Raises:
        OSError: The server cannot listen on the address.
        NotADirectoryError: A directory does not exist.
        ValueError: Adapters can't be served, see :func:`build_app`, or an option is out of range.

    Example:
        Here a timer sends the signal; a server in use gets it from the system.

        >>> import os, signal, threading
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> from s2ft.serve.server_options import ServerOptions
        >>> from s2ft.serve.server import serve
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, "?")))
        >>> threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        >>> serve(model, tokenizer, "base", None, ServerOptions(port=0))
        >>> signal.getsignal(signal.SIGINT) is signal.default_int_handler  # Ctrl-C interrupts again
        True
    """
    model.requires_grad_(False)
    if not getattr(model, "is_quantized", False):  # a quantized one is on its device, and may refuse to move
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    app, _ = build_app(model, tokenizer, base, adapters, options)
    warn_if_open(options.host, options.api_key)
    listener = listen(options.host, options.port)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its lines about start and end are said below
    server = Server(config_of(app))
    # uvicorn raises the signal again after the shutdown, when nothing is left to do
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address. Raises OSError if that is not possible."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(f"can't listen on {host}, port {port}: {error.strerror}") from None


def config_of(app: FastAPI) -> uvicorn.Config:
    """Return uvicorn's options. Half of the process's file descriptors are for connections."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptors == resource.RLIM_INFINITY:
        descriptors = 4 * MOST_CONNECTIONS
    return uvicorn.Config(
        app,
        http=partial(Connection, most=min(descriptors // 2, MOST_CONNECTIONS)),
        backlog=min(descriptors // 4, MOST_CONNECTIONS),  # asyncio accepts so many before the first of them is counted
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=SHUTDOWN,
    )


class Connection(H11Protocol):
    """A connection of uvicorn, with a time limit for the header of a request, and a limit of their number."""

    def __init__(self, *args, most: int, **options) -> None:
        super().__init__(*args, **options)
        self._most, self._header_timer = most, None

    def connection_made(self, transport) -> None:
        """Close the connection if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._most:
            transport.abort()
        self._limit_header()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._limit_header()

    def _limit_header(self) -> None:
        """Start the time for a header if one is awaited, and end it if the header is complete."""
        if self.cycle is None or self.cycle.response_complete:
            self._header_timer = self._header_timer or self.loop.call_later(HEADER_TIME, self.transport.abort)
        elif self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


class Server(uvicorn.Server):
    """A server of uvicorn that logs its address."""

    async def startup(self, sockets=None) -> None:
        """Start, and log the address."""
        await super().startup(sockets)
        if self.started:
            for listener in self.servers:
                for one in listener.sockets:
                    host, port = one.getsockname()[:2]  # the port that was chosen if the option is 0
                    logger.info("serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)
