"""Examples for scoring: a conversation or a text, and the answer that a model should give."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from s2ft.text.data import DataOptions, load_rows
from s2ft.text.data.forms import check_unicode as check_unicode
from s2ft.text.prompts import PromptFormat
from s2ft.text.templates import plain_text


@dataclass(frozen=True)
class Example:
    """A prompt and the answer to it.

    Attributes:
        conversation: Messages with the keys "role" and "content", of which the last one is not the assistant's. Or a
            text.
        output: The answer of the data.
        answer: The short answer that is scored. None takes it from `output`.
        tools: Schemas of the tools that the assistant can call, or None.
    """

    conversation: tuple[dict[str, Any], ...] | str
    output: str
    answer: str | None = None
    tools: list | None = None

    @property
    def question(self) -> str:
        """The last message before the answer, or the text."""
        return self.conversation if isinstance(self.conversation, str) else plain_text(self.conversation[-1])

    def prompt_for(self, prompt: PromptFormat) -> list[dict[str, Any]] | str:
        """Return what :func:`s2ft.text.prompts.encode_prompt` encodes.

        Args:
            prompt: The format of prompts. In form "chat" a text becomes a message of the user.
        """
        if isinstance(self.conversation, str):
            if prompt.form == "text":
                return self.conversation
            return prompt.conversation([{"role": "user", "content": self.conversation}])
        return prompt.conversation(self.conversation)


def examples_of(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """Convert normalised rows to examples. The last answer of a chat is the output.

    Args:
        rows: Rows as :func:`s2ft.text.data.load_rows` returns them.

    Raises:
        ValueError: A row has neither a question nor a prompt.
    """
    for row in rows:
        scored = (row.get("answer"), row.get("tools"))
        if row.get("text") is not None:
            raise ValueError(f"{row.get('place', 'a row')}: a row with only 'text' has no question to answer")
        if isinstance(row.get("prompt"), str):
            yield Example(row["prompt"], row["completion"], *scored)
            continue
        messages = row.get("messages") or [*row["prompt"], *row["completion"]]
        yield Example(tuple(messages[:-1]), plain_text(messages[-1]), *scored)


def read_examples(data: DataOptions | str | Iterable[str], limit: int | None = None) -> list[Example]:
    """Read examples from files or data sets.

    Args:
        data: The options of the data, or the name of a file or of several.
        limit: Read the first rows only.

    Returns:
        The examples in the order of the rows.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A row cannot be used. The message names the file, the row or line, and the problem.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("data.jsonl").write_text('{"instruction": "2+3=", "output": "The answer is 5."}')
        >>> (example,) = s2ft.text.examples.read_examples("data.jsonl")
        >>> example.question, example.output
        ('2+3=', 'The answer is 5.')
    """
    if not isinstance(data, DataOptions):
        data = DataOptions(data=[data] if isinstance(data, str) else [str(file) for file in data])
    return list(examples_of(load_rows(data, limit=limit, scored=True)))
