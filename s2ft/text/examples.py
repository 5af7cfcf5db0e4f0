"""Read training and test data from JSON or JSON Lines files of instructions, prompts or chats."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}  # the first bytes of a file, and the format that they mark
SHAPES = "'instruction' and 'output' (and 'input'), 'prompt' and 'completion', or 'messages'"


@dataclass(frozen=True)
class Example:
    """A conversation and the answer to it.

    Attributes:
        conversation: Messages with the keys "role" and "content". The last one is not the assistant's.
        output: The answer that is trained on.
        answer: The short answer that is scored. None takes it from `output`.
    """

    conversation: tuple[dict[str, str], ...]
    output: str
    answer: str | None = None

    @property
    def question(self) -> str:
        """The last message before the answer."""
        return self.conversation[-1]["content"]


def read_examples(files: str | Path | Iterable[str | Path]) -> list[Example]:
    """Read all examples of one or more files.

    Args:
        files: A path or several paths. Each file is a JSON list or has one JSON object on each line.

    Returns:
        The examples in the order of the files and rows.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A row cannot be used. The message names the file, the row or line, and the problem.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("data.jsonl").write_text('{"instruction": "2+3=", "output": "The answer is 5."}')
        >>> s2ft.text.examples.read_examples("data.jsonl")
        [Example(conversation=({'role': 'user', 'content': '2+3='},), output='The answer is 5.', answer=None)]
    """
    if isinstance(files, (str, Path)):
        files = [files]
    examples = []
    for file in map(Path, files):
        rows = read_rows(file)
        examples += [example_from(row, f"{file}, {place}") for place, row in rows]
    if not examples:
        raise ValueError("no data file was given")
    return examples


def read_rows(file: Path) -> list[tuple[str, object]]:
    """Read the rows of a file, each with its place ("line 3") for error messages."""
    if not file.exists():
        raise FileNotFoundError(f"data file {file} doesn't exist")
    if not file.is_file():
        raise ValueError(f"data file {file} is not a file")
    content = file.read_bytes()
    kind = next((kind for start, kind in COMPRESSED.items() if content.startswith(start)), None)
    if kind is not None:
        raise ValueError(f"{file} is compressed ({kind}): unpack it and give the JSON file that it contains")
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"{file} is empty")
    rows = _json_list(file, text) if text.lstrip().startswith("[") else _json_lines(file, text)
    if not rows:
        raise ValueError(f"{file} has no rows")
    return rows


def _json_list(file: Path, text: str) -> list[tuple[str, object]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}: not JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{file}, row {_row_that_fails(text)}: {_why_not_read(error)}") from None
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _row_that_fails(text: str) -> int:
    """Return the number of the first row, from 1, of a JSON list that Python cannot read."""
    decoder, at, row = json.JSONDecoder(), text.index("[") + 1, 1
    while True:
        while text[at].isspace() or text[at] == ",":
            at += 1
        try:
            _, at = decoder.raw_decode(text, at)
        except (RecursionError, ValueError):
            return row
        row += 1


def _why_not_read(error: Exception) -> str:
    """Explain why Python refuses well-formed JSON: the nesting is too deep, or a number is too long."""
    return "it is nested too deeply" if isinstance(error, RecursionError) else f"a number is too long ({error})"


def _json_lines(file: Path, text: str) -> list[tuple[str, object]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would split JSON strings at U+2028
        if line.strip():
            try:
                rows.append((f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not JSON: {error.msg}") from None
            except (RecursionError, ValueError) as error:
                raise ValueError(f"{file}, line {number}: {_why_not_read(error)}") from None
    return rows


def example_from(row: object, place: str) -> Example:
    """Convert one row to an Example. A ValueError begins with `place`."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object with {SHAPES}, got {type(row).__name__}")
    answer = _answer(row, place)
    if "messages" in row:
        *conversation, last = _messages(row["messages"], place)
        return Example(tuple(conversation), last["content"], answer)
    prompt, target = ("prompt", "completion") if "prompt" in row else ("instruction", "output")
    missing = [name for name in (prompt, target) if name not in row]
    if len(missing) == 2:
        raise ValueError(f"{place}: needs {SHAPES}; it has {', '.join(map(repr, row)) or 'nothing'}")
    if missing:
        raise ValueError(f"{place}: field {missing[0]!r} is missing")
    question, output = _text(row, prompt, place), _text(row, target, place)
    if prompt == "instruction" and row.get("input") is not None and _text(row, "input", place, may_be_empty=True):
        question = f"{question}\n\n{row['input']}"
    return Example(({"role": "user", "content": question},), output, answer)


def _text(row: dict, name: str, place: str, may_be_empty: bool = False) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{place}: field {name!r} must be text, got {type(value).__name__}")
    if not value.strip() and not may_be_empty:
        raise ValueError(f"{place}: field {name!r} is empty")
    check_unicode(value, f"{place}: field {name!r}")
    return value


def check_unicode(text: str, name: str) -> None:
    """Check that text is valid Unicode, since tokenizers fail on half of a surrogate pair.

    Args:
        text: The text to check.
        name: What the text is, such as "prompt". The error message begins with it.

    Raises:
        ValueError: The text contains half of a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not valid Unicode: character {error.start + 1} is {ascii(text[error.start])}, half "
            "of a surrogate pair"
        ) from None


def _answer(row: dict, place: str) -> str | None:
    value = row.get("answer")
    if value is None:
        return None
    if isinstance(value, str):
        check_unicode(value, f"{place}: field 'answer'")
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    raise ValueError(f"{place}: field 'answer' must be text or a number, got {type(value).__name__}")


def _messages(messages: object, place: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"{place}: field 'messages' must be a list of at least two messages")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{place}: every message needs the fields 'role' and 'content'")
        for name in ("role", "content"):
            _text(message, name, place)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{place}: the last message must be the assistant's, it is the {messages[-1]['role']}'s")
    if messages[-2]["role"] == "assistant":
        raise ValueError(f"{place}: the message before the last must not be the assistant's")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
