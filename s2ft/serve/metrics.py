"""The counters that Prometheus reads from /metrics."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STATUS = "s2ft_status"  # key in the ASGI scope: the final status, if it differs from that of the headers


class Metrics:
    """The counters of one server, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kind = dict(registry=self.registry)
        self.requests = Counter(
            "s2ft_requests", "Requests by route and status; 499: the client disconnected", ["route", "status"], **kind
        )
        self.prompt_tokens = Counter("s2ft_prompt_tokens", "Tokens of the prompts that were answered", **kind)
        self.generated_tokens = Counter("s2ft_generated_tokens", "Tokens generated", **kind)
        self.queue_length = Gauge("s2ft_queue_length", "Requests in the queue", **kind)
        self.running = Gauge("s2ft_running", "Sequences in the running batch", **kind)
        self.adapters = Gauge("s2ft_adapters", "Adapters that clients can name", **kind)
        self.batch_size = Histogram(
            "s2ft_batch_size", "Sequences per step of the model", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), **kind
        )
        self.latency = Histogram(
            "s2ft_request_seconds",
            "From a request's arrival to the end of its answer",
            ["route"],
            buckets=SECONDS,
            **kind,
        )
        self.first_token = Histogram(
            "s2ft_first_token_seconds", "From a request's arrival to its first token", buckets=SECONDS, **kind
        )

    def text(self) -> bytes:
        """The counters in the text format of Prometheus."""
        return generate_latest(self.registry)


class CountRequests:
    """ASGI middleware that counts and times each request by its route."""

    def __init__(self, app, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, start = 500, time.perf_counter()

        async def send_and_note_status(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note_status)
        finally:
            # The route and not the path, since clients can make up any number of paths.
            route = getattr(scope.get("route"), "path", "unknown")
            self.metrics.requests.labels(route, str(scope.get(STATUS, status))).inc()
            self.metrics.latency.labels(route).observe(time.perf_counter() - start)
