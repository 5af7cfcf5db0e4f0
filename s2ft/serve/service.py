"""Between requests and jobs: the prompt's tokens, the limits, and the events of one job on the event loop."""

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

TOKENS_WITHOUT_A_CONTEXT = 2048  # the most that is generated where neither model nor option says


class Service:
    """A model with its tokenizer, as requests see it."""

    def __init__(self, engine: Engine, tokenizer, base: str, limits: Limits) -> None:
        self.engine, self.base, self.limits = engine, base, limits
        self.created = int(time.time())
        self.context = context_length(engine.batch.model)
        self.vocabulary = engine.batch.model.get_input_embeddings().weight.shape[0]
        self.ends = frozenset(end_ids(tokenizer, engine.batch.model.generation_config))
        self._encoding, self._decoding = tokenizer, deepcopy(tokenizer)  # two threads use them at the same time
        self._one_at_a_time = threading.Lock()

    def take(self, model: str) -> Version | None:
        """The adapter that `model` names, None for the base. Raises: ApiError 404."""
        return None if model == self.base else self.engine.adapters.take(model)

    def check_model(self, model: str) -> None:
        """Raises: ApiError 404."""
        version = self.take(model)
        if version is not None:
            self.engine.adapters.give_back(version)

    def prompt_ids(self, body: Sampled) -> list[int]:
        """Raises: ApiError 400 for a prompt that can't be put in tokens."""
        with self._one_at_a_time:
            try:
                ids = self._chat_ids(body) if isinstance(body, ChatRequest) else self._completion_ids(body)
            except TemplateError as error:
                raise ApiError(400, "invalid_messages", f"the chat template refuses the messages: {error}") from None
            except UnicodeError:
                raise ApiError(400, "invalid_prompt", "the text has half a surrogate pair, no character") from None
        if not ids:
            raise ApiError(400, "empty_prompt", "the prompt has no tokens")
        return ids

    def _chat_ids(self, body: ChatRequest) -> list[int]:
        messages = [message.to_dict() for message in body.messages]
        for message in messages:
            "".join(message.values()).encode()  # raises UnicodeError here, where tokenizers raise what they like
        return encode_prompt(self._encoding, messages)

    def _completion_ids(self, body: CompletionRequest) -> list[int]:
        prompt = body.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            if len(prompt) > 1:
                raise ApiError(400, "unsupported_parameter", "prompt: one a request; several requests share a batch")
            prompt = prompt[0]
        if isinstance(prompt, list):
            if any(token >= self.vocabulary for token in prompt):
                raise ApiError(400, "invalid_prompt", f"prompt: tokens must be below {self.vocabulary}")
            return prompt
        prompt.encode()
        ids = self._encoding(prompt)["input_ids"]
        return ids[:-1] if ids and ids[-1] == self._encoding.eos_token_id else ids

    def tokens_to_make(self, body: Sampled, prompt: int) -> int:
        """The most tokens of an answer to a prompt of so many. Raises: ApiError 400 for more than there is room for."""
        asked, limit = body.asked_tokens, self.limits.max_tokens
        if limit is not None and asked is not None and asked > limit:
            raise ApiError(400, "max_tokens_exceeded", f"{asked} tokens asked for; this server makes {limit} at most")
        if self.context is None:
            return asked or body.default_tokens or limit or TOKENS_WITHOUT_A_CONTEXT
        room = self.context - prompt
        if room < (asked or 1):
            raise ApiError(
                400,
                "context_length_exceeded",
                f"the model's context is {self.context} tokens; the prompt has {prompt}, and {asked or 1} "
                "at least are to be generated",
            )
        return asked or min(room, limit or room, body.default_tokens or room)

    def job(self, body: Sampled, ids: list[int], emit) -> Job:
        """Raises: ApiError for an unknown model or too many tokens."""
        most = self.tokens_to_make(body, len(ids))
        sampler = Sampler(
            1.0 if body.temperature is None else body.temperature, 1.0 if body.top_p is None else body.top_p, body.seed
        )
        return Job(ids, most, sampler, TextStream(self._decoding, body.stops), self.ends, emit, self.take(body.model))


class Answer:
    """One job's events on the event loop, its client's going away and its time running out among them.

    Whoever makes one closes it: the job then leaves the queue or the batch, if it is still there.
    """

    def __init__(self, service: Service, request: Request, body: Sampled, ids: list[int], arrived: float) -> None:
        """Queue the job; `arrived` is the loop's time. Raises: ApiError where it can't be."""
        self.service, self.arrived = service, arrived
        self.told = False  # the end, be it an error
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()
        self.job = service.job(body, ids, self._from_the_engine)
        service.engine.submit(self.job)
        self._timer = self._loop.call_at(arrived + service.limits.timeout, self._events.put_nowait, self._too_late())
        self._watch = self._loop.create_task(self._watch_client(request))

    def _from_the_engine(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _too_late(self) -> Event:
        seconds = self.service.limits.timeout
        return Event(error=ApiError(504, "timeout", f"not answered within {seconds:g} seconds"))

    async def _watch_client(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)

    async def events(self) -> AsyncIterator[Event]:
        """All up to the last. Raises: ApiError; Disconnected."""
        first = True
        while True:
            event = await self._events.get()
            if event is None:
                raise Disconnected
            self.told = event.last
            if event.error is not None:
                raise event.error
            if first and self.service.engine.metrics:
                self.service.engine.metrics.first_token.observe(self._loop.time() - self.arrived)
            first = False
            yield event
            if event.last:
                return

    def close(self) -> None:
        self._timer.cancel()
        self._watch.cancel()
        self.service.engine.cancel(self.job)

    @property
    def usage(self) -> dict[str, int]:
        prompt, made = len(self.job.prompt), len(self.job.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
