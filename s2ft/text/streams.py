"""Convert tokens to text piece by piece, and stop at stop strings."""

from collections.abc import Sequence

BROKEN = "\N{REPLACEMENT CHARACTER}"
WINDOW = 16  # approximate number of tokens that are decoded again for each new token
CONTEXT = 4  # tokens kept before a new one, since some tokenizers omit the space of a first token


class Detokenizer:
    """Decodes a growing sequence of tokens. A character of several tokens is returned when it is complete.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that were returned

    def push(self, token: int) -> str:
        """Return the text that a token adds. It is empty if the token ends inside a character."""
        self._window.append(token)
        text = self._decode()
        complete = len(text)
        while complete > max(0, len(text) - 3) and text[complete - 1] == BROKEN:  # the next token may complete it
            complete -= 1
        new = text[self._sent : complete]
        self._sent = max(self._sent, complete)
        if complete == len(text) and len(self._window) > WINDOW:
            self._window = self._window[-CONTEXT:]
            self._sent = len(self._decode())
        return new

    def flush(self) -> str:
        """Return the rest of the text, with a replacement character for an incomplete one."""
        text = self._decode()
        new, self._sent = text[self._sent :], len(text)
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """Text up to the first stop string. Text that may become part of a stop string is held back.

    Args:
        tokenizer: The model's tokenizer.
        stop: Strings that end the text. They are not returned.

    Attributes:
        stopped: Whether a stop string was found.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = ()) -> None:
        self._detokenizer, self._stop = Detokenizer(tokenizer), tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Return the text that can be shown after a token."""
        return self._pass_on(self._detokenizer.push(token))

    def flush(self) -> str:
        """Return the text that was held back, after the last token."""
        if self.stopped:
            return ""
        text = self._pass_on(self._detokenizer.flush())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _pass_on(self, text: str) -> str:
        text = self._held + text
        found = [place for place in map(text.find, self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        hold = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
