"""Convert requests to jobs: prompts, limits, and the events of a job on the event loop."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from copy import deepcopy

from fastapi import Request
from jinja2 import TemplateError

from s2ft.serve.engine import Engine
from s2ft.serve.errors import ApiError, Disconnected
from s2ft.serve.job import Event, Job
from s2ft.serve.options import Limits
from s2ft.serve.registry import Version
from s2ft.serve.schemas import ChatRequest, CompletionRequest, Sampled
from s2ft.text.encoding import context_length
from s2ft.text.prompts import encode_prompt, end_ids
from s2ft.text.sampling import Sampler
from s2ft.text.streams import TextStream

TOKENS_WITHOUT_A_CONTEXT = 2048  # the longest answer if neither the model nor an option limits it


class Service:
    """A model with its tokenizer, for requests.

    Args:
        engine: The engine that runs the model.
        tokenizer: The model's tokenizer.
        base: The name of the base for clients.
        limits: The limits of requests.
    """

    def __init__(self, engine: Engine, tokenizer, base: str, limits: Limits) -> None:
        self.engine, self.base, self.limits = engine, base, limits
        self.created = int(time.time())
        self.context = context_length(engine.batch.model)
        self.vocabulary = engine.batch.model.get_input_embeddings().weight.shape[0]
        self.ends = frozenset(end_ids(tokenizer, engine.batch.model.generation_config))
        # One for each thread, since they work at the same time.
        self._encoding, self._decoding = tokenizer, deepcopy(tokenizer)
        self._one_at_a_time = threading.Lock()

    def acquire(self, model: str) -> Version | None:
        """Acquire the adapter that a request names, or return None for the base. Raises ApiError 404."""
        return None if model == self.base else self.engine.adapters.acquire(model)

    def check_model(self, model: str) -> None:
        """Check that a model is served. Raises ApiError 404."""
        version = self.acquire(model)
        if version is not None:
            self.engine.adapters.release(version)

    def prompt_ids(self, body: Sampled) -> list[int]:
        """Return the token ids of a request's prompt.

        Args:
            body: The request.

        Raises:
            ApiError: 400 if the prompt cannot be encoded.
        """
        with self._one_at_a_time:
            try:
                ids = self._chat_ids(body) if isinstance(body, ChatRequest) else self._completion_ids(body)
            except TemplateError as error:
                raise ApiError(400, "invalid_messages", f"the chat template refuses the messages: {error}") from None
            except UnicodeError:
                raise ApiError(400, "invalid_prompt", "the text contains half of a surrogate pair") from None
        if not ids:
            raise ApiError(400, "empty_prompt", "the prompt has no tokens")
        return ids

    def _chat_ids(self, body: ChatRequest) -> list[int]:
        messages = [message.to_dict() for message in body.messages]
        for message in messages:
            "".join(message.values()).encode()  # raises UnicodeError, while tokenizers raise various errors
        return encode_prompt(self._encoding, messages)

    def _completion_ids(self, body: CompletionRequest) -> list[int]:
        prompt = body.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            if len(prompt) > 1:
                raise ApiError(
                    400, "unsupported_parameter", "prompt: a request has one prompt; several requests share a batch"
                )
            prompt = prompt[0]
        if isinstance(prompt, list):
            if any(token >= self.vocabulary for token in prompt):
                raise ApiError(400, "invalid_prompt", f"prompt: tokens must be below {self.vocabulary}")
            return prompt
        prompt.encode()
        ids = self._encoding(prompt)["input_ids"]
        return ids[:-1] if ids and ids[-1] == self._encoding.eos_token_id else ids

    def answer_length(self, body: Sampled, prompt: int) -> int:
        """Return the length limit of an answer.

        Args:
            body: The request.
            prompt: Number of tokens of the prompt.

        Raises:
            ApiError: 400 if the request asks for more tokens than the server or the context allows.
        """
        requested, limit = body.requested_tokens, self.limits.max_tokens
        if limit is not None and requested is not None and requested > limit:
            raise ApiError(400, "max_tokens_exceeded", f"{requested} tokens requested, but the limit is {limit}")
        if self.context is None:
            return requested or body.default_tokens or limit or TOKENS_WITHOUT_A_CONTEXT
        room = self.context - prompt
        if room < (requested or 1):
            raise ApiError(
                400,
                "context_length_exceeded",
                f"the model's context is {self.context} tokens; the prompt has {prompt}, and at least "
                f"{requested or 1} must be generated",
            )
        return requested or min(room, limit or room, body.default_tokens or room)

    def job(self, body: Sampled, ids: list[int], emit) -> Job:
        """Make the job of a request.

        Args:
            body: The request.
            ids: Token ids of the prompt.
            emit: Called with each event in the engine's thread.

        Raises:
            ApiError: The model is unknown, or the answer would be too long.
        """
        length = self.answer_length(body, len(ids))
        sampler = Sampler(
            1.0 if body.temperature is None else body.temperature, 1.0 if body.top_p is None else body.top_p, body.seed
        )
        return Job(
            ids, length, sampler, TextStream(self._decoding, body.stops), self.ends, emit, self.acquire(body.model)
        )


class Answer:
    """The events of one job on the event loop, including the client's disconnection and the timeout.

    It must be closed. The job then leaves the queue or the batch, if it is still there.

    Args:
        service: The service.
        request: The HTTP request.
        body: The body of the request.
        ids: Token ids of the prompt.
        arrived: The event loop's time at the arrival of the request.

    Raises:
        ApiError: The job cannot be queued.
    """

    def __init__(self, service: Service, request: Request, body: Sampled, ids: list[int], arrived: float) -> None:
        self.service, self.arrived = service, arrived
        self.ended = False  # whether the last event was read
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()
        self.job = service.job(body, ids, self._from_the_engine)
        service.engine.submit(self.job)
        self._timer = self._loop.call_at(arrived + service.limits.timeout, self._events.put_nowait, self._too_late())
        self._watch = self._loop.create_task(self._watch_client(request))

    def _from_the_engine(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _too_late(self) -> Event:
        seconds = self.service.limits.timeout
        return Event(error=ApiError(504, "timeout", f"the answer took more than {seconds:g} seconds"))

    async def _watch_client(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)

    async def events(self) -> AsyncIterator[Event]:
        """Yield all events. Raises the ApiError of the last event, or Disconnected."""
        first = True
        while True:
            event = await self._events.get()
            if event is None:
                raise Disconnected
            self.ended = event.last
            if event.error is not None:
                raise event.error
            if first and self.service.engine.metrics:
                self.service.engine.metrics.first_token.observe(self._loop.time() - self.arrived)
            first = False
            yield event
            if event.last:
                return

    def close(self) -> None:
        """Stop waiting for events and cancel the job."""
        self._timer.cancel()
        self._watch.cancel()
        self.service.engine.cancel(self.job)

    @property
    def usage(self) -> dict[str, int]:
        """The token counts in the format of OpenAI's API."""
        prompt, generated = len(self.job.prompt), len(self.job.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
