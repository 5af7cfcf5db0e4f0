"""The rows of s2ft dpo and s2ft grpo: pairs of a better and a worse answer, and prompts whose answers are scored."""

import json
import secrets
from collections.abc import Mapping
from typing import Any

from s2ft.text.data.forms import (
    BadRow,
    Row,
    check_unicode,
    fields_of,
    last_answer,
    listed,
    question_of,
    read_messages,
    text,
    tools_of,
    with_system,
)
from s2ft.text.data.rows import FEW, Shape
from s2ft.text.prompts import PromptFormat

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


# ---- pairs ---------------------------------------------------------------------------------------------


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
        >>> from s2ft.text.data.preferences import pair
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
        >>> from s2ft.text.data.preferences import scored_prompt
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
    answers = [str(found[name]) for name in ANSWERS if isinstance(found.get(name), (str, int, float))]
    if not isinstance(prompt, str):
        if last_answer(prompt) == len(prompt) - 1 >= 0:
            answers.append(prompt[-1]["content"])
            prompt = prompt[:-1]
        if not any(message["role"] != "system" for message in prompt):
            raise BadRow(f"field {used!r} has no message before the assistant's")
    for answer in answers[:1]:
        check_unicode(answer, "field 'answer'")
    left_out = (used, "system", *(["input"] if used in QUESTIONS else []), *GIVEN, "completion")
    columns = {name: value for name, value in found.items() if name not in left_out}
    return {"prompt": prompt, "columns": {**columns, **({"answer": answers[0]} if answers else {})}}


PAIRS = Shape(("prompt", "chosen", "rejected", "tools", "place"), ("prompt", "chosen", "rejected", "tools"), pair)
PROMPTS = Shape(("prompt", "columns", "place"), ("prompt", "columns"), scored_prompt)


def with_columns(rows, prompt: PromptFormat):
    """Return rows of PROMPTS as TRL's GRPOTrainer takes them: with the fields for the rewards as columns.

    Args:
        rows: A Dataset as :func:`s2ft.text.data.load_rows` returns it.
        prompt: The format of prompts. With form "chat" every prompt becomes a list of messages.

    Returns:
        A Dataset with the column `prompt` and one for each field. A field that a row lacks is None.

    Raises:
        ValueError: A prompt is a chat, but the form is "text".
    """
    from datasets import Features

    from s2ft.text.data.columns import ExactJson

    names = list(dict.fromkeys(name for batch in rows.iter(FEW) for columns in batch["columns"] for name in columns))

    def spread(row: dict[str, Any]) -> dict[str, Any]:
        found = row["prompt"]
        if prompt.form == "chat":
            found = prompt.conversation(_chat("user", found) if isinstance(found, str) else found)
        elif not isinstance(found, str):
            raise ValueError(f"{row['place']}: messages need a chat template, but form='text' uses none")
        values = {"prompt": found, **{name: row["columns"].get(name) for name in names}}
        return {name: json.dumps(value) for name, value in values.items()}  # else the text "5" would become a number

    return rows.map(
        spread,
        remove_columns=rows.column_names,
        features=Features({name: ExactJson() for name in ("prompt", *names)}),
        new_fingerprint=secrets.token_hex(8),
    )
