"""What may be asked, field by field. What can't be done is refused by name, never ignored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from s2ft.serve.errors import ApiError

# fields of OpenAI's API that say nothing about the answer
WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# fields that are refused unless they ask for nothing, and what to say
NOTHING = (None, False, [], {})
REFUSED = {
    "n": ((None, 1), "one answer a request: send it several times, the answers share a batch"),
    "best_of": ((None, 1), "one answer a request"),
    "logprobs": ((None, False), "log probabilities are not returned"),
    "top_logprobs": ((None, 0), "log probabilities are not returned"),
    "echo": ((None, False), "the prompt is not repeated"),
    "suffix": ((None, ""), "text is not filled in"),
    "presence_penalty": ((None, 0, 0.0), "penalties are not applied"),
    "frequency_penalty": ((None, 0, 0.0), "penalties are not applied"),
    "logit_bias": (NOTHING, "logits are not biased"),
    "tools": (NOTHING, "tools are not called"),
    "functions": (NOTHING, "functions are not called"),
    "tool_choice": ((None, "none", "auto"), "tools are not called"),
    "function_call": ((None, "none", "auto"), "functions are not called"),
    "parallel_tool_calls": ((None, False, True), "tools are not called"),
    "response_format": ((None, {"type": "text"}), "answers are plain text"),
    "modalities": ((None, ["text"]), "answers are plain text"),
}

Word = Annotated[str, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI pads its chunks with noise; nothing is padded here


class Sampled(Strict):
    """What both kinds of request have."""

    model: Annotated[str, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Word | Annotated[list[Word], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Sampled):
    prompt: str | list[Annotated[int, Field(ge=0)]] | list[str]

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def default_tokens(self) -> int | None:
        return 16  # as OpenAI's API has it


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Word
    content: str | list[TextPart]
    name: str | None = None

    def to_dict(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def default_tokens(self) -> int | None:
        return None  # what there is room for


class LoadRequest(Strict):
    lora_name: Word
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadRequest(Strict):
    lora_name: Word


def parse(kind: type[Strict], body: Any):
    """A request of this kind from decoded JSON. Raises: ApiError 400 that names what is wrong."""
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_request", f"the body must be a JSON object, got {_kind(body)}")
    if issubclass(kind, Sampled):
        body = {name: value for name, value in body.items() if name not in WITHOUT_EFFECT}
        for name, (allowed, why) in REFUSED.items():
            value = body.pop(name, None)
            if not any(type(value) is type(one) and value == one for one in allowed):
                raise ApiError(400, "unsupported_parameter", f"{name}: {why}")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise ApiError(400, "invalid_request", _first(error)) from None


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, in a line; of a field with several forms, one line for each."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    field = problems[0]["loc"][:1]
    return "; ".join(
        f"{'.'.join(str(part)[:100] for part in problem['loc'])}: {problem['msg']}"
        for problem in problems
        if problem["loc"][:1] == field
    )[:1000]


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), "something else")
