"""Run a server until it gets a signal."""

import asyncio
import hmac
import json
import logging
import resource
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from urllib.parse import quote

import torch
import uvicorn
from anyio import fail_after
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic.json_schema import models_json_schema
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from uvicorn.protocols.http.h11_impl import H11Protocol

import s2ft
from s2ft.attached.bank import AdapterBank
from s2ft.attached.loading import read_adapter
from s2ft.files.reading import no_constant
from s2ft.serve import schemas
from s2ft.serve.access import RECORD, Access, Metrics
from s2ft.serve.answer import DONE, Answer, Service, server_sent_event
from s2ft.serve.engine import Engine, Event
from s2ft.serve.schemas import ApiError, ChatRequest, CompletionRequest, LoadRequest, Sampled, UnloadRequest, parse
from s2ft.serve.served_adapters import Adapters
from s2ft.serve.server_options import ServerOptions, warn_if_open
from s2ft.text.encoding import UNLIMITED

logger = logging.getLogger(__name__)
KEEP_ALIVE = 75  # seconds; longer than clients and proxies keep idle connections, which then never meet a closed one
SHUTDOWN = 10  # seconds to finish running requests after SIGTERM or SIGINT
HEADER_TIME = 10  # seconds in which the header of a request must have arrived; --timeout is for the body
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
        model: A causal language model of transformers without adapters, on its device and in evaluation mode.
        tokenizer: The model's tokenizer.
        base: The name that clients use for the base.
        adapters: One or several directories of adapters or of runs, adapters, or outputs of runs, also as NAME=DIR.
            None serves the base alone.
        options: The options of the server. `host` and `port` are not used.

    Returns:
        The app, which starts the engine of its service and stops it, and the service.

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

    @asynccontextmanager
    async def engine_runs(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.stop)

    metrics.queue_length.set_function(lambda: engine.waiting)
    metrics.running.set_function(lambda: engine.running)
    metrics.adapters.set_function(lambda: len(known.names))
    metrics.refused.set_function(lambda: len(known.refused))
    app = FastAPI(
        title="s2ft",
        version=s2ft.__version__,
        lifespan=engine_runs,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.openapi = partial(describe, app)  # type: ignore[method-assign]
    schemas.install_handlers(app)
    app.add_middleware(Access, metrics=metrics, log=options.access_log)
    add_state_routes(app, service, metrics)
    app.include_router(model_routes(service))
    return app, service


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
    host, port = listener.getsockname()[:2]  # the port that was chosen if the option is 0
    logger.info("serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its lines about start and end
    # uvicorn raises the signal again after the shutdown, when nothing is left to do
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        uvicorn.Server(config_of(app)).run(sockets=[listener])
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
    """Return uvicorn's options. Half of the process's file descriptors are for connections.

    A server without descriptors accepts nobody, and asyncio logs that thousands of times a second.
    """
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
    """A connection of uvicorn, with a time limit for the header of a request, and a limit of their number.

    uvicorn has neither: its `limit_concurrency` refuses complete requests only, and `timeout_keep_alive` begins after
    the first answer. Clients that never complete a header, and need no key for that, would keep all others out.
    """

    def __init__(self, *args, most: int, **options) -> None:
        super().__init__(*args, **options)
        self._most = most
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        """Begin the time for the first header, or close the connection if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._most:
            transport.abort()
            return
        self._limit_header()

    def connection_lost(self, exc) -> None:
        """End the time for a header."""
        super().connection_lost(exc)
        self._end_timer()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        self._limit_header()

    def _limit_header(self) -> None:
        """Begin the time for a header if one is awaited, and end it if the header is complete."""
        awaits_header = self.cycle is None or self.cycle.response_complete
        if not awaits_header:
            self._end_timer()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_TIME, self.transport.abort)

    def _end_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


# ---- the routes ----------------------------------------------------------------------------------------

PLACE = "#/components/schemas/"
BODIES = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/load_lora_adapter": LoadRequest,
    "/v1/unload_lora_adapter": UnloadRequest,
}


def describe(app: FastAPI) -> dict:
    """Return the description of an app in the format of OpenAPI.

    Routes read and check their bodies without FastAPI, which therefore does not know them: they are added here.

    Args:
        app: The app.
    """
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, schemas = models_json_schema([(kind, "validation") for kind in BODIES.values()], ref_template=PLACE + "{model}")
    found.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    for path, kind in BODIES.items():
        content = {"application/json": {"schema": {"$ref": PLACE + kind.__name__}}}
        found["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    return found


def add_state_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """Add the routes for monitoring, which need no API key."""

    @app.get("/health")
    async def health() -> Response:
        """GET /health: whether the server runs, and how many requests run and wait."""
        if not service.engine.alive:
            raise ApiError(503, "not_running", "the server is shutting down")
        return JSONResponse({"status": "ok", "running": service.engine.running, "waiting": service.engine.waiting})

    @app.get("/metrics")
    def counters() -> Response:
        """GET /metrics: the counters for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def model_routes(service: Service) -> APIRouter:
    """Routes under /v1, which need the API key if the server has one."""

    async def check_key(request: Request) -> None:
        key, header = service.options.api_key, request.headers.get("authorization", "")
        if key is not None and not hmac.compare_digest(header.encode(), f"Bearer {key}".encode()):
            words = "send the server's key in the header Authorization: Bearer KEY"
            raise ApiError(401, "invalid_api_key", words, {"WWW-Authenticate": "Bearer"})

    router = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])

    @router.get("/models")
    def models() -> Response:
        """GET /v1/models: the base and its adapters."""
        names = [service.base, *service.engine.adapters.names]
        return JSONResponse({"object": "list", "data": [_model(service, name) for name in names]})

    @router.get("/models/{name:path}")
    def model(name: str) -> Response:
        """GET /v1/models/NAME: one model."""
        if name != service.base and name not in service.engine.adapters.names:
            raise schemas.unknown_model(name)
        return JSONResponse(_model(service, name))

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        """POST /v1/completions: continue a text."""
        return await _answer(service, request, CompletionRequest)

    @router.post("/chat/completions")
    async def chat(request: Request) -> Response:
        """POST /v1/chat/completions: answer a chat."""
        return await _answer(service, request, ChatRequest)

    @router.post("/load_lora_adapter")
    async def load(request: Request) -> Response:
        """POST /v1/load_lora_adapter: serve an adapter of the directory under a name."""
        body = parse(LoadRequest, await _json(request, service))
        await run_in_threadpool(service.engine.adapters.load, body.lora_name, body.lora_path)
        return JSONResponse({"status": "ok", "model": body.lora_name})

    @router.post("/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        """POST /v1/unload_lora_adapter: stop serving an adapter."""
        body = parse(UnloadRequest, await _json(request, service))
        await run_in_threadpool(service.engine.adapters.unload, body.lora_name)
        return JSONResponse({"status": "ok", "model": body.lora_name})

    return router


def _model(service: Service, name: str) -> dict:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "s2ft",
        "root": service.base,
        "parent": None if name == service.base else service.base,
        "max_model_len": None if service.context == UNLIMITED else service.context,
    }


async def _json(request: Request, service: Service):
    """Read and decode the body. Raises ApiError 400, 408 or 413."""
    limit, body = service.options.max_body_bytes, bytearray()
    try:
        with fail_after(service.options.timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    words = f"the body has more than {limit:,} bytes"
                    raise ApiError(413, "body_too_large", words, {"Connection": "close"})
        return json.loads(body, parse_constant=no_constant)
    except TimeoutError:
        raise ApiError(408, "timeout", "the body did not arrive in time", {"Connection": "close"}) from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {str(error)[:200]}") from None


async def _answer(service: Service, request: Request, kind: type[Sampled]) -> Response:
    arrived, record = asyncio.get_running_loop().time(), request.scope[RECORD]
    ignored: list[str] | None = [] if service.options.ignore_unsupported else None
    body = parse(kind, await _json(request, service), ignored)
    answer = record.answer = Answer(service, body, request, record, arrived)
    job = await run_in_threadpool(service.job, body, answer.emit)
    record.model = body.model  # it is served, so that the metrics have the names of models only
    service.engine.submit(job)
    answer.job = job
    events = answer.events()
    first = await anext(events)  # an error before the first token has its own status
    service.engine.metrics.first_token.observe(asyncio.get_running_loop().time() - arrived)
    names = [quote(name, safe="", errors="replace")[:100] for name in (ignored or [])[:20]]  # clients can make them up
    headers = {"X-Ignored-Parameters": ", ".join(names)} if names else {}
    if body.stream:
        headers["Cache-Control"] = "no-cache"
        return StreamingResponse(_stream(answer, first, events), headers=headers, media_type="text/event-stream")
    found = [first, *[event async for event in events]]
    return JSONResponse(answer.whole("".join(event.text for event in found), found[-1].finish), headers=headers)


async def _stream(answer: Answer, first: Event, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    try:
        yield answer.opening() + answer.chunk(first)
        async for event in events:
            yield answer.chunk(event)
        yield answer.closing()
    except ApiError as error:  # the status was sent already
        answer.record.status = error.status
        yield server_sent_event(error.body(answer.record.id))
    except ClientDisconnect:
        return
    yield DONE
