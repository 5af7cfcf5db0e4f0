"""Convert requests to jobs: prompts, limits, and the events of the jobs on the event loop."""

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from copy import deepcopy
from functools import cached_property, partial

from fastapi import Request

from s2ft.serve.engine import Engine
from s2ft.serve.errors import ApiError, Disconnected
from s2ft.serve.job import Event, Job
from s2ft.serve.options import Limits
from s2ft.serve.record import Record
from s2ft.serve.registry import Version
from s2ft.serve.schemas import ChatRequest, Sampled
from s2ft.serve.sources import some
from s2ft.text.adapter_prompts import KEY, Prompter
from s2ft.text.encoding import context_length
from s2ft.text.prompts import PromptFormat
from s2ft.text.sampling import Sampler
from s2ft.text.streams import TextStream, TokenNames

logger = logging.getLogger(__name__)
PROMPTERS = 64  # formats of prompts that are kept; most servers have a few
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
        # One for each thread, since they work at the same time.
        self._encoding, self._decoding = tokenizer, deepcopy(tokenizer)
        self._one_at_a_time = threading.Lock()
        self._prompters: dict[PromptFormat | None, Prompter] = {}
        self._prompter(None)  # now, and not at the first request

    @cached_property
    def names(self) -> TokenNames:
        """The texts of single tokens. Made at the first request for log probabilities, in a thread of its own."""
        return TokenNames(deepcopy(self._decoding))

    def jobs(self, body: Sampled, emit: Callable[[int, Event], None]) -> list[Job]:
        """Make the jobs of a request, one for each answer. Runs in a thread, since it may read files.

        Args:
            body: The request.
            emit: Called with the number of the answer and each of its events, in the engine's thread.

        Raises:
            ApiError: The model is unknown or can't be served, a prompt can't be encoded, or an answer would be too
                long.
        """
        prompts = 1 if isinstance(body, ChatRequest) else len(body.prompts)
        count = prompts * body.choices
        if count > self.engine.queue_size:
            raise ApiError(
                400, "too_many_answers", f"{count} answers requested, but the queue has {self.engine.queue_size} places"
            )
        version = None if body.model == self.base else self.engine.adapters.acquire(body.model, count)
        try:
            ids, ends = self.prompt_ids(body, version)
            if body.scored is not None:
                _ = self.names
            return [
                self._job(
                    body, ids[number // body.choices], number % body.choices, ends, partial(emit, number), version
                )
                for number in range(count)
            ]
        except BaseException:
            if version is not None:
                self.engine.adapters.release(version, count)
            raise

    # ---- prompts ---------------------------------------------------------------------------------

    def prompt_ids(self, body: Sampled, version: Version | None) -> tuple[list[list[int]], frozenset[int]]:
        """Return the token ids of a request's prompts, and the tokens that end the answers.

        Args:
            body: The request.
            version: The adapter, or None for the base.

        Raises:
            ApiError: 400 if a prompt cannot be encoded.
        """
        with self._one_at_a_time:
            prompter = self._prompter(None if version is None else version.prompt)
            try:
                if isinstance(body, ChatRequest):
                    found = [self._chat_ids(body, prompter)]
                else:
                    found = [self._ids_of(prompt, prompter) for prompt in body.prompts]
            except UnicodeError:
                raise ApiError(400, "invalid_prompt", "the text contains half of a surrogate pair") from None
        if not found or not all(found):
            raise ApiError(400, "empty_prompt", "the prompt has no tokens")
        return found, prompter.ends

    def _prompter(self, recorded: PromptFormat | None) -> Prompter:
        """The maker of prompts for a recorded format. Adapters of one format share it."""
        if recorded not in self._prompters:
            if len(self._prompters) >= PROMPTERS:
                self._prompters.pop(next(iter(self._prompters)))
            info = None if recorded is None else {KEY: recorded.to_dict()}
            self._prompters[recorded] = Prompter(self._encoding, info, self.engine.batch.model.generation_config)
        return self._prompters[recorded]

    def log_templates(self) -> None:
        """Log the adapters that were trained with another chat template than the base's own, which they use."""
        with self._one_at_a_time:
            formats = self.engine.adapters.prompts
            others = [name for name, found in formats.items() if self._prompter(found).replaces_template]
        if others:
            logger.info("chats use the template of the training, not the base's own, with %s", some(others))

    @staticmethod
    def _chat_ids(body: ChatRequest, prompter: Prompter) -> list[int]:
        messages = [message.to_dict() for message in body.messages]
        for message in messages:
            "".join(message.values()).encode()  # raises UnicodeError, while tokenizers raise various errors
        try:
            return prompter.encode(messages)
        except ValueError as error:
            raise ApiError(400, "invalid_messages", str(error)) from None

    def _ids_of(self, prompt: str | list[int], prompter: Prompter) -> list[int]:
        if isinstance(prompt, list):
            if any(token >= self.vocabulary for token in prompt):
                raise ApiError(400, "invalid_prompt", f"prompt: tokens must be below {self.vocabulary}")
            return prompt
        prompt.encode()
        return prompter.encode_text(prompt)

    # ---- jobs ------------------------------------------------------------------------------------

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

    def _job(
        self,
        body: Sampled,
        ids: list[int],
        choice: int,
        ends: frozenset[int],
        emit: Callable[[Event], None],
        version: Version | None,
    ) -> Job:
        length, text = self.answer_length(body, len(ids)), TextStream(self._decoding, body.stops)
        return Job(ids, length, self._sampler(body, choice), text, ends, emit, version, body.scored)

    def _sampler(self, body: Sampled, choice: int) -> Sampler:
        unknown = [token for token in body.biases if token >= self.vocabulary]
        if unknown:
            raise ApiError(400, "invalid_request", f"logit_bias: tokens must be below {self.vocabulary}")
        return Sampler(
            _or(body.temperature, 1.0),
            _or(body.top_p, 1.0),
            seed_of(body.seed, choice),
            top_k=max(0, body.top_k or 0),
            min_p=_or(body.min_p, 0.0),
            repetition_penalty=_or(body.repetition_penalty, 1.0),
            presence_penalty=_or(body.presence_penalty, 0.0),
            frequency_penalty=_or(body.frequency_penalty, 0.0),
            logit_bias=body.biases,
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def seed_of(seed: int | None, choice: int) -> int | None:
    """Return the seed of one of the answers to a request. The first answer has the seed of the request.

    Args:
        seed: The seed of the request, or None.
        choice: Number of the answer.
    """
    if seed is None or choice == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {choice}".encode()).digest()[:8], "little") >> 1


class Answer:
    """The events of the jobs of a request on the event loop, including the client's disconnection and the timeout.

    It must be closed. The jobs then leave the queue or the batch, if they are still there.

    Args:
        service: The service.
        request: The HTTP request.
        record: The record of the request, which gets the token counts when the answer is closed.
        arrived: The event loop's time at the arrival of the request.
    """

    def __init__(self, service: Service, request: Request, record: Record, arrived: float) -> None:
        self.service, self.record, self.arrived = service, record, arrived
        self.jobs: list[Job] = []
        self._choices = 1
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()
        self._open: set[int] = set()  # numbers of the answers that have not ended
        self._timer = self._loop.call_at(
            arrived + service.limits.timeout, self._events.put_nowait, (0, self._too_late())
        )
        self._watch = self._loop.create_task(self._watch_client(request))

    def start(self, jobs: list[Job], choices: int) -> None:
        """Queue the jobs, which emit to :meth:`emit`.

        Args:
            jobs: The jobs.
            choices: Number of answers for each prompt.

        Raises:
            ApiError: The jobs are refused.
        """
        self.service.engine.submit(jobs)
        self.jobs, self._choices, self._open = jobs, choices, set(range(len(jobs)))

    def emit(self, number: int, event: Event) -> None:
        """Take an event of a job from the engine's thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

    @property
    def ended(self) -> bool:
        """Whether all answers have ended."""
        return not self._open

    def _too_late(self) -> Event:
        seconds = self.service.limits.timeout
        return Event(error=ApiError(504, "timeout", f"the answer took more than {seconds:g} seconds"))

    async def _watch_client(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield all events with the numbers of their answers. Raises the ApiError of an event, or Disconnected."""
        first = True
        while self._open:
            found = await self._events.get()
            if found is None:
                raise Disconnected
            number, event = found
            if event.error is not None:
                self._open.clear()
                raise event.error
            if event.last:
                self._open.discard(number)
            if first and self.service.engine.metrics:
                self.service.engine.metrics.first_token.observe(self._loop.time() - self.arrived)
            first = False
            yield number, event

    def close(self) -> None:
        """Stop waiting for events, cancel the jobs, and note the token counts."""
        self._timer.cancel()
        self._watch.cancel()
        for job in self.jobs:
            self.service.engine.cancel(job)
        usage = self.usage
        self.record.prompt_tokens, self.record.generated_tokens = usage["prompt_tokens"], usage["completion_tokens"]

    @property
    def usage(self) -> dict[str, int]:
        """The token counts in the format of OpenAI's API. A prompt with several answers counts once."""
        prompt = sum(len(job.prompt) for job in self.jobs[:: self._choices])
        generated = sum(len(job.tokens) for job in self.jobs)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
