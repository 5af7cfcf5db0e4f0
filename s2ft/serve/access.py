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
                logger.info("%s", line_of(self.log, scope, record, seconds))


def _id_of(scope) -> str:
    sent = dict(scope["headers"]).get(HEADER.encode(), b"").decode("latin-1")
    return sent if ID.fullmatch(sent) else f"req-{secrets.token_hex(12)}"


def line_of(kind: str, scope, record: RequestRecord, seconds: float) -> str:
    """The line of the access log, as text or as a JSON object."""
    client, request = (scope.get("client") or ["-"])[0], f"{scope['method']} {quote(scope['path'])[:200]}"
    if kind == "text":
        model = "-" if record.model is None else ascii(record.model)[1:-1]
        return (
            f"{time.strftime('%H:%M:%S')} {record.id} {client} {request} {record.status} model={model} "
            f"in={record.prompt_tokens} out={record.generated_tokens} {seconds:.3f}s"
        )
    found = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "id": record.id, "client": client, "request": request}
    found |= {"status": record.status, "model": record.model, "prompt_tokens": record.prompt_tokens}
    return json.dumps({**found, "generated_tokens": record.generated_tokens, "seconds": round(seconds, 3)})
