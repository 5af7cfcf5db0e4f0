"""The fields of requests, and errors.

A field that the server does not support is an error that names it, and is never ignored. Each error is JSON, {"error":
{"message", "type", "code", "request_id"}}, with a matching status.
"""

import json
import logging
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from s2ft.serve.access import CLIENT_CLOSED, RECORD

logger = logging.getLogger(__name__)
TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}
CODES = {404: "not_found", 405: "method_not_allowed"}  # codes of the errors of the router


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
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        code = CODES.get(error.status_code, "http_error")
        return ApiError(error.status_code, code, message, error.headers).response(request.scope[RECORD].id)

    @app.exception_handler(ClientDisconnect)
    async def disconnected(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        request_id = request.scope[RECORD].id
        logger.error("%s: %s %s failed", request_id, request.method, request.url.path, exc_info=error)
        return ApiError(500, "internal_error", "the server failed; see its log for the reason").response(request_id)


# fields of OpenAI's API that do not change the answer
IGNORED_FIELDS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# unsupported fields: the values that change nothing and are accepted, and the message for any other value
NOTHING: tuple[Any, ...] = (None, False, [], {})
BY_VLLM = "is not supported by this server; s2ft serve --engine vllm does it"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((None, 1), f"more than one answer {BY_VLLM}"),
    "logprobs": ((None, False), BY_VLLM),
    "top_logprobs": ((None, 0), BY_VLLM),
    "presence_penalty": ((None, 0, 0.0), BY_VLLM),
    "frequency_penalty": ((None, 0, 0.0), BY_VLLM),
    "repetition_penalty": ((None, 1, 1.0), BY_VLLM),
    "logit_bias": ((None, {}), BY_VLLM),
    "best_of": ((None, 1), "a request has one answer"),
    "echo": ((None, False), "the prompt is not repeated"),
    "suffix": ((None, ""), "text before a suffix is not supported"),
    "tools": (NOTHING, "tools are not called"),
    "functions": (NOTHING, "functions are not called"),
    "tool_choice": ((None, "none", "auto"), "tools are not called"),
    "function_call": ((None, "none", "auto"), "functions are not called"),
    "parallel_tool_calls": ((None, False, True), "tools are not called"),
    "response_format": ((None, {"type": "text"}), "answers are plain text"),
    "modalities": ((None, ["text"]), "answers are plain text"),
}

Word = Annotated[str, Field(min_length=1, max_length=256)]
Nothing = Annotated[list[Any], Field(max_length=0)] | None
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Strict(BaseModel):
    """A JSON object without unknown fields and without conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """Options of a stream.

    Attributes:
        include_usage: Whether the stream ends with the token counts.
        include_obfuscation: Has no effect. OpenAI pads the chunks of a stream, and this server does not.
    """

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampled(Strict):
    """The fields that completions and chats have in common.

    Attributes:
        model: Name of the base or of an adapter.
        max_tokens: Longest answer in tokens. Default: 16 for a completion, the rest of the context for a chat.
        temperature: Divisor of the logits, from 0 to 2. 0 always chooses the likeliest token. Default: 1.
        top_p: Draw among the likeliest tokens with this total probability, from 0 to 1. Default: 1.
        top_k: Draw among so many likeliest tokens. Default, 0 and -1: all.
        min_p: Leave out tokens below this share of the likeliest token's probability, from 0 to 1. Default: 0.
        seed: Seed of the draws. Default: a new seed.
        stop: One string or up to 16 strings that end the answer. They are not part of it.
        stream: Whether to send the answer in chunks.
        stream_options: Options of a stream.
    """

    model: Annotated[str, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Share | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Word | Annotated[list[Word], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def _one_text(prompt: Any) -> Any:
    """The text of a list with one text, which clients send for one prompt."""
    return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str) else prompt


class CompletionRequest(Sampled):
    """Body of /v1/completions.

    Attributes:
        prompt: A text, also in a list, or a list of token ids.
    """

    prompt: Annotated[str | list[Annotated[int, Field(ge=0)]], BeforeValidator(_one_text)]


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a chat.

    Attributes:
        role: "system", "user", "assistant", or another role of the chat template.
        content: The text, or parts with text.
        name: Has no effect.
        refusal: Must be empty, as in the answers of this server. So must the fields below.
        tool_calls: Must be empty.
        function_call: Must be empty.
        audio: Must be empty.
        annotations: Must be empty.
    """

    role: Word
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    tool_calls: Nothing = None
    function_call: None = None
    audio: None = None
    annotations: Nothing = None

    def to_dict(self) -> dict[str, str]:
        """The message for the chat template."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(Sampled):
    """Body of /v1/chat/completions.

    Attributes:
        messages: The conversation.
        max_completion_tokens: The newer name of `max_tokens`.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class LoadRequest(Strict):
    """Body of /v1/load_lora_adapter.

    Attributes:
        lora_name: The name that clients use.
        lora_path: The adapter's folder, relative to the directory of adapters.
    """

    lora_name: Word
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadRequest(Strict):
    """Body of /v1/unload_lora_adapter.

    Attributes:
        lora_name: The name of the adapter.
    """

    lora_name: Word


def parse(kind: type[Strict], body: Any, ignored: list[str] | None = None):
    """Check decoded JSON and convert it to a request.

    Args:
        kind: The class of the request.
        body: The decoded JSON.
        ignored: Gets the names of unsupported fields, which are then ignored. None refuses them.

    Returns:
        An object of the class.

    Raises:
        ApiError: 400 with the names of wrong or unsupported fields.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_request", f"the body must be a JSON object, got {json.dumps(body)[:20]}")
    if issubclass(kind, Sampled):
        body = {name: value for name, value in body.items() if name not in IGNORED_FIELDS}
        for name, (allowed, why) in REFUSED.items():
            value = body.pop(name, None)
            if any(type(value) is type(one) and value == one for one in allowed):
                continue
            if ignored is None:
                raise ApiError(400, "unsupported_parameter", f"{name}: {why}")
            ignored.append(name)
        if ignored is not None:
            ignored += sorted(body.keys() - kind.model_fields.keys())
            body = {name: value for name, value in body.items() if name in kind.model_fields}
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise ApiError(400, "invalid_request", _first(error)) from None


def _first(error: ValidationError) -> str:
    """Return the first problem in one line. A field that allows several types has one message for each."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    field = problems[0]["loc"][:1]
    return "; ".join(
        f"{'.'.join(str(part)[:100] for part in problem['loc'])}: {problem['msg']}"
        for problem in problems
        if problem["loc"][:1] == field
    )[:1000]
