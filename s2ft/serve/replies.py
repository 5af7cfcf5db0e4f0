"""Answers in the format of OpenAI's API, complete or in chunks."""

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from s2ft.serve.job import Event
from s2ft.text.sampling import Score
from s2ft.text.streams import TokenNames

DONE = "data: [DONE]\n\n"
LOWEST = -9999.0  # in place of minus infinity, which JSON does not have


def server_sent_event(event: dict) -> str:
    """Format an object as a server-sent event."""
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


@dataclass
class Choice:
    """One answer of a request, or the part of it that a chunk has.

    Attributes:
        index: Number of the answer in the request.
        text: The text.
        finish: "stop" or "length" at the end, else None.
        scores: The log probabilities of the tokens, if they were requested.
        offset: Characters of the tokens before this part.
    """

    index: int
    text: str = ""
    finish: str | None = None
    scores: list[Score] = field(default_factory=list)
    offset: int = 0

    def add(self, event: Event) -> None:
        """Add the news of an event."""
        self.text, self.finish = self.text + event.text, event.finish
        if event.score is not None:
            self.scores.append(event.score)


class CompletionReply:
    """The answers of /v1/completions.

    Args:
        model: The model's name in the request.
        names: Texts of the tokens.
        with_usage: Whether a stream ends with the token counts.
        with_logprobs: Whether the answers have log probabilities.
    """

    answer_type = chunk_type = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, names: TokenNames, with_usage: bool = False, with_logprobs: bool = False) -> None:
        self.model, self.names, self.with_usage, self.with_logprobs = model, names, with_usage, with_logprobs
        self.id, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self._offsets: dict[int, int] = {}  # characters of the tokens that were sent, by choice

    def answer(self, choices: Sequence[Choice], usage: dict) -> dict:
        """Return a complete answer."""
        return {**self._head(self.answer_type), "choices": [self._choice(choice) for choice in choices], "usage": usage}

    def opening(self, count: int) -> Iterator[dict]:
        """Yield the chunks before the first text of so many choices."""
        yield from ()

    def chunk(self, index: int, event: Event) -> dict | None:
        """Return the chunk of an event, or None if it has no news.

        If the stream ends with the token counts, each chunk has the field `usage`.
        """
        choice = Choice(index, offset=self._offsets.get(index, 0))
        choice.add(event)
        if not (choice.text or choice.scores or choice.finish):
            return None
        self._offsets[index] = choice.offset + sum(len(self.names.text(score.token)) for score in choice.scores)
        return self._chunk(self._chunk_choice(choice))

    def closing(self, usage: dict) -> Iterator[dict]:
        """Yield the chunks after the last text."""
        if self.with_usage:
            yield {**self._head(self.chunk_type), "choices": [], "usage": usage}

    def _chunk(self, choice: dict) -> dict:
        return {**self._head(self.chunk_type), "choices": [choice], **({"usage": None} if self.with_usage else {})}

    def _head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, choice: Choice) -> dict:
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": self._logprobs(choice) if self.with_logprobs else None,
            "finish_reason": choice.finish,
        }

    _chunk_choice = _choice

    def _logprobs(self, choice: Choice) -> dict:
        offsets = [choice.offset]
        for score in choice.scores:
            offsets.append(offsets[-1] + len(self.names.text(score.token)))
        return {
            "tokens": [self.names.key(score.token) for score in choice.scores],
            "token_logprobs": [_finite(score.logprob) for score in choice.scores],
            "top_logprobs": [self._top(score) for score in choice.scores],
            "text_offset": offsets[:-1],
        }

    def _top(self, score: Score) -> dict[str, float]:
        """The likeliest tokens and the chosen one. Of several tokens with the same text the likeliest counts."""
        found: dict[str, float] = {}
        for token, logprob in (*score.top, (score.token, score.logprob)):
            found.setdefault(self.names.key(token), _finite(logprob))
        return found


class ChatReply(CompletionReply):
    """The answers of /v1/chat/completions."""

    answer_type, chunk_type = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def opening(self, count: int) -> Iterator[dict]:
        """Yield the chunk with the role for each choice."""
        for index in range(count):
            delta = {"role": "assistant", "content": ""}
            yield self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def _choice(self, choice: Choice) -> dict:
        return self._with(choice, "message", {"role": "assistant", "content": choice.text, "refusal": None})

    def _chunk_choice(self, choice: Choice) -> dict:
        return self._with(choice, "delta", {"content": choice.text} if choice.text else {})

    def _with(self, choice: Choice, key: str, value: dict) -> dict:
        return {
            "index": choice.index,
            key: value,
            "logprobs": self._logprobs(choice) if self.with_logprobs and (choice.scores or key == "message") else None,
            "finish_reason": choice.finish,
        }

    def _logprobs(self, choice: Choice) -> dict:
        content = [
            {
                **self._named(score.token, score.logprob),
                "top_logprobs": [self._named(token, logprob) for token, logprob in score.top],
            }
            for score in choice.scores
        ]
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float) -> dict:
        return {"token": self.names.text(token), "logprob": _finite(logprob), "bytes": list(self.names.bytes(token))}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
