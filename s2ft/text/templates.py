"""Render chats with a Jinja chat template, and find the parts of the text that the assistant writes.

TRL's masks alone were tried: TRL 1.16 marks 34 of the 41 templates that it ships, and raises an error for all others,
such as those of the tests. Where there are marks, the masks are TRL's, to the token.
"""

import copy
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s2ft.files.plain_text import first_line
from s2ft.selection.batches import IGNORED

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
# The prompt for tokenizers without a chat template. FIRST stands for the tokens with which the tokenizer begins a text.
ALPACA = """FIRST
{%- set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list -%}
{{- (system | join('\\n\\n')) or 'PREAMBLE' -}}
{%- for message in messages if message['role'] != 'system' -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '\\n\\n### Response:\\n' -}}
        {%- generation -%}
            {{- message['content'] -}}{{- eos_token -}}
        {%- endgeneration -%}
    {%- elif message['role'] == 'user' -%}
        {{- '\\n\\n### Instruction:\\n' + message['content'] -}}
    {%- else -%}
        {{- '\\n\\n### ' + (message['role'] | capitalize) + ':\\n' + message['content'] -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n\\n### Response:\\n' -}}{%- endif -%}
""".replace("PREAMBLE", PREAMBLE)
NEUTRAL = "neutral text {}."  # in place of one that a template may have rewritten
THINKS = "<think>"
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = Mapping[str, Any]
Conversation = Sequence[Message]


class TemplateError(ValueError):
    """A chat template cannot render a chat, or it leaves a part of the chat out."""


@dataclass(frozen=True)
class Rendered:
    """A text, and what is known of its parts. Positions count characters.

    Attributes:
        text: The whole text.
        prompts: Positions where an answer begins, after the text that generation continues.
        spans: Beginning and end of each part that is trained on.
        begin: Ids of the tokens that stand before the text.
        other_prompt: Whether generation would continue a text with which this one does not begin.
    """

    text: str
    prompts: tuple[int, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    begin: tuple[int, ...] = ()
    other_prompt: bool = False


def alpaca_template(tokenizer) -> str:
    """Return the prompt of Alpaca as a chat template, with the beginning-of-text token if the tokenizer adds one."""
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    names = {tokenizer.convert_tokens_to_ids(token): name for name, token in named.items()}
    first = [names[token] for token in begin_ids(tokenizer) if token in names]
    return ALPACA.replace("FIRST\n", "".join("{{- " + name + " -}}\n" for name in first))


def begin_ids(tokenizer) -> list[int]:
    """Return the tokens that the tokenizer puts before a text."""
    whole = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    return next((whole[:n] for n in range(len(whole)) if bare and whole[n : n + len(bare)] == bare), [])


def template_of(tokenizer) -> str:
    """Return the chat template of a tokenizer, or the prompt of Alpaca if it has none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default") or next(iter(template.values()), None)
    return template or alpaca_template(tokenizer)


def render(tokenizer, messages: Conversation, template: str, *, tools: list | None = None, prompt: bool = False) -> str:
    """Return a chat as text.

    Args:
        tokenizer: The model's tokenizer.
        messages: The messages.
        template: The chat template.
        tools: Schemas of the tools that the assistant can call.
        prompt: Whether the text ends where the assistant's answer begins.

    Raises:
        TemplateError: The template refuses the messages, drops one of them or the tools, or is not a valid template.
    """
    options = {"chat_template": template, "tools": tools or None, "tokenize": False, "add_generation_prompt": prompt}
    text = _written(tokenizer, messages, **options)
    asked = [n for n, one in enumerate(messages) if one["role"] not in ("assistant", "tool")]  # others may be shortened
    changed = {n: {**messages[n], "content": NEUTRAL.format(n)} for n in asked if not _has(text, messages[n])}
    if changed:  # A template may rewrite a text, such as its blank lines or a word that turns thinking off.
        neutral = _written(tokenizer, [changed.get(n, one) for n, one in enumerate(messages)], **options)
        for message in changed.values():
            if not _has(neutral, message):
                raise TemplateError(f"the chat template leaves out the text of the role {message['role']!r}")
    named = [
        one.get("name") for tool in tools or () for one in [tool.get("function", tool)] if isinstance(one, Mapping)
    ]
    if any(isinstance(name, str) and name not in text for name in named):
        raise TemplateError("the chat template leaves out the tools: give one that takes them")
    return text


def _written(tokenizer, messages: Conversation, chat_template: str, **options: Any) -> str:
    taken = as_template_takes(tokenizer, messages, chat_template)
    try:
        return tokenizer.apply_chat_template(taken, chat_template=chat_template, **options)
    except Exception as error:  # a template can raise any error of Jinja and of Python
        raise _not_rendered(error) from error


def _has(text: str, message: Message) -> bool:
    return plain_text(message).strip() in text


def _not_rendered(error: Exception) -> TemplateError:
    where = f"line {error.lineno}: " if hasattr(error, "lineno") else ""
    return TemplateError(f"the chat template can't render the messages: {where}{first_line(error)}")


def as_template_takes(tokenizer, messages: Conversation, template: str) -> list[dict[str, Any]]:
    """Return messages with their contents as text, or as lists of parts if the template takes only those.

    Templates of models that take images are often of the second kind.
    """
    if not _takes_parts(tokenizer, template):
        return [dict(message) for message in messages]
    return [{**message, "content": [{"type": "text", "text": plain_text(message)}]} for message in messages]


@functools.lru_cache(64)  # it is asked for every text
def _takes_parts(tokenizer, template: str) -> bool:
    parts = [{"type": "text", "text": "text of a message"}]
    return not _keeps_text(tokenizer, template, "text of a message") and _keeps_text(tokenizer, template, parts)


def _keeps_text(tokenizer, template: str, content: Any) -> bool:
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=template, tokenize=False
        )
        return "text of a message" in text and "type" not in text  # not the list itself as text
    except Exception:
        return False


@functools.lru_cache(64)  # TRL renders chats to compare them
def marked_template(tokenizer, template: str) -> str | None:
    """Return a template that marks the assistant's text: this one, or TRL's version of it. None if there is none."""
    if MARKED.search(template):
        return template
    holder = copy.copy(tokenizer)
    holder.chat_template = template
    try:
        from trl.chat_template_utils import get_training_chat_template

        return get_training_chat_template(holder)
    except Exception:  # TRL is not installed or does not know the template, or it fails on TRL's own messages
        return None


def _render_marked(tokenizer, messages: Conversation, template: str, tools: list | None) -> tuple[str, list]:
    """Return the text and the marked parts as pairs of positions."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[as_template_takes(tokenizer, messages, template)],
            tools=tools or None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:
        raise _not_rendered(error) from error
    return texts[0], [tuple(span) for span in spans[0]]


def render_chat(
    tokenizer,
    messages: Conversation,
    template: str,
    *,
    tools: list | None = None,
    loss_on: str = "assistant",
    first: int = 0,
) -> Rendered:
    """Render a chat and find the assistant's text in it.

    The marks `{% generation %}` of the template say what the assistant writes. Without marks, each answer is what the
    template adds to the prompt of that answer, up to the end-of-turn token.

    Args:
        tokenizer: The model's tokenizer.
        messages: The messages. The last one is the assistant's.
        template: The chat template.
        tools: Schemas of the tools that the assistant can call.
        loss_on: "assistant" trains on every answer, "last" on the last one, "all" on the whole text.
        first: The first message that is trained on. Those before it are a prompt.

    Raises:
        TemplateError: The template refuses the messages, leaves an answer out, or changes an answer that other
            messages follow.
    """
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = {number: render(tokenizer, messages[:number], template, tools=tools, prompt=True)
               for number in answers if number}  # fmt: skip
    try:
        text = render(tokenizer, messages, template, tools=tools)
    except TemplateError:  # Mistral's templates write the system prompt only where generation continues
        if len(messages) - 1 not in prompts or messages[-1].get("tool_calls"):
            raise
        text = prompts[len(messages) - 1] + plain_text(messages[-1]) + (tokenizer.eos_token or "")
    marked = marked_template(tokenizer, template)
    spans: list | None = None
    if marked:
        marked_text, marks = _render_marked(tokenizer, messages, marked, tools)
        spans = marks if marked_text == text and marks else None
    trained = answers[-1:] if loss_on in ("last", "all") else [number for number in answers if number >= first]
    if spans is None:
        text, spans = _answers_by_prompts(tokenizer, messages, template, tools, text, prompts, trained)
    else:
        for number in trained:
            _check_kept(messages[number], text)
        spans = [span for span in spans if span[1] > in_common(prompts.get(trained[0], ""), text)]
    if loss_on == "all":
        opening = prompts.get(min((number for number in answers if number >= first), default=0), "") if first else ""
        spans = [(in_common(opening, text), len(text))]
    if any(thoughts not in text for thoughts in _thoughts(messages[answers[-1]])):
        raise TemplateError("the chat template leaves out the thoughts of the answer: give one that keeps them")
    fitting = [len(prompt) for prompt in prompts.values() if text.startswith(prompt)]
    return Rendered(text, tuple(fitting), tuple(spans), (), len(fitting) < len(prompts))


def _answers_by_prompts(tokenizer, messages, template, tools, text, prompts, trained) -> tuple[str, list]:
    """Find the answers by their prompts. Returns the text, which ends with the last answer, and the spans."""
    end = tokenizer.eos_token or ""
    last = len(messages) - 1
    answer = plain_text(messages[last])
    start = len(prompts[last]) if last in prompts else max(text.find(answer), 0)
    if text.startswith(prompts.get(last, "")) and _kept(messages[last], text[start:]):
        text = text.rstrip()  # templates write a line break after the end-of-turn token
        is_ended = text.endswith(tuple(tokenizer.all_special_tokens))
        if not answer.strip():  # every text ends with a blank answer: what follows the prompt is the template's end
            is_ended = is_ended or bool(text[start:])
        if text.endswith(answer.strip()) and not is_ended:
            text += end
    elif last not in prompts or messages[last].get("tool_calls") or not _kept(messages[last], text):
        raise _left_out(messages[last])
    else:  # The template changes the prompt when an answer follows, but generation continues the prompt.
        if prompts[last].rstrip().endswith(THINKS):
            answer = answer.removeprefix(THINKS).lstrip("\n")
        start, text = len(prompts[last]), prompts[last] + answer + end
    spans = []
    for number in trained[:-1]:
        through = render(tokenizer, messages[: number + 1], template, tools=tools).rstrip()
        begin = len(prompts[number]) if number in prompts else max(text.find(plain_text(messages[number])), 0)
        if not (text.startswith(prompts.get(number, "")) and text.startswith(through)) or not _kept(
            messages[number], through[begin:]
        ):
            _check_kept(messages[number], text)
            raise TemplateError(
                f"the chat template writes the answer {shorten(plain_text(messages[number]))} differently when other "
                'messages follow it: train on the last answer only (loss_on="last"), or give a chat template that '
                "keeps the answers"
            )
        spans.append((begin, len(through)))
    return text, [*spans, (start, len(text))]


def plain_text(message: Message) -> str:
    """Return the text of a message, without parts of other kinds."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, Mapping))


def _kept(message: Message, text: str) -> bool:
    """Whether a text has what the assistant says: the text after its thoughts, and the names of the tools it calls."""
    said = plain_text(message).split("</think>")[-1].strip()
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    return said in text and all(str(call.get("name", "")) in text for call in calls)


def _thoughts(message: Message) -> list[str]:
    """What an assistant thinks before it says anything, from each place where data has it."""
    inside = plain_text(message).rpartition("</think>")[0].strip().removeprefix(THINKS)
    beside = (message.get(name) for name in ("reasoning_content", "reasoning", "thinking"))
    return [thoughts.strip() for thoughts in (inside, *beside) if isinstance(thoughts, str)]


def _check_kept(message: Message, text: str) -> None:
    if not _kept(message, text):
        raise _left_out(message)


def _left_out(message: Message) -> TemplateError:
    said = plain_text(message)
    what = shorten(said) if said.strip() else "that calls a tool"
    return TemplateError(f"the chat template leaves out the assistant's answer {what}")


def shorten(text: str, length: int = 40) -> str:
    """Return a text in quotes for a message, at most so many characters of it."""
    return json.dumps(text if len(text) <= length else text[: length - 1] + "…", ensure_ascii=False)


def in_common(first: Sequence, second: Sequence) -> int:
    """Return the number of leading items that two sequences have in common."""
    return next((n for n, pair in enumerate(zip(first, second)) if pair[0] != pair[1]), min(len(first), len(second)))


# ---- token ids and labels of rendered texts ----------------------------------------------------------
#
# The ids of a prompt are those that generation starts from. A tokenizer may merge the end of a prompt with the
# beginning of the answer into one token. Such a text is encoded in two parts, so that training sees the prompt of
# generation.

ANCHORS = ("\n", ".", "a")  # texts before a continuation, which the tokenizer must not merge with it


def encode_rendered(tokenizer, rendered: Sequence[Rendered]) -> list[tuple[list[int], list[int]]]:
    """Return the ids and labels of rendered texts. The tokenizer is called once for all of them.

    Args:
        tokenizer: The model's tokenizer.
        rendered: The texts.

    Returns:
        For each text its ids and its labels. A label is -100 where the token has no loss. A token that is partly in
        a trained span has a loss.
    """
    texts = [text for one in rendered for text in (one.text, *(one.text[:cut] for cut in one.prompts))]
    if not texts:
        return []
    fast = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False, return_offsets_mapping=fast)
    ids = encoded["input_ids"]
    rows, at = [], 0
    for one in rendered:
        prompts = ids[at + 1 : at + 1 + len(one.prompts)]
        if not fast or any(ids[at][: len(prompt)] != prompt for prompt in prompts):
            row, labels = _encode_in_parts(tokenizer, one)
        else:
            row, labels = ids[at], _labels(one, ids[at], encoded["offset_mapping"][at])
        begin = () if tuple(row[: len(one.begin)]) == one.begin else one.begin  # a text may have it already
        rows.append(([*begin, *row], [IGNORED] * len(begin) + labels))
        at += 1 + len(one.prompts)
    return rows


def _labels(one: Rendered, ids: list[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
    labels, spans, at = [], one.spans, 0
    for token, (start, end) in zip(ids, offsets):
        while at < len(spans) and start >= spans[at][1]:
            at += 1
        labels.append(token if at < len(spans) and end > spans[at][0] else IGNORED)
    return labels


def _encode_in_parts(tokenizer, one: Rendered) -> tuple[list[int], list[int]]:
    """Encode a text so that it begins with the ids of each of its prompts, also by a tokenizer without offsets."""
    cuts: list[int] = []
    for prompt in one.prompts:
        head, whole = (_encode_parts(tokenizer, text, cuts) for text in (one.text[:prompt], one.text))
        if whole[: len(head)] != head:
            cuts.append(prompt)
    whole = _encode_parts(tokenizer, one.text, cuts)
    labels = [IGNORED] * len(whole)
    for span in one.spans:
        first, last = (in_common(_encode_parts(tokenizer, one.text[:position], cuts), whole) for position in span)
        labels[first:last] = whole[first:last]
    return whole, labels


def _encode_parts(tokenizer, text: str, cuts: Sequence[int]) -> list[int]:
    inner = [cut for cut in cuts if cut < len(text)]
    parts = [text[start:end] for start, end in zip([0, *inner], [*inner, len(text)])]
    return _encode(tokenizer, parts[0]) + [token for part in parts[1:] for token in continuation_ids(tokenizer, part)]


def continuation_ids(tokenizer, text: str) -> list[int]:
    """Return the ids of a text that continues another one.

    A SentencePiece tokenizer would put a space before a text of its own.

    Args:
        tokenizer: The model's tokenizer.
        text: The text.
    """
    for anchor in ANCHORS:
        head, whole = _encode(tokenizer, anchor), _encode(tokenizer, anchor + text)
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return _encode(tokenizer, text)


def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
