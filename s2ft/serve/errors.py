"""Errors of the API. Each is JSON, {"error": {"message", "type", "code", "request_id"}}, with a matching status."""

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from s2ft.serve.access import RECORD

logger = logging.getLogger(__name__)
TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}
CODES = {404: "not_found", 405: "method_not_allowed"}  # codes of the errors of the router
CLIENT_CLOSED = 499  # the client does not receive it, but the metrics count it


class ApiError(Exception):
    """An error that is sent to the client.

    Args:
        status: HTTP status.
        code: A word for programs, such as "model_not_found".
        message: The text for people.
        headers: Further headers of the response.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers

    def body(self, request_id: str) -> dict:
        """The JSON object of the error, with the id of its request."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "code": self.code, "request_id": request_id}}

    def response(self, request_id: str) -> JSONResponse:
        """The HTTP response of the error, with the id of its request."""
        return JSONResponse(self.body(request_id), self.status, {**(self.headers or {}), "X-Request-Id": request_id})


class Disconnected(Exception):
    """The client has disconnected."""


def unknown_model(name: str) -> ApiError:
    """The error for a model name that is not served."""
    return ApiError(404, "model_not_found", f"there is no model {name[:200]!r}; GET /v1/models lists the models")


def shutting_down() -> ApiError:
    """The error for requests during the shutdown."""
    return ApiError(503, "shutting_down", "the server is shutting down", {"Retry-After": "5"})


def install_handlers(app: FastAPI) -> None:
    """Make an app send all errors as JSON, including those of unknown routes and unexpected ones."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response(request.scope[RECORD].id)

    @app.exception_handler(HTTPException)
    async def router_error(request: Request, error: HTTPException) -> JSONResponse:
        where = f"{request.method} {request.url.path[:200]}"
        code = CODES.get(error.status_code, "http_error")
        answer = ApiError(error.status_code, code, f"{where}: {error.detail}", error.headers)
        return answer.response(request.scope[RECORD].id)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        request_id = request.scope[RECORD].id
        logger.error("%s: %s %s failed", request_id, request.method, request.url.path, exc_info=error)
        return ApiError(500, "internal_error", "the server failed; see its log for the reason").response(request_id)
