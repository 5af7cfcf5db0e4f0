"""The routes of the HTTP API."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from urllib.parse import quote

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic.json_schema import models_json_schema
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

import s2ft
from s2ft.files.reading import no_constant
from s2ft.serve import schemas
from s2ft.serve.access import RECORD, Access, Metrics
from s2ft.serve.answer import DONE, Answer, Reply, Service, server_sent_event
from s2ft.serve.engine import Event
from s2ft.serve.schemas import (
    CLIENT_CLOSED,
    ApiError,
    ChatRequest,
    CompletionRequest,
    Disconnected,
    LoadRequest,
    Sampled,
    UnloadRequest,
    parse,
)

PLACE = "#/components/schemas/"
BODIES = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/load_lora_adapter": LoadRequest,
    "/v1/unload_lora_adapter": UnloadRequest,
}


def create_app(service: Service, metrics: Metrics, access_log: str = "text") -> FastAPI:
    """Make the ASGI app. It starts the service's engine and stops it.

    Args:
        service: The model with its adapters.
        metrics: The counters that /metrics returns.
        access_log: "text" or "json" for one line a request in the log, or "off".
    """

    @asynccontextmanager
    async def engine_runs(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await run_in_threadpool(service.engine.stop)

    metrics.queue_length.set_function(lambda: service.engine.waiting)
    metrics.running.set_function(lambda: service.engine.running)
    metrics.adapters.set_function(lambda: len(service.engine.adapters.names))
    metrics.refused.set_function(lambda: len(service.engine.adapters.refused))
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
    app.add_middleware(Access, metrics=metrics, log=access_log)
    app.include_router(state_routes(service, metrics))
    app.include_router(model_routes(service))
    return app


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


def state_routes(service: Service, metrics: Metrics) -> APIRouter:
    """Routes for monitoring, which need no API key."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """GET /health: whether the server runs, and how many requests run and wait."""
        if not service.engine.alive:
            raise ApiError(503, "not_running", "the server is shutting down")
        return JSONResponse({"status": "ok", "running": service.engine.running, "waiting": service.engine.waiting})

    @router.get("/metrics")
    def counters() -> Response:
        """GET /metrics: the counters for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


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
    parent = None if name == service.base else service.base
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "s2ft",
        "root": service.base,
        "parent": parent,
        "max_model_len": service.context,
    }


async def _json(request: Request, service: Service):
    """Read and decode the body. Raises ApiError 400, 408 or 413."""
    limit, chunks, size = service.options.max_body_bytes, [], 0
    too_large = ApiError(413, "body_too_large", f"the body has more than {limit:,} bytes", {"Connection": "close"})
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > limit:  # before reading any of it
        raise too_large

    async def read() -> None:
        nonlocal size
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise too_large
            chunks.append(chunk)

    try:
        await asyncio.wait_for(read(), service.options.timeout)
    except asyncio.TimeoutError:
        raise ApiError(408, "timeout", "the body did not arrive in time", {"Connection": "close"}) from None
    try:
        return json.loads(b"".join(chunks), parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {str(error)[:200]}") from None


async def _answer(service: Service, request: Request, kind: type[Sampled]) -> Response:
    arrived, record = asyncio.get_running_loop().time(), request.scope[RECORD]
    ignored: list[str] | None = [] if service.options.ignore_unsupported else None
    try:
        body = parse(kind, await _json(request, service), ignored)
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED)
    answer = Answer(service, request, record, arrived)
    try:
        job = await run_in_threadpool(service.job, body, answer.emit)
        record.model = body.model  # it is served, so that the metrics have a bounded number of names
        answer.start(job)
        events, reply = answer.events(), Reply(body)
        first = await anext(events)  # an error before the first token has its own status
        names = [
            quote(name, safe="", errors="replace")[:100] for name in (ignored or [])[:20]
        ]  # clients can make them up
        headers = {"X-Ignored-Parameters": ", ".join(names)} if names else {}
        if body.stream:
            return EventStream(_stream(answer, reply, first, events), answer, headers)
        found = [first, *[event async for event in events]]
        answer.close()
        text = "".join(event.text for event in found)
        return JSONResponse(reply.whole(text, found[-1].finish, answer.usage), headers=headers)
    except Disconnected:
        answer.close()
        return Response(status_code=CLIENT_CLOSED)
    except BaseException:
        answer.close()
        raise


async def _stream(answer: Answer, reply: Reply, first: Event, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    try:
        for chunk in [*reply.opening(), *reply.chunk(first)]:
            yield server_sent_event(chunk)
        async for event in events:
            for chunk in reply.chunk(event):
                yield server_sent_event(chunk)
        for chunk in reply.closing(answer.usage):
            yield server_sent_event(chunk)
    except ApiError as error:  # the status was sent already
        answer.record.status = error.status
        yield server_sent_event(error.body(answer.record.id))
    except Disconnected:
        return
    yield DONE


class EventStream(StreamingResponse):
    """Server-sent events of an answer. The answer is closed at the end, also after an error."""

    def __init__(self, content: AsyncIterator[str], answer: Answer, headers: dict[str, str]) -> None:
        super().__init__(content, headers={"Cache-Control": "no-cache", **headers}, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._answer.ended:
                self._answer.record.status = CLIENT_CLOSED
            self._answer.close()
