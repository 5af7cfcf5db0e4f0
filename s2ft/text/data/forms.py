"""The forms of rows. A new form is one function and one row of the table `FORMS`.

Each function converts a row of the data to a normalised row with one of these contents:

- `messages`: a chat that ends with an answer of the assistant,
- `prompt` and `completion`: both text, or both lists of messages,
- `text`: plain text.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

Row = Mapping[str, Any]
Convert = Callable[[Row, bool], dict[str, Any]]  # takes a row, and whether it is for evaluation
ROLES = {  # names of roles in ShareGPT data, and the roles of chat templates
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
}
OF_A_MESSAGE = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")  # fields that templates may use


class BadRow(ValueError):
    """A row cannot be used. The message names the field."""


# ---- parts of rows -------------------------------------------------------------------------------------


def fields_of(row: object, renamed: Mapping[str, str], needs: str) -> dict[str, Any]:
    """Return the fields of a row by our names.

    Args:
        row: The row.
        renamed: Our name of a field, by its name in the data.
        needs: What a row has, for the message.

    Raises:
        BadRow: The row is no object, or has none of the renamed fields.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object with {needs}, got {type(row).__name__}")
    if renamed and not any(name in row for name in renamed):
        raise BadRow(f"has no field {next(iter(renamed))!r}, which field names; it has {listed(row)}")
    found = {name: value for name, value in row.items() if name not in renamed}
    return found | {renamed[name]: value for name, value in row.items() if name in renamed}


def listed(row: Row) -> str:
    """The names of a row's fields, for a message."""
    return ", ".join(map(repr, row)) or "nothing"


def with_system(row: Row, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the field `system` of a row in front of its messages, unless they have a system message."""
    system = text(row, "system", may_be_empty=True) if row.get("system") is not None else ""
    if not system.strip() or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system}, *messages]


def question_of(row: Row, name: str) -> list[dict[str, Any]]:
    """Return a question as messages: the field `system`, and the question with the field `input` of an instruction."""
    question = text(row, name)
    if name == "instruction" and row.get("input") is not None and text(row, "input", may_be_empty=True).strip():
        question = f"{question}\n\n{row['input']}"
    return with_system(row, [{"role": "user", "content": question}])


def text(row: Row, name: str, may_be_empty: bool = False) -> str:
    """Return a field that must be text. A number is converted to text."""
    value = row[name]
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"field {name!r} must be text, got the number {value}")
    if isinstance(value, (bool, int, float)):
        value = json.dumps(value)
    if not isinstance(value, str):
        raise BadRow(f"field {name!r} must be text, got {type(value).__name__}")
    if not value.strip() and not may_be_empty:
        raise BadRow(f"field {name!r} is empty")
    check_unicode(value, f"field {name!r}")
    return value


def _parsed(value: object, name: str) -> object:
    """Return a value, or what its text says as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise BadRow(f"{name} can't be read as JSON") from None


# ---- forms ---------------------------------------------------------------------------------------------


def _conversation(field: str, row: Row, _scored: bool) -> dict[str, Any]:
    return {"messages": check_chat(with_system(row, read_messages(row[field], field)), field)}


def _prompt_completion(row: Row, scored: bool) -> dict[str, Any]:
    if {type(row["prompt"]), type(row["completion"])} == {str, list}:
        raise BadRow("fields 'prompt' and 'completion' must both be text or both be lists of messages")
    if not isinstance(row["prompt"], list):
        if row.get("system"):
            return _answered("prompt", "completion", row, scored)
        return {"prompt": text(row, "prompt", may_be_empty=True), "completion": _answer(row, "completion", scored)}
    prompt, completion = (read_messages(row[name], name) for name in ("prompt", "completion"))
    prompt = prompt and with_system(row, prompt)
    if not prompt:
        raise BadRow("field 'prompt' has no messages")
    answers = check_chat([*prompt, *completion], "completion")[len(prompt) :]
    if not answers:
        raise BadRow("field 'completion' has no message of the assistant")
    return {"prompt": prompt, "completion": answers}


def _answered(question: str, answer: str, row: Row, scored: bool) -> dict[str, Any]:
    """A form with a question and an answer, which become a chat."""
    return {"messages": [*question_of(row, question), {"role": "assistant", "content": _answer(row, answer, scored)}]}


def _answer(row: Row, name: str, scored: bool) -> str:
    """Return the text of the answer, which may be empty if only the field `answer` is scored."""
    return text(row, name, may_be_empty=scored and row.get("answer") is not None)


# The fields by which a form is recognised, and what converts it. The first form whose fields a row has counts.
# TRL's maybe_convert_to_chatml was tried for ShareGPT: it keeps the roles human and gpt, which no chat template knows.
FORMS: dict[tuple[str, ...], Convert] = {
    **{(name,): partial(_conversation, name) for name in ("messages", "conversations", "conversation")},
    ("prompt", "completion"): _prompt_completion,
    **{
        (question, answer): partial(_answered, question, answer)
        for question, answer in (
            ("instruction", "output"),
            ("instruction", "response"),
            ("prompt", "response"),
            ("question", "response"),
            ("question", "answer"),
        )
    },
    ("text",): lambda row, _scored: {"text": text(row, "text")},
}
OPTIONAL = ("input", "system", "answer", "tools", "chosen", "rejected")
FIELDS = tuple(dict.fromkeys([*(name for needs in FORMS for name in needs), *OPTIONAL]))
KNOWN = "messages, conversations, prompt and completion, instruction and output, question and answer, or text"


def normalised(row: object, renamed: Mapping[str, str], scored: bool = False) -> dict[str, Any]:
    """Convert a row of the data to a normalised row.

    Args:
        row: The row.
        renamed: Our name of a field, by its name in the data.
        scored: Whether the row is for evaluation. The output may then be empty if the row has a field `answer`.

    Returns:
        The contents described at the top of this module, and `answer` and `tools` if the row has them.

    Raises:
        BadRow: The row cannot be used.

    Example:
        >>> from s2ft.text.data.forms import normalised
        >>> normalised({"question": "2+3=", "answer": 5}, {})["messages"][1]
        {'role': 'assistant', 'content': '5'}
    """
    found = fields_of(row, renamed, KNOWN)
    if seen := next(filter(found.get, ("image", "images", "audio", "video", "videos")), None):
        raise BadRow(f"field {seen!r}: this command trains on text only; leave the field out to train without it")
    present = {name for name, value in found.items() if value is not None}
    fitting = [needs for needs in FORMS if present.issuperset(needs)]
    fitting.sort(key=lambda needs: not set(needs) & set(renamed.values()))  # a form that the user names comes first
    if not fitting:
        raise BadRow(_why_no_form(found, present))
    result = FORMS[fitting[0]](found, scored)
    if fitting[0] != ("question", "answer") and "answer" in present and found["answer"] != "":
        answer = found["answer"]  # AQuA's is a list of one letter
        short = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
        result["answer"] = text({"answer": short}, "answer", may_be_empty=True)
    if found.get("tools"):
        result["tools"] = tools_of(found)
    return result


def _why_no_form(row: Row, present: set[str]) -> str:
    """Explain which field is missing from the first form that the row has a part of."""
    for needs in FORMS:
        missing = [name for name in needs if name not in present]
        if len(missing) < len(needs):
            return f"field {missing[0]!r} is {'null' if missing[0] in row else 'missing'}; it has {listed(row)}"
    return f"needs {KNOWN}; it has {listed(sorted(present))}; --field OURS=THEIRS maps other names"


def tools_of(row: Row) -> list:
    """Return the field `tools`: a list of objects, or its JSON."""
    value = _parsed(row["tools"], "field 'tools'")
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRow("field 'tools' must be a list of objects")
    return value


# ---- chats ---------------------------------------------------------------------------------------------


def read_messages(value: object, field: str) -> list[dict[str, Any]]:
    """Read a list of messages: role and content, or from and value."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(value, f"field {field!r}")
    if not isinstance(value, list):
        raise BadRow(f"field {field!r} must be a list of messages, got {type(value).__name__}")
    return [_message(message, f"{field}[{number}]") for number, message in enumerate(value)]


def _message(message: object, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRow(f"{place} must be an object with 'role' and 'content', got {type(message).__name__}")
    names = ("role", "content") if "role" in message else ("from", "value")
    if "role" not in message and "from" not in message:
        raise BadRow(f"{place} needs 'role' and 'content', or 'from' and 'value'; it has {listed(message)}")
    role = message[names[0]]
    if not isinstance(role, str) or not role.strip():
        raise BadRow(f"{place} has the role {role!r}")
    known = ROLES.get(role.strip().lower())
    if known is None and names[0] == "from":
        raise BadRow(f"{place} has the role {role!r}; known are {', '.join(ROLES)}")
    if message.get("weight") == 0 and known in ("assistant", "function_call"):
        raise BadRow(
            f"{place} has weight 0, which s2ft does not know: remove the field, and give --last-answer-only if the "
            "last answer alone counts"
        )
    calls = message.get("tool_calls")
    content = _content(message.get(names[1]), f"{place}.{names[1]}", may_be_null=bool(calls))
    result: dict[str, Any] = {"role": known or role.strip(), "content": content}
    if result["role"] == "function_call":
        result = {"role": "assistant", "content": ""}
        calls = _parsed(content, f"the function call in {place}")
        calls = calls if isinstance(calls, list) else [calls]
    if calls:
        result["tool_calls"] = [_tool_call(call, place) for call in calls]
    return result | {name: message[name] for name in OF_A_MESSAGE if message.get(name) is not None}


def _content(value: object, place: str, may_be_null: bool) -> str:
    """Return the text of a message. A list of text parts is joined, as chat templates do."""
    if value is None and may_be_null:
        return ""
    if isinstance(value, list):
        value = "".join(_part(part, f"{place}[{number}]") for number, part in enumerate(value))
    if not isinstance(value, str):
        raise BadRow(f"{place} must be text, got {'null' if value is None else type(value).__name__}")
    check_unicode(value, place)
    return value


def _part(part: object, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise BadRow(f"{place} must be a part of type 'text', got {kind!r}: this command trains on text only")


def _tool_call(call: object, place: str) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, which is what chat templates write as JSON."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(f"{place} has a tool call without a name")
    arguments = _parsed(function.get("arguments", {}), f"{place}: the arguments of {function['name']}")
    extra = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return extra | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def check_chat(messages: list[dict[str, Any]], field: str) -> list[dict[str, Any]]:
    """Check that a chat has an answer after a question, and leave out the messages after the last answer."""
    last = last_answer(messages)
    if last < 0:
        roles = ", ".join(sorted({message["role"] for message in messages}))
        raise BadRow(f"field {field!r} has no message of the assistant: its roles are {roles}")
    if not any(message["role"] != "system" for message in messages[:last]):
        raise BadRow(f"field {field!r} has no message before the assistant's")
    for number, message in enumerate((one for one in messages if one["role"] == "assistant"), 1):
        if not message["content"].strip() and not message.get("tool_calls"):
            raise BadRow(f"field {field!r}: the assistant's message {number} is empty")
    return messages[: last + 1]


def last_answer(messages: list[dict[str, Any]]) -> int:
    """Position of the assistant's last message, or -1."""
    return next((n for n in reversed(range(len(messages))) if messages[n]["role"] == "assistant"), -1)


def check_unicode(text: str, name: str) -> None:
    """Check that text is valid Unicode, since tokenizers fail on half of a surrogate pair.

    Args:
        text: The text to check.
        name: What the text is, such as "prompt". The error message begins with it.

    Raises:
        BadRow: The text contains half of a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{name} is not valid Unicode: character {error.start + 1} is {ascii(text[error.start])}, half "
            "of a surrogate pair"
        ) from None


# ---- preferences, and prompts whose answers are scored ---------------------------------------------------


CHATS = ("messages", "conversations", "conversation")  # fields that hold a chat
QUESTIONS = ("instruction", "question")  # fields that hold a question, which becomes a chat
ANSWERS_OF_PAIRS = ("chosen", "rejected")
ANSWERS = ("answer", "output", "completion", "response")  # fields that hold what is right, the first one counts
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
Chat = list[dict[str, Any]]


def _question(row: Row) -> tuple[str | Chat | None, str]:
    """Return what an answer answers, as text, as a chat, or None, and the field that has it."""
    for name in ("prompt", *CHATS, *QUESTIONS):
        if name in row:
            if name in QUESTIONS:
                return question_of(row, name), name
            if name != "prompt" or not isinstance(row[name], str):
                return with_system(row, read_messages(row[name], name)), name
            question = text(row, name, may_be_empty=True)
            return (with_system(row, _chat("user", question)) if row.get("system") else question), name
    return None, ""


def _chat(role: str, content: str) -> Chat:
    return [{"role": role, "content": content}]


# ---- pairs of a better and a worse answer ---------------------------------------------------------------


def pair(row: object, renamed: Mapping[str, str], _scored: bool = False) -> dict[str, Any]:
    """Convert a row of preferences to a normalised row.

    Args:
        row: The row. It has `chosen` and `rejected`: texts, messages, or chats that may begin with the prompt. The
            prompt is `prompt`, a chat in `messages` or `conversations`, `instruction` with `input`, or `question`;
            without one it is what both chats or texts begin with.
        renamed: Our name of a field, by its name in the data.
        _scored: Not used.

    Returns:
        `prompt`, `chosen` and `rejected`, which are all texts or all lists of messages, and `tools` if the row has
        them.

    Raises:
        BadRow: The row cannot be used.

    Example:
        >>> from s2ft.text.data.forms import pair
        >>> found = pair({"question": "2+3=", "chosen": "5", "rejected": "6"}, {})
        >>> found["prompt"], found["chosen"]
        ([{'role': 'user', 'content': '2+3='}], [{'role': 'assistant', 'content': '5'}])
    """
    found = {name: value for name, value in fields_of(row, renamed, "chosen and rejected").items() if value is not None}
    missing = [name for name in ANSWERS_OF_PAIRS if name not in found]
    if missing:
        raise BadRow(f"field {missing[0]!r} is missing: a row has chosen and rejected; it has {listed(found)}")
    if found["chosen"] == found["rejected"]:
        raise BadRow("fields 'chosen' and 'rejected' are the same answer")
    prompt, chosen, rejected = _texts_or_chats(found)
    for name, answer in zip(ANSWERS_OF_PAIRS, (chosen, rejected)):
        _check_answer(name, answer)
    if prompt == []:
        raise BadRow(
            "there is no prompt: give prompt, or chats in chosen and rejected that begin with the same messages"
        )
    result = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {**result, "tools": tools_of(found)} if found.get("tools") else result


def _texts_or_chats(row: Row) -> tuple[Any, Any, Any]:
    """Return the prompt and both answers, which are all texts or all chats."""
    prompt, _ = _question(row)
    are_texts = [isinstance(row[name], (str, int, float)) for name in ANSWERS_OF_PAIRS]
    if are_texts[0] != are_texts[1]:
        raise BadRow("fields 'chosen' and 'rejected' must both be text or both be messages")
    if all(are_texts):
        answers = [text(row, name) for name in ANSWERS_OF_PAIRS]
        if prompt is None:
            return _divided(*answers)
        return prompt, *(answers if isinstance(prompt, str) else (_chat("assistant", answer) for answer in answers))
    chosen, rejected = (
        read_messages([row[name]] if isinstance(row[name], Mapping) else row[name], name) for name in ANSWERS_OF_PAIRS
    )
    prompt = _chat("user", prompt) if isinstance(prompt, str) else prompt or []
    if prompt and all(chat and chat[0]["role"] == "assistant" for chat in (chosen, rejected)):
        return prompt, chosen, rejected
    begin, chosen, rejected = _divided(chosen, rejected)  # both begin with the prompt
    systems = [message for message in prompt if message["role"] == "system"]
    return [*(systems if all(message["role"] != "system" for message in begin) else ()), *begin], chosen, rejected


def _divided(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Divide two texts or two chats after what they have in common, as TRL does."""
    from trl import extract_prompt

    if not chosen or not rejected:
        return [], chosen, rejected
    return tuple(extract_prompt({"chosen": chosen, "rejected": rejected}).values())


def _check_answer(name: str, answer: str | Chat) -> None:
    if isinstance(answer, str):
        if not answer.strip():
            raise BadRow(f"field {name!r} has no answer of its own: both texts are the same up to its end")
    elif not answer or answer[-1]["role"] != "assistant" or answer[0]["role"] != "assistant":
        raise BadRow(f"field {name!r} must begin and end with a message of the assistant, after the common messages")
    elif not answer[-1]["content"].strip() and not answer[-1].get("tool_calls"):
        raise BadRow(f"field {name!r} has an empty answer")


# ---- prompts -------------------------------------------------------------------------------------------


def scored_prompt(row: object, renamed: Mapping[str, str], _scored: bool = False) -> dict[str, Any]:
    """Convert a row of prompts whose answers get rewards to a normalised row.

    Args:
        row: The row. The prompt is `prompt`, a chat in `messages` or `conversations`, whose last answer is left out,
            `instruction` with `input`, or `question`. All other fields are for the rewards.
        renamed: Our name of a field, by its name in the data.
        _scored: Not used.

    Returns:
        `prompt`, a text or a list of messages, and `columns`, the fields for the rewards. They have `answer` if the row
        has `answer`, `output`, `completion`, `response` or a last answer of a chat.

    Raises:
        BadRow: The row cannot be used.

    Example:
        >>> from s2ft.text.data.forms import scored_prompt
        >>> scored_prompt({"question": "2+3=", "answer": 5, "level": 1}, {})
        {'prompt': [{'role': 'user', 'content': '2+3='}], 'columns': {'answer': '5', 'level': 1}}
    """
    needs = "prompt, messages, instruction or question"
    found = {name: value for name, value in fields_of(row, renamed, needs).items() if value is not None}
    prompt, used = _question(found)
    if prompt is None:
        raise BadRow(f"needs {needs}; it has {listed(found)}; --field OURS=THEIRS maps other names")
    if found.get("tools"):
        raise BadRow("field 'tools' is not used by s2ft grpo, whose answers call no tools: leave it out")
    given = next((found[name] for name in ANSWERS if name in found), None)
    given = given[0] if isinstance(given, list) and len(given) == 1 else given
    answers = [str(given)] if isinstance(given, (str, int, float)) else []
    if not isinstance(prompt, str):
        if last_answer(prompt) == len(prompt) - 1 >= 0:
            answers += [] if "answer" in found else [prompt[-1]["content"]]
            prompt = prompt[:-1]
        if not any(message["role"] != "system" for message in prompt):
            raise BadRow(f"field {used!r} has no message before the assistant's")
    for answer in answers[:1]:
        check_unicode(answer, "field 'answer'")
    left_out = (used, "system", *(["input"] if used in QUESTIONS else []), *GIVEN, "completion")
    columns = {name: value for name, value in found.items() if name not in left_out}
    return {"prompt": prompt, "columns": {**columns, **({"answer": answers[0]} if answers else {})}}
