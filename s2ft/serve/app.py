"""The routes of the HTTP API."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from urllib.parse import quote

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

import s2ft
from s2ft.serve import errors
from s2ft.serve.access import Access
from s2ft.serve.description import NO_PAGE, describe
from s2ft.serve.errors import CLIENT_CLOSED, ApiError, Disconnected
from s2ft.serve.job import Event
from s2ft.serve.metrics import Metrics
from s2ft.serve.record import record_of
from s2ft.serve.registry import Version, cannot_load
from s2ft.serve.replies import DONE, ChatReply, Choice, CompletionReply, server_sent_event
from s2ft.serve.schemas import ChatRequest, CompletionRequest, LoadRequest, Sampled, UnloadRequest, parse
from s2ft.serve.service import Answer, Service


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
    errors.install_handlers(app)
    app.add_middleware(Access, metrics=metrics, log=access_log)
    app.include_router(state_routes(service, metrics))
    app.include_router(model_routes(service))
    return app


def state_routes(service: Service, metrics: Metrics) -> APIRouter:
    """Routes for monitoring, which need no API key."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """GET /health: whether the server runs, and how many requests run and wait."""
        if not service.engine.alive:
            raise ApiError(503, "not_running", "the server is shutting down")
        return JSONResponse({"status": "ok", "running": service.engine.running, "waiting": service.engine.waiting})

    @router.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """GET /docs: where the description of the API is."""
        raise ApiError(404, "not_found", NO_PAGE)

    @router.get("/metrics")
    def counters() -> Response:
        """GET /metrics: the counters for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def model_routes(service: Service) -> APIRouter:
    """Routes under /v1, which need the API key if the server has one."""
    router = APIRouter(prefix="/v1", dependencies=[Depends(_key_check(service.limits.api_key))])

    @router.get("/models")
    def models() -> Response:
        """GET /v1/models: the base and its adapters."""
        names = [service.base, *service.engine.adapters.names]
        return JSONResponse({"object": "list", "data": [_model(service, name) for name in names]})

    @router.get("/models/{name:path}")
    def model(name: str) -> Response:
        """GET /v1/models/NAME: one model."""
        if name != service.base and name not in service.engine.adapters.names:
            raise errors.unknown_model(name)
        return JSONResponse(_model(service, name))

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        """POST /v1/completions: continue a text."""
        return await _answer(service, request, CompletionRequest, CompletionReply)

    @router.post("/chat/completions")
    async def chat(request: Request) -> Response:
        """POST /v1/chat/completions: answer a chat."""
        return await _answer(service, request, ChatRequest, ChatReply)

    @router.post("/load_lora_adapter")
    async def load(request: Request) -> Response:
        """POST /v1/load_lora_adapter: serve an adapter of the directory under a name."""
        body = parse(LoadRequest, await _json(request, service))
        version = await run_in_threadpool(service.engine.adapters.load, body.lora_name, body.lora_path)
        await _check(service, version)
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


def _key_check(key: str | None):
    async def check(request: Request) -> None:
        header = request.headers.get("authorization", "")
        if key is not None and not hmac.compare_digest(header.encode(), f"Bearer {key}".encode()):
            raise ApiError(
                401,
                "invalid_api_key",
                "send the server's key in the header Authorization: Bearer KEY",
                {"WWW-Authenticate": "Bearer"},
            )

    return check


async def _check(service: Service, version: Version) -> None:
    """Load an adapter once. One that cannot be loaded is removed."""
    try:
        await asyncio.wrap_future(service.engine.check(version))
    except ApiError:
        raise
    except Exception as error:
        service.engine.adapters.refuse(version, error)
        raise cannot_load(version, error) from None
    finally:
        service.engine.adapters.release(version)


async def _json(request: Request, service: Service):
    """Read and decode the body. Raises ApiError 400, 408 or 413."""
    limit, chunks, size = service.limits.max_body_bytes, [], 0
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
        await asyncio.wait_for(read(), service.limits.timeout)
    except asyncio.TimeoutError:
        raise ApiError(408, "timeout", "the body did not arrive in time", {"Connection": "close"}) from None
    try:
        return json.loads(b"".join(chunks), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {str(error)[:200]}") from None


def _refuse_constant(word: str):
    """Refuse NaN and Infinity, which Python reads but JSON does not have."""
    raise ValueError(f"{word} is not a JSON number")


async def _answer(service: Service, request: Request, kind: type[Sampled], reply: type[CompletionReply]) -> Response:
    arrived, record = asyncio.get_running_loop().time(), record_of(request.scope)
    ignored: list[str] | None = [] if service.limits.ignore_unsupported else None
    try:
        body = parse(kind, await _json(request, service), ignored)
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED)
    answer = Answer(service, request, record, arrived)
    try:
        jobs = await run_in_threadpool(service.jobs, body, answer.emit)
        record.model = body.model  # it is served, so that the metrics have a bounded number of names
        answer.start(jobs, body.choices)
        scored = body.scored is not None
        shape = reply(body.model, service.names if scored else None, body.with_usage, scored)
        events = answer.events()
        first = await anext(events)  # an error before the first token has its own status
        headers = {"X-Ignored-Parameters": _as_header(ignored)} if ignored else {}
        if body.stream:
            return EventStream(_stream(answer, shape, first, events), answer, headers)
        choices = [Choice(number) for number in range(len(jobs))]
        choices[first[0]].add(first[1])
        async for number, event in events:
            choices[number].add(event)
        answer.close()
        return JSONResponse(shape.answer(choices, answer.usage), headers=headers)
    except Disconnected:
        answer.close()
        return Response(status_code=CLIENT_CLOSED)
    except BaseException:
        answer.close()
        raise


def _as_header(names: list[str]) -> str:
    """Names of fields, which clients can make up, as the value of a header."""
    return ", ".join(quote(name, safe="", errors="replace")[:100] for name in names[:20])


async def _stream(answer: Answer, shape: CompletionReply, first: tuple[int, Event], events) -> AsyncIterator[str]:
    for chunk in shape.opening(len(answer.jobs)):
        yield server_sent_event(chunk)
    try:
        for chunk in filter(None, [shape.chunk(*first)]):
            yield server_sent_event(chunk)
        async for number, event in events:
            for chunk in filter(None, [shape.chunk(number, event)]):
                yield server_sent_event(chunk)
        for chunk in shape.closing(answer.usage):
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
