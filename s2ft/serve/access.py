"""The middleware that gives each request an id, and logs and counts it at its end."""

import json
import logging
import re
import secrets
import time
from urllib.parse import quote

from s2ft.serve.metrics import RECORD, Metrics, RequestRecord

logger = logging.getLogger(__name__)
HEADER = "x-request-id"
ID = re.compile(r"[\w.:+/=@-]{1,128}", re.ASCII)  # ids of clients that are safe in a log and in a header
QUIET = ("/health", "/metrics")  # routes that are not logged if they succeed, since monitors call them all the time
FORMATS = ("text", "json", "off")


class Access:
    """ASGI middleware that gives each request an id, and logs and counts it at its end.

    Args:
        app: The app.
        metrics: The counters.
        log: "text", "json" or "off".
    """

    def __init__(self, app, metrics: Metrics, log: str = "text") -> None:
        self.app, self.metrics, self.log = app, metrics, log

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        record = scope[RECORD] = RequestRecord(_id_of(scope))
        sent = 500

        async def send_with_id(message) -> None:
            nonlocal sent
            if message["type"] == "http.response.start":
                sent = message["status"]
                headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != HEADER.encode()]
                message = {**message, "headers": [*headers, (HEADER.encode(), record.id.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            record.status = record.status or sent
            # The route and not the path, since clients can make up any number of paths.
            route = getattr(scope.get("route"), "path", "unknown")
            seconds = time.perf_counter() - record.started
            self.metrics.count(route, record, seconds)
            if self.log != "off" and not (route in QUIET and record.status < 400):
                logger.info("%s", (as_json if self.log == "json" else as_text)(scope, record, seconds))


def _id_of(scope) -> str:
    sent = dict(scope["headers"]).get(HEADER.encode(), b"").decode("latin-1")
    return sent if ID.fullmatch(sent) else f"req-{secrets.token_hex(12)}"


def _fields(scope, record: RequestRecord, seconds: float) -> dict:
    client = scope.get("client")
    return {
        "id": record.id,
        "client": client[0] if client else None,
        "request": f"{scope['method']} {quote(scope['path'])[:200]}",
        "status": record.status,
        "model": record.model,
        "prompt_tokens": record.prompt_tokens,
        "generated_tokens": record.generated_tokens,
        "seconds": round(seconds, 3),
    }


def as_json(scope, record: RequestRecord, seconds: float) -> str:
    """The line of the access log as a JSON object."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return json.dumps({"time": now, **_fields(scope, record, seconds)}, ensure_ascii=True)


def as_text(scope, record: RequestRecord, seconds: float) -> str:
    """The line of the access log as text."""
    found = _fields(scope, record, seconds)
    model = "-" if record.model is None else ascii(record.model)[1:-1]
    return (
        f"{time.strftime('%H:%M:%S')} {found['id']} {found['client'] or '-'} {found['request']} {found['status']} "
        f"model={model} in={record.prompt_tokens} out={record.generated_tokens} {seconds:.3f}s"
    )
