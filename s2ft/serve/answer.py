"""The answer to a request: its job, the events of the job on the event loop, and the JSON that clients get."""

import asyncio
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from copy import deepcopy
from functools import lru_cache
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from s2ft.serve.access import RequestRecord
from s2ft.serve.engine import Engine, Event, Job
from s2ft.serve.schemas import ApiError, ChatRequest, Sampled
from s2ft.serve.server_options import ServerOptions
from s2ft.text.adapter_prompts import KEY, Prompter
from s2ft.text.encoding import UNLIMITED, context_length
from s2ft.text.generation import Sampler, TextStream
from s2ft.text.prompts import PromptFormat

PROMPTERS = 64  # formats of prompts that are kept; most servers have a few
TOKENS_OF_COMPLETION = 16  # the longest completion if the client asks for no length, as in OpenAI's API
TOKENS_WITHOUT_A_CONTEXT = 2048  # the longest chat if neither the model nor an option limits it
DONE = "data: [DONE]\n\n"


class Service:
    """A model with its tokenizer, which makes jobs of requests.

    Args:
        engine: The engine that runs the model.
        tokenizer: The model's tokenizer.
        base: The name of the base for clients.
        options: The options of the server, with the limits of requests.
    """

    def __init__(self, engine: Engine, tokenizer, base: str, options: ServerOptions) -> None:
        self.engine, self.base, self.options = engine, base, options
        self.created = int(time.time())
        self.context = context_length(engine.batch.model)
        self.vocabulary = engine.batch.model.get_input_embeddings().weight.shape[0]
        self._decoding = deepcopy(tokenizer)  # one for each thread, since they work at the same time
        self._one_at_a_time = threading.Lock()
        settings = engine.batch.model.generation_config
        self.prompter: Callable[[PromptFormat | None], Prompter] = lru_cache(PROMPTERS)(  # one for each format
            lambda recorded: Prompter(tokenizer, None if recorded is None else {KEY: recorded.to_dict()}, settings)
        )
        self.prompter(None)  # now, and not at the first request

    def job(self, body: Sampled, emit: Callable[[Event], None]) -> Job:
        """Make the job of a request. Runs in a thread, since it may read files.

        Args:
            body: The request.
            emit: Called with each event of the answer, in the engine's thread.

        Raises:
            ApiError: The model is unknown or can't be served, the prompt can't be encoded, or the answer would be too
                long.
        """
        served = None if body.model == self.base else self.engine.adapters.acquire(body.model)
        try:
            with self._one_at_a_time:
                prompter = self.prompter(None if served is None else served.prompt)
                ids = self.prompt_ids(body, prompter)
            sampler = Sampler(
                1.0 if body.temperature is None else body.temperature,
                1.0 if body.top_p is None else body.top_p,
                body.seed,
                top_k=max(0, body.top_k or 0),
                min_p=body.min_p or 0.0,
            )
            length, before = self.answer_length(body, len(ids)), () if isinstance(body, ChatRequest) else ids
            return Job(
                ids, length, sampler, TextStream(self._decoding, body.stops, before), prompter.ends, emit, served
            )
        except BaseException:
            self.engine.adapters.release(served)
            raise

    def prompt_ids(self, body: Sampled, prompter: Prompter) -> list[int]:
        """Return the token ids of a request's prompt.

        Args:
            body: The request.
            prompter: The maker of prompts of the adapter.

        Raises:
            ApiError: 400 if the prompt cannot be encoded.
        """
        try:
            if isinstance(body, ChatRequest):
                messages = [message.to_dict() for message in body.messages]
                for message in messages:
                    "".join(message.values()).encode()  # raises UnicodeError, while tokenizers raise various errors
                found = prompter.encode(messages)
            elif isinstance(body.prompt, list):
                found = body.prompt
            else:
                body.prompt.encode()
                found = prompter.encode_text(body.prompt)
        except UnicodeError:
            raise ApiError(400, "invalid_prompt", "the text contains half of a surrogate pair") from None
        except ValueError as error:  # of the chat template
            raise ApiError(400, "invalid_messages", str(error)) from None
        if not found:
            raise ApiError(400, "empty_prompt", "the prompt has no tokens")
        if max(found) >= self.vocabulary:
            raise ApiError(400, "invalid_prompt", f"prompt: tokens must be below {self.vocabulary}")
        return found

    def answer_length(self, body: Sampled, prompt: int) -> int:
        """Return the length limit of an answer.

        Args:
            body: The request.
            prompt: Number of tokens of the prompt.

        Raises:
            ApiError: 400 if the request asks for more tokens than the server or the context allows.
        """
        is_chat, limit = isinstance(body, ChatRequest), self.options.max_tokens_limit
        requested = body.max_completion_tokens if is_chat and body.max_completion_tokens else body.max_tokens
        if limit is not None and requested is not None and requested > limit:
            raise ApiError(400, "max_tokens_exceeded", f"{requested} tokens requested, but the limit is {limit}")
        room = self.context - prompt
        if room < (requested or 1):
            raise ApiError(
                400,
                "context_length_exceeded",
                f"the model's context is {self.context} tokens; the prompt has {prompt}, and at least "
                f"{requested or 1} must be generated",
            )
        most = TOKENS_WITHOUT_A_CONTEXT if self.context == UNLIMITED else room
        return requested or min(room, limit or most, room if is_chat else TOKENS_OF_COMPLETION)


class Answer:
    """The answer to a request: the events of its job on the event loop, and what the client gets of them.

    The client's disconnection and the timeout are events too. What the client gets has the format of OpenAI's API. The
    middleware closes the answer at the end of the request. The job then leaves the queue or the batch, if it is still
    there.

    Args:
        service: The service.
        body: The request as the client has sent it.
        request: The HTTP request.
        record: The record of the request, which gets the token counts when the answer is closed.
        arrived: The event loop's time at the arrival of the request.
    """

    def __init__(
        self, service: Service, body: Sampled, request: Request, record: RequestRecord, arrived: float
    ) -> None:
        self.service, self.record = service, record
        self._chat = isinstance(body, ChatRequest)
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage
        name = f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._fields = {"id": name, "object": "text_completion", "created": int(time.time()), "model": body.model}
        self.job: Job | None = None  # once it is in the queue
        self.ended = False
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()
        seconds = service.options.timeout
        late = Event(error=ApiError(504, "timeout", f"the answer took more than {seconds:g} seconds"))
        self._timer = self._loop.call_at(arrived + seconds, self._events.put_nowait, late)
        self._watch = self._loop.create_task(self._watch_client(request))

    def emit(self, event: Event) -> None:
        """Take an event of the job from the engine's thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def _watch_client(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)

    async def events(self) -> AsyncIterator[Event]:
        """Yield all events. Raises the ApiError of an event, or ClientDisconnect."""
        while not self.ended:
            event = await self._events.get()
            if event is None:
                raise ClientDisconnect
            self.ended = event.last
            if event.error is not None:
                raise event.error
            yield event

    def close(self) -> None:
        """Stop waiting for events, cancel the job, and note the token counts."""
        self._timer.cancel()
        self._watch.cancel()
        if self.job is not None:
            self.service.engine.cancel(self.job)
            self.record.prompt_tokens, self.record.generated_tokens = len(self.job.prompt), len(self.job.tokens)

    @property
    def usage(self) -> dict[str, int]:
        """The token counts in the format of OpenAI's API."""
        prompt, generated = len(self.job.prompt), len(self.job.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    # ---- what the client gets ------------------------------------------------------------------------------

    def whole(self, text: str, finish: str | None) -> dict:
        """Return a complete answer."""
        message = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        return {**self._answer("chat.completion", message, finish), "usage": self.usage}

    def opening(self) -> str:
        """The events before the first text."""
        return self._event({"delta": {"role": "assistant", "content": ""}}, None) if self._chat else ""

    def chunk(self, event: Event) -> str:
        """The text of an event as an event of the stream, if it has any."""
        delta = {"delta": {"content": event.text} if event.text else {}} if self._chat else {"text": event.text}
        return self._event(delta, event.finish) if event.text or event.finish else ""

    def closing(self) -> str:
        """The events after the last text: the token counts, if the client wants them."""
        return self._event({}, None, choices=[], usage=self.usage) if self._with_usage else ""

    def _event(self, text: dict, finish: str | None, **others: Any) -> str:
        usage = {"usage": None} if self._with_usage else {}  # the counts come at the end
        return server_sent_event({**self._answer("chat.completion.chunk", text, finish), **usage, **others})

    def _answer(self, kind: str, text: dict, finish: str | None) -> dict:
        choice = {"index": 0, **text, "logprobs": None, "finish_reason": finish}
        return {**self._fields, **({"object": kind} if self._chat else {}), "choices": [choice]}


def server_sent_event(event: dict) -> str:
    """Format an object as a server-sent event."""
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"
