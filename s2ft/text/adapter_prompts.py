"""The prompt of an adapter: the format that it was trained with, which everything that runs the adapter uses."""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from s2ft.text.prompts import PromptFormat, encode_prompt, end_ids, prompt_format

logger = logging.getLogger(__name__)
KEY = "prompt"  # in the info of an adapter


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
    if KEY not in info:
        return None
    try:
        return PromptFormat.from_dict(info[KEY])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"the prompt that is recorded in {name} can't be read: {error}") from None


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
        replaces_template: Whether the tokenizer has another template, which the recorded one replaces.

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
        recorded = recorded_format(info or {}, name)
        own = tokenizer.chat_template
        self.format = prompt_format(tokenizer) if recorded is None else recorded
        self.tokenizer = copy.copy(tokenizer)  # shares the vocabulary, but has a template of its own
        self.format.apply_to(self.tokenizer)
        if not self.tokenizer.chat_template:  # trained on plain text, and the base has no template either
            prompt_format(tokenizer).apply_to(self.tokenizer)
        self.ends = frozenset(end_ids(self.tokenizer, generation_config))
        self.is_chat = self.format.form == "chat" and (info is not None or bool(own))
        self.replaces_template = bool(own) and own != self.tokenizer.chat_template

    def messages(self, conversation: Sequence[dict], system: str | None = None) -> list[dict]:
        """Return a conversation with the system prompt, unless it begins with one.

        Args:
            conversation: Messages with the keys "role" and "content".
            system: Another system prompt than the recorded one. An empty text is none.
        """
        system = self.format.system if system is None else system
        if not system or (conversation and conversation[0]["role"] == "system"):
            return list(conversation)
        return [{"role": "system", "content": system}, *conversation]

    def encode(self, conversation: Sequence[dict], system: str | None = None) -> list[int]:
        """Return the token ids of a conversation, up to where the assistant's answer begins.

        Args:
            conversation: Messages with the keys "role" and "content".
            system: As in :meth:`messages`.

        Raises:
            ValueError: The template refuses the messages.
        """
        try:
            return encode_prompt(self.tokenizer, self.messages(conversation, system))
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from None

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text that the model continues, without an end token."""
        ids = self.tokenizer(text)["input_ids"]
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids


def say_which_template(prompter: Prompter, name: str) -> None:
    """Log that the template which an adapter was trained with is used in place of the base's own, if it is another."""
    if prompter.replaces_template:
        logger.info("prompts have the chat template that %s was trained with, not the base's own", name)
