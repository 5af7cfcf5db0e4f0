"""The prompt of an adapter: the format that it was trained with, which everything that runs the adapter uses.

Other programs know the chat template of a tokenizer and nothing else. For them the system prompt becomes the template's
default, and marks that only training needs are taken out, since not every program knows them.
"""

import copy
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import s2ft
from s2ft.adapter.adapter import ON_TOP_OF
from s2ft.text.models import dtype_of_base, load_model
from s2ft.text.prompts import PromptFormat, encode_prompt, end_ids, prompt_text
from s2ft.text.templates import as_template_takes, template_of

logger = logging.getLogger(__name__)
KEY = "prompt"  # in the info of an adapter
QUESTION = {"role": "user", "content": "Is 2 + 3 = 5?"}
PROBES = (
    [QUESTION],
    [{"role": "system", "content": "Answer yes or no."}, QUESTION],
    [QUESTION, {"role": "assistant", "content": "Yes."}, QUESTION],
)
# transformers' marks around what the assistant writes: llama-cpp-python, minijinja and others fail on them.
BEGIN, END = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}"), re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")


@cache  # once a process
def _warn_of_those_below(name: str, others: str) -> None:
    logger.warning("%s was trained on top of %s, and is used without: s2ft combine makes the sum", name, others)


def recorded_format(info: Mapping[str, Any], name: str = "the adapter") -> PromptFormat | None:
    """Return the format that an adapter was trained with, or None for an adapter that does not record one.

    Args:
        info: The `info` of the adapter.
        name: The adapter's name, for the error message.

    Raises:
        ValueError: What is recorded is not a format.

    Example:
        >>> from s2ft.text.adapter_prompts import recorded_format
        >>> recorded_format({"prompt": {"form": "chat", "template": "{{ messages }}", "system": "Be brief."}}).system
        'Be brief.'
    """
    if isinstance(info.get(ON_TOP_OF), Mapping) and info[ON_TOP_OF]:
        _warn_of_those_below(name, ", ".join(map(str, info[ON_TOP_OF])))
    if KEY not in info:
        return None
    values = info[KEY]
    try:
        if not isinstance(values, Mapping):
            raise ValueError(f"it must be an object, got {type(values).__name__}")
        return PromptFormat.from_dict(dict(values))
    except ValueError as error:
        raise ValueError(f"the prompt that {name} records can't be read: {error}") from None


class Prompter:
    """Makes the prompts of one adapter, or of the base.

    Args:
        tokenizer: The base's tokenizer. It is not changed.
        info: The `info` of the adapter. None is the base.
        generation_config: The model's generation_config, which can name further end tokens.
        name: The adapter's name, for messages.

    Attributes:
        format: The :class:`~s2ft.text.prompts.PromptFormat`: the recorded one, or the base's own.
        tokenizer: A copy of the tokenizer with the template of the format.
        ends: The tokens that end an answer.
        is_chat: Whether prompts are messages in a template. If not, prompts are plain text: the adapter was trained on
            plain text, or there is no adapter and the base has no template.

    Raises:
        ValueError: The recorded format can't be read.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from s2ft.text.adapter_prompts import Prompter
        >>> info = {"prompt": {"form": "chat", "template": "{{ messages[-1]['content'] }}", "system": None}}
        >>> prompter = Prompter(ByT5Tokenizer(), info)
        >>> prompter.tokenizer.decode(prompter.encode([{"role": "user", "content": "2+3="}]))
        '2+3='
    """

    def __init__(
        self, tokenizer, info: Mapping[str, Any] | None = None, generation_config=None, name: str = "the adapter"
    ) -> None:
        self.format = recorded_format(info or {}, name) or PromptFormat("chat", template_of(tokenizer))
        self.tokenizer = copy.copy(tokenizer)  # shares the vocabulary, and has a template of its own
        self.format.apply_to(self.tokenizer)
        self.ends = frozenset(end_ids(self.tokenizer, generation_config))
        self.is_chat = self.format.form == "chat" and (info is not None or bool(tokenizer.chat_template))

    def messages(self, conversation: Sequence[Mapping], system: str | None = None) -> list[dict[str, Any]]:
        """Return a conversation with the system prompt, unless it has one.

        Args:
            conversation: Messages with the keys "role" and "content".
            system: Another system prompt than the recorded one. An empty text is none.
        """
        return (self.format if system is None else replace(self.format, system=system or None)).conversation(
            conversation
        )

    def encode(self, conversation: Sequence[Mapping], system: str | None = None) -> list[int]:
        """Return the token ids of a conversation, up to where the assistant's answer begins.

        Args:
            conversation: Messages with the keys "role" and "content".
            system: As in :meth:`messages`.

        Raises:
            ValueError: The template refuses the messages.
        """
        return encode_prompt(self.tokenizer, self.messages(conversation, system))

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text that the model continues, without an end token."""
        return encode_prompt(self.tokenizer, text)


def base_name(model: str | None, adapter: str | Path | None) -> str:
    """Return the base that a command loads: the one that is named, or else the one that its adapter records.

    Args:
        model: As in :func:`s2ft.text.models.load_model`, or None.
        adapter: As in :func:`s2ft.read_adapter`, or None.

    Raises:
        ValueError: Neither is known.
    """
    if model is not None:
        return model
    if adapter is None:
        raise ValueError("missing: --model, or an adapter, which records its base")
    recorded = s2ft.read_adapter(adapter).info.get("base_model")
    if not recorded:
        raise ValueError(f"missing: --model. The adapter {adapter} does not record which base it was trained on")
    logger.info("base %s, as adapter %s records it; --model names another place of it", recorded, adapter)
    return recorded


def load_with_adapter(model_name: str, adapter_name: str | None, dtype: str = "auto"):
    """Load a model, and an adapter if one is named.

    Args:
        model_name: As in :func:`s2ft.text.models.load_model`.
        adapter_name: As in :func:`s2ft.read_adapter`, or None.
        dtype: Dtype of the weights. "auto" is that of the adapter's training, or without adapter the checkpoint's.

    Returns:
        The model, on the CPU and in evaluation mode, and the :class:`Prompter` of the adapter or of the base.

    Raises:
        FileNotFoundError: The model or the adapter does not exist.
        ValueError: The model or the adapter can't be loaded.
    """
    # The adapter is read before the model is loaded, so that a mistake in it is found at once.
    adapter = None if adapter_name is None else s2ft.read_adapter(adapter_name)
    info, name = (None, "") if adapter is None else (adapter.info, f"adapter {adapter_name}")
    recorded_format(info or {}, name)
    model, tokenizer = load_model(model_name, dtype if adapter is None else dtype_of_base(adapter, dtype))
    prompter = Prompter(tokenizer, info, model.generation_config, name)
    if adapter is not None:
        s2ft.load_adapter(model, adapter)
    return model, prompter


# ---- for other programs --------------------------------------------------------------------------------


def standalone_template(prompt: PromptFormat) -> str | None:
    """Return a chat template for other programs: a chat without a system message gets the system prompt.

    The template has no marks of the assistant's words, which only training needs.

    Args:
        prompt: The format.

    Returns:
        The template, or None for a format without one.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from s2ft.text.adapter_prompts import standalone_template
        >>> from s2ft.text.prompts import PromptFormat
        >>> template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
        >>> alone = standalone_template(PromptFormat("chat", template, "Be brief."))
        >>> chat = [{"role": "user", "content": "2+3="}]
        >>> ByT5Tokenizer().apply_chat_template(chat, chat_template=alone, tokenize=False)
        '[system] Be brief. [user] 2+3= '
    """
    if prompt.template is None:
        return None
    template = END.sub(r"{%\1 endif \2%}", BEGIN.sub(r"{%\1 if true \2%}", prompt.template))
    if prompt.system is None:
        return template
    system = json.dumps(prompt.system, ensure_ascii=False)  # a text in quotes, with the escapes that Jinja knows
    # transformers and llama.cpp drop the line break after a block, so the template begins a line as before.
    return (
        "{%- if not messages or messages[0]['role'] != 'system' -%}"
        f"{{%- set messages = [{{'role': 'system', 'content': {system}}}] + messages -%}}"
        "{%- endif %}\n" + template
    )


def give_prompt(tokenizer, info: Mapping[str, Any], name: str):
    """Give a tokenizer the chat template that an adapter was trained with, with its system prompt as the default.

    A tokenizer is not changed if the adapter records no template.

    Args:
        tokenizer: The base's tokenizer.
        info: The `info` of the adapter.
        name: The adapter's name, for messages.

    Returns:
        The tokenizer.

    Raises:
        ValueError: The recorded format can't be read, or its template can't have a default system prompt.
    """
    prompter = Prompter(tokenizer, info, name=name)
    if KEY not in info or prompter.format.template is None:
        return tokenizer
    tokenizer.chat_template = standalone_template(prompter.format)
    logger.info(
        "the chat template is the one that %s was trained with%s",
        name,
        ", with its system prompt as the default" if prompter.format.system else "",
    )
    check_same_prompts(tokenizer, prompter)
    return tokenizer


def check_same_prompts(tokenizer, prompter: Prompter) -> None:
    """Check that a tokenizer makes the prompts that a Prompter makes, from the messages alone.

    Raises:
        ValueError: It makes another one, which the message has.
    """
    for conversation in PROBES:
        try:
            expected = prompt_text(prompter.tokenizer, prompter.messages(conversation))
        except ValueError:  # the template takes no system message
            continue
        messages = as_template_takes(tokenizer, conversation, tokenizer.chat_template)
        found = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if found != expected:
            raise ValueError(
                f"the chat template makes another prompt with a default system prompt: {found[:200]!r} instead of "
                f"{expected[:200]!r}; merge without it, and send the system prompt with each request"
            )
