"""The rows of s2ft dpo and s2ft grpo: pairs of a better and a worse answer, and prompts whose answers are scored."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from s2ft.text.data.forms import BadRow, Row, check_unicode, last_answer, read_messages, text
from s2ft.text.data.loading import FEW, Shape
from s2ft.text.data.options import DataOptions
from s2ft.text.data.scratch import scratch_file
from s2ft.text.prompts import PromptFormat

CHATS = ("messages", "conversations", "conversation")  # fields that hold a chat
QUESTIONS = ("instruction", "question")  # fields that hold a question, which becomes a chat
ANSWERS = ("answer", "output", "completion", "response")  # fields that hold what is right, the first one counts
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
Chat = list[dict[str, Any]]

# ---- what both kinds share -----------------------------------------------------------------------------


def _known(row: object, renamed: Mapping[str, str], needs: str) -> dict[str, Any]:
    """Return the fields of a row by our names, without those that are null."""
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object with {needs}, got {type(row).__name__}")
    missing = [name for name in renamed if name not in row]
    if missing and len(missing) == len(renamed):
        raise BadRow(f"has no field {missing[0]!r}, which fields names; it has {_listed(row)}")
    return {renamed.get(name, name): value for name, value in row.items() if value is not None}


def _listed(row: Row) -> str:
    return ", ".join(map(repr, row)) or "nothing"


def _question(row: Row) -> tuple[str | Chat | None, list[str]]:
    """Return what an answer answers, as text, as a chat, or None, and the fields that have it."""
    for name in ("prompt", *CHATS):
        if name in row:
            value = row[name]
            if name == "prompt" and isinstance(value, str):
                question = text(row, name, may_be_empty=True)
                return (
                    (_with_system(row, _user(question)), [name, "system"]) if row.get("system") else (question, [name])
                )
            return _with_system(row, read_messages(value, name)), [name, "system"]
    for name in QUESTIONS:
        if name in row:
            more = text(row, "input", may_be_empty=True) if name == "instruction" and "input" in row else ""
            question = text(row, name) + (f"\n\n{more}" if more.strip() else "")
            return _with_system(row, _user(question)), [name, "input", "system"]
    return None, []


def _user(content: str) -> Chat:
    return [{"role": "user", "content": content}]


def _with_system(row: Row, messages: Chat) -> Chat:
    system = text(row, "system", may_be_empty=True) if "system" in row else ""
    if not system.strip() or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system}, *messages]


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
    found = _known(row, renamed, "chosen and rejected")
    missing = [name for name in ("chosen", "rejected") if name not in found]
    if missing:
        raise BadRow(f"field {missing[0]!r} is missing: a row has chosen and rejected; it has {_listed(found)}")
    prompt, chosen, rejected = _texts_or_chats(found)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        _check_answer(name, answer)
    if chosen == rejected:
        raise BadRow("fields 'chosen' and 'rejected' are the same answer")
    if prompt == []:
        raise BadRow(
            "there is no prompt: give prompt, or chats in chosen and rejected that begin with the same messages"
        )
    result = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {**result, "tools": found["tools"]} if found.get("tools") else result


def _texts_or_chats(row: Row) -> tuple[Any, Any, Any]:
    prompt, _ = _question(row)
    answers = [row["chosen"], row["rejected"]]
    are_texts = [isinstance(answer, (str, int, float)) for answer in answers]
    if are_texts[0] != are_texts[1]:
        raise BadRow("fields 'chosen' and 'rejected' must both be text or both be messages")
    if all(are_texts):
        chosen, rejected = text(row, "chosen"), text(row, "rejected")
        if prompt is None:
            return _common_text(chosen, rejected)
        if isinstance(prompt, str):
            return prompt, chosen, rejected
        return prompt, _assistant(chosen), _assistant(rejected)
    chosen, rejected = (
        read_messages([row[name]] if isinstance(row[name], Mapping) else row[name], name)
        for name in ("chosen", "rejected")
    )
    if isinstance(prompt, str):
        prompt = _user(prompt)
    return _without_prompt(prompt or [], chosen, rejected)


def _assistant(content: str) -> Chat:
    return [{"role": "assistant", "content": content}]


def _common_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Divide two texts after what they have in common, as TRL does."""
    from trl import extract_prompt

    found = extract_prompt({"chosen": chosen, "rejected": rejected})
    return found["prompt"], found["chosen"], found["rejected"]


def _without_prompt(prompt: Chat, chosen: Chat, rejected: Chat) -> tuple[Chat, Chat, Chat]:
    """Divide chats into the prompt and the answers, if they begin with the prompt."""
    if all(chat and chat[0]["role"] == "assistant" for chat in (chosen, rejected)) and prompt:
        return prompt, chosen, rejected
    same = 0
    for one, other in zip(chosen, rejected):
        if one != other:
            break
        same += 1
    same = min(same, len(chosen) - 1, len(rejected) - 1)
    begins = chosen[:same]
    systems = [message for message in prompt if message["role"] == "system"]
    if systems and not any(message["role"] == "system" for message in begins):
        begins = [*systems, *begins]
    return begins, chosen[same:], rejected[same:]


def _check_answer(name: str, answer: str | Sequence[dict[str, Any]]) -> None:
    if isinstance(answer, str):
        if not answer.strip():
            raise BadRow(f"field {name!r} has no answer of its own: both texts are the same up to its end")
        return
    if not answer or answer[-1]["role"] != "assistant" or answer[0]["role"] != "assistant":
        raise BadRow(f"field {name!r} must begin and end with a message of the assistant, after the common messages")
    if not answer[-1]["content"].strip() and not answer[-1].get("tool_calls"):
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
    found = _known(row, renamed, needs)
    prompt, used = _question(found)
    if prompt is None:
        raise BadRow(f"needs {needs}; it has {_listed(found)}; --field OURS=THEIRS maps other names")
    if found.get("tools"):
        raise BadRow("field 'tools' is not used by s2ft grpo, whose answers call no tools: leave it out")
    answers = [str(found[name]) for name in ANSWERS if isinstance(found.get(name), (str, int, float))]
    if not isinstance(prompt, str):
        last = last_answer(prompt)
        if last >= 0 and last == len(prompt) - 1:
            answers.append(prompt[last]["content"])
            prompt = prompt[:last]
        if not any(message["role"] != "system" for message in prompt):
            raise BadRow(f"field {used[0]!r} has no message before the assistant's")
    for answer in answers[:1]:
        check_unicode(answer, "field 'answer'")
    columns = {name: value for name, value in found.items() if name not in (*used, *GIVEN, "completion")}
    return {"prompt": prompt, "columns": {**columns, **({"answer": answers[0]} if answers else {})}}


PAIRS = Shape(("prompt", "chosen", "rejected", "tools", "place"), ("prompt", "chosen", "rejected", "tools"), pair)
PROMPTS = Shape(("prompt", "columns", "place"), ("prompt", "columns"), scored_prompt)


def form_of_prompts(rows, options: DataOptions) -> str:
    """Return the form of prompts for rows: "text" if all prompts are texts, else "chat".

    Args:
        rows: A Dataset of PAIRS or PROMPTS.
        options: The options of the data, which may name the form. A chat template or a system prompt says "chat".
    """
    if options.form != "auto":
        return options.form
    if options.chat_template is not None or options.system_prompt is not None:
        return "chat"
    prompts = (prompt for batch in rows.select_columns("prompt").iter(FEW) for prompt in batch["prompt"])
    return "text" if all(isinstance(prompt, str) for prompt in prompts) else "chat"


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
    from datasets import Features, Json

    names = list(dict.fromkeys(name for batch in rows.iter(FEW) for columns in batch["columns"] for name in columns))

    def spread(row: dict[str, Any]) -> dict[str, Any]:
        found = row["prompt"]
        if prompt.form == "chat":
            found = prompt.conversation(_user(found) if isinstance(found, str) else found)
        elif not isinstance(found, str):
            raise ValueError(f"{row['place']}: messages need a chat template, but form='text' uses none")
        values = {"prompt": found, **{name: row["columns"].get(name) for name in names}}
        return {name: json.dumps(value) for name, value in values.items()}  # else the text "5" would become a number

    return rows.map(
        spread,
        remove_columns=rows.column_names,
        features=Features({name: Json() for name in ("prompt", *names)}),
        cache_file_name=scratch_file("prompts.arrow"),
        load_from_cache_file=False,
        new_fingerprint="prompts",
    )
