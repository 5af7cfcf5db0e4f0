"""A template of Ollama, in the language of Go's text/template, made from a chat template of transformers.

The chat template is rendered with marks in place of the texts. What stands between the marks are the pieces that a
template consists of. A template of the pieces is written only if it renders test conversations as the chat template
does, so that it does not matter of which family the model is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

MARKS = {"system": "SYSTEMMARK", "user": "USERMARK", "assistant": "ANSWERMARK"}
Message = dict[str, str]
Render = Callable[[list[Message], bool], str]  # of messages, and whether the assistant's answer follows


class NotWritten(ValueError):
    """The chat template does something that the pieces can't express. The message says what."""


@dataclass(frozen=True)
class Pieces:
    """What stands around the texts of a conversation.

    Attributes:
        start: Before the first user's text if there is no system prompt.
        system: Before and after the system prompt, up to the first user's text; or None.
        system_in_last: Before and after the system prompt, if it stands in the turn of the last user; or None.
        user: Before and after the text of a user; before it is not used for the first one.
        assistant: Before and after an answer.
        answer: What follows the last user's turn where the model is to answer.
    """

    start: str
    system: tuple[str, str] | None
    system_in_last: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str

    def render(self, messages: Sequence[Message]) -> str:
        """Render a conversation that ends with a user's turn, as the Go template does."""
        system = next((message["content"] for message in messages if message["role"] == "system"), "")
        turns = [message for message in messages if message["role"] != "system"]
        text = f"{self.system[0]}{system}{self.system[1]}" if system and self.system else self.start
        for number, turn in enumerate(turns):
            before, after = self.user if turn["role"] == "user" else self.assistant
            inside = ""
            if system and self.system_in_last and number == len(turns) - 1:
                inside = f"{self.system_in_last[0]}{system}{self.system_in_last[1]}"
            text += ("" if number == 0 else before) + inside + turn["content"] + after
        return text + self.answer

    def to_go(self) -> str:
        """Return the template of Ollama."""
        start = _go(self.start)
        if self.system:
            before, after = map(_go, self.system)
            start = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{start}{{{{ end }}}}"
        inside = ""
        if self.system_in_last:
            before, after = map(_go, self.system_in_last)
            inside = f"{{{{ if and $last $.System }}}}{before}{{{{ $.System }}}}{after}{{{{ end }}}}"
        user, user_end, assistant, assistant_end = map(_go, (*self.user, *self.assistant))
        return (
            "{{ $first := true }}" + start + "{{ range $i, $_ := .Messages }}"
            "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            '{{ if eq .Role "user" }}'
            f"{{{{ if not $first }}}}{user}{{{{ end }}}}{inside}{{{{ .Content }}}}{user_end}"
            f"{{{{ if $last }}}}{_go(self.answer)}{{{{ end }}}}{{{{ $first = false }}}}"
            '{{ else if eq .Role "assistant" }}'
            f"{assistant}{{{{ .Content }}}}{{{{ if not $last }}}}{assistant_end}{{{{ end }}}}{{{{ $first = false }}}}"
            "{{ end }}{{ end }}"
        )


def pieces_of(render: Render) -> Pieces:
    """Find the pieces of a chat template and check them.

    Args:
        render: The chat template: a function of the messages, and of whether the answer of the model follows.

    Returns:
        The pieces, which render conversations with and without a system prompt as the template does.

    Raises:
        NotWritten: The template does something else.
    """
    user, answer, system = ({"role": role, "content": MARKS[role]} for role in ("user", "assistant", "system"))
    start, user_end = _split(render([user], False), "user")
    asked = render([user], True)
    first, between, middle, last = _split(render([user, answer, user], False), "user", "assistant", "user")
    assistant_end = _split(render([user, answer], False), "user", "assistant")[2]
    if not between.startswith(user_end):
        # The end of the conversation is no end of a turn, as where nothing follows the user's text before an answer.
        user_end = ""
    assistant = between[len(user_end) :]
    if not middle.startswith(assistant_end):
        raise NotWritten("what follows an answer depends on what comes after it")
    before = middle[len(assistant_end) :]
    if not asked.startswith(start + MARKS["user"] + user_end):
        raise NotWritten("a question is written in another way if the answer follows")
    follows = asked[len(start + MARKS["user"] + user_end) :]
    found = Pieces(start, None, None, (before, user_end), (assistant, assistant_end), follows)
    found = _with_system(found, render, system, user, answer)
    _check(found, render)
    return found


def _with_system(pieces: Pieces, render: Render, system: Message, user: Message, answer: Message) -> Pieces:
    """Add where the system prompt stands: at the start, or in the turn of the last user."""
    try:
        text = render([system, user, answer, user], True)
    except Exception:  # the template refuses a system prompt
        return pieces
    at, first = text.find(MARKS["system"]), text.find(MARKS["user"])
    if at < 0:
        return pieces
    values = {**pieces.__dict__}
    if at < first:
        values["system"] = (text[:at], text[at + len(MARKS["system"]) : first])
    else:
        rest = text[text.index(MARKS["assistant"]) + len(MARKS["assistant"]) :]
        inner, after, _ = _split(rest, "system", "user")
        values["system_in_last"] = (inner.removeprefix(pieces.assistant[1] + pieces.user[0]), after)
    return Pieces(**values)


def _split(text: str, *roles: str) -> list[str]:
    """Split a text at the marks of the roles, in this order."""
    found = []
    for role in roles:
        before, mark, text = text.partition(MARKS[role])
        if not mark:
            raise NotWritten(f"the text of the {role} is changed or left out")
        found.append(before)
    return [*found, text]


def _check(pieces: Pieces, render: Render) -> None:
    """Compare with the chat template on conversations of one to three turns, with and without a system prompt."""
    turns = [
        {"role": role, "content": content}
        for role, content in (
            ("user", "Is 2 + 3 = 5?"),
            ("assistant", "Yes, it is.\n\nBoth sides are 5."),
            ("user", "And {{ 2 }} × 3?"),
            ("assistant", "<b>6</b>"),
            ("user", "Thanks"),
        )
    ]
    system = [{"role": "system", "content": "Answer briefly."}] if pieces.system or pieces.system_in_last else []
    for before in ([], system):
        for length in (1, 3, 5):
            messages = [*before, *turns[:length]]
            if pieces.render(messages) != render(messages, True):
                raise NotWritten(f"it renders {len(messages)} messages unlike the turns of which they consist")


def _go(text: str) -> str:
    """Write a text so that Go's template prints it."""
    return text.replace("{{", '{{ "{{" }}')
