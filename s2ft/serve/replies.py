"""Answers in the shapes that OpenAI's API gives them, whole or in chunks."""

import json
import secrets
import time
from collections.abc import Iterator

DONE = "data: [DONE]\n\n"


def sent(event: dict) -> str:
    """As a server-sent event."""
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


class CompletionReply:
    """What /v1/completions answers."""

    whole = part = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, with_usage: bool = False) -> None:
        self.model, self.with_usage = model, with_usage
        self.id, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())

    def answer(self, text: str, finish: str, usage: dict) -> dict:
        return {**self._head(self.whole), "choices": [self._choice(text, finish)], "usage": usage}

    def opening(self) -> Iterator[dict]:
        yield from ()

    def chunk(self, text: str, finish: str | None) -> dict:
        # where usage comes at the end, every chunk has the field
        return {
            **self._head(self.part),
            "choices": [self._chunk_choice(text, finish)],
            **({"usage": None} if self.with_usage else {}),
        }

    def closing(self, usage: dict) -> Iterator[dict]:
        if self.with_usage:
            yield {**self._head(self.part), "choices": [], "usage": usage}

    def _head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, text: str, finish: str | None) -> dict:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}

    _chunk_choice = _choice


class ChatReply(CompletionReply):
    """What /v1/chat/completions answers."""

    whole, part = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def opening(self) -> Iterator[dict]:
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
