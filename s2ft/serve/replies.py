"""Answers in the format of OpenAI's API, complete or in chunks."""

import json
import secrets
import time
from collections.abc import Iterator

DONE = "data: [DONE]\n\n"


def server_sent_event(event: dict) -> str:
    """Format an object as a server-sent event."""
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


class CompletionReply:
    """The answers of /v1/completions.

    Args:
        model: The model's name in the request.
        with_usage: Whether a stream ends with the token counts.
    """

    answer_type = chunk_type = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, with_usage: bool = False) -> None:
        self.model, self.with_usage = model, with_usage
        self.id, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())

    def answer(self, text: str, finish: str, usage: dict) -> dict:
        """Return a complete answer."""
        return {**self._head(self.answer_type), "choices": [self._choice(text, finish)], "usage": usage}

    def opening(self) -> Iterator[dict]:
        """Yield the chunks before the first text."""
        yield from ()

    def chunk(self, text: str, finish: str | None) -> dict:
        """Return a chunk of a stream. If the stream ends with the token counts, each chunk has the field `usage`."""
        return {
            **self._head(self.chunk_type),
            "choices": [self._chunk_choice(text, finish)],
            **({"usage": None} if self.with_usage else {}),
        }

    def closing(self, usage: dict) -> Iterator[dict]:
        """Yield the chunks after the last text."""
        if self.with_usage:
            yield {**self._head(self.chunk_type), "choices": [], "usage": usage}

    def _head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, text: str, finish: str | None) -> dict:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}

    _chunk_choice = _choice


class ChatReply(CompletionReply):
    """The answers of /v1/chat/completions."""

    answer_type, chunk_type = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def opening(self) -> Iterator[dict]:
        """Yield the chunk with the role."""
        first = self.chunk("", None)
        first["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        yield first

    def _choice(self, text: str, finish: str | None) -> dict:
        return {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": finish,
        }

    def _chunk_choice(self, text: str, finish: str | None) -> dict:
        return {"index": 0, "delta": {"content": text} if text else {}, "logprobs": None, "finish_reason": finish}
