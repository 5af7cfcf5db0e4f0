"""From tokens to text, piece by piece, and the strings that end it."""

from collections.abc import Sequence

BROKEN = "\N{REPLACEMENT CHARACTER}"
WINDOW = 16  # tokens decoded again for every new one, about
CONTEXT = 4  # of them at least before the new one: some tokenizers write a first token without its space


class Detokenizer:
    """Text of a growing sequence of tokens. A character of several tokens comes when it is whole."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text

    def push(self, token: int) -> str:
        """What the token adds to the text."""
        self._window.append(token)
        text = self._decode()
        whole = len(text)
        while whole > 0 and whole > len(text) - 3 and text[whole - 1] == BROKEN:  # it may yet become a character
            whole -= 1
        new = text[self._sent : whole]
        self._sent = max(self._sent, whole)
        if whole == len(text) and len(self._window) > WINDOW:
            self._window = self._window[-CONTEXT:]
            self._sent = len(self._decode())
        return new

    def flush(self) -> str:
        """The rest, whole or not."""
        text = self._decode()
        new, self._sent = text[self._sent :], len(text)
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """What a client may see: text up to the first of the stop strings, and nothing that may become part of one."""

    def __init__(self, tokenizer, stop: Sequence[str] = ()) -> None:
        self._detokenizer, self._stop = Detokenizer(tokenizer), tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        return self._pass_on(self._detokenizer.push(token))

    def flush(self) -> str:
        """What was held back, once no more tokens come."""
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
    """Length of the longest beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
