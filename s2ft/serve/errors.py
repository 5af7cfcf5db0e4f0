"""Every error is JSON, {"error": {"message", "type", "code"}}, with the status that belongs to it."""

import logging

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)
TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}
CODES = {404: "not_found", 405: "method_not_allowed"}  # of what the router refuses
CLIENT_CLOSED = 499  # nobody reads it; the metrics count it


class ApiError(Exception):
    """What a client is told."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers

    @property
    def body(self) -> dict:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


class Disconnected(Exception):
    """The client has gone."""


def unknown_model(name: str) -> ApiError:
    return ApiError(404, "model_not_found", f"there is no model {name[:200]!r}; GET /v1/models lists what there is")


def shutting_down() -> ApiError:
    return ApiError(503, "shutting_down", "the server is shutting down", {"Retry-After": "5"})


def install(app: FastAPI) -> None:
    """Have the app answer all errors so, those of unknown routes and those nobody expected too."""

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def by_the_router(request: Request, error: HTTPException) -> JSONResponse:
        where = f"{request.method} {request.url.path[:200]}"
        return ApiError(
            error.status_code, CODES.get(error.status_code, "http_error"), f"{where}: {error.detail}", error.headers
        ).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return ApiError(500, "internal_error", "the server failed; its log says why").response()
