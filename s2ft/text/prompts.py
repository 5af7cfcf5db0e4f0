"""Prompts: a chat template, or plain text.

Training and generation build the prompt with the same functions, so that both use the same tokens.
"""

import json
import logging
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from s2ft.config import refuse
from s2ft.text.data import DataOptions, form_of
from s2ft.text.templates import (
    Conversation,
    Rendered,
    TemplateError,
    alpaca_template,
    begin_ids,
    encode_rendered,
    marked_template,
    render,
    template_of,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMS = ("chat", "text")
PROBE = (
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "second answer"},
)


@dataclass(frozen=True)
class PromptFormat:
    """How prompts are built. An adapter records the format that it was trained with.

    Attributes:
        form: "chat" puts messages into a chat template. "text" uses texts as they are.
        template: The Jinja chat template. None with form "text".
        system: System prompt of the conversations that have none, or None.

    Example:
        >>> from s2ft.text.prompts import PromptFormat
        >>> prompt = PromptFormat(template="{{ messages[0].content }}", system="Be brief.")
        >>> prompt == PromptFormat.from_dict(prompt.to_dict())
        True
        >>> prompt.conversation([{"role": "user", "content": "2+3="}])[0]
        {'role': 'system', 'content': 'Be brief.'}
    """

    form: str = "chat"
    template: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        template, system = self.template, self.system
        refuse(
            (self.form not in FORMS, f"form must be one of {', '.join(FORMS)}, got {self.form!r}"),
            (not isinstance(template, (str, NoneType)), f"template must be text, got {type(template).__name__}"),
            (not isinstance(system, (str, NoneType)), f"system must be text, got {type(system).__name__}"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name.

        Returns:
            Values that JSON can hold.
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PromptFormat":
        """Return the format that :meth:`to_dict` described.

        Args:
            values: The fields by name. Unknown names are ignored, so that formats of later versions can be read.

        Returns:
            The format.
        """
        return cls(**{name: values[name] for name in ("form", "template", "system") if name in values})

    def apply_to(self, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
        """Give a tokenizer the chat template of this format.

        Args:
            tokenizer: The tokenizer. It is changed, unless the format has no template.

        Returns:
            The tokenizer.
        """
        if self.form == "chat" and self.template:
            tokenizer.chat_template = self.template
        return tokenizer

    def conversation(self, messages: Conversation) -> list[dict[str, Any]]:
        """Return messages with the system prompt of this format in front, unless they have one.

        Args:
            messages: The messages.

        Returns:
            Copies of the messages.
        """
        messages = [dict(message) for message in messages]
        if self.system is None or any(message["role"] == "system" for message in messages):
            return messages
        return [{"role": "system", "content": self.system}, *messages]


def prompt_format(
    tokenizer: "PreTrainedTokenizerBase",
    form: str = "chat",
    chat_template: str | Path | None = None,
    system: str | None = None,
) -> PromptFormat:
    """Choose the format of prompts for a tokenizer, and check that the template works.

    Args:
        tokenizer: The model's tokenizer. It is not changed.
        form: "chat" or "text".
        chat_template: A file with a Jinja template, the text of a template, or "alpaca". None uses the tokenizer's
            own template, or "alpaca" if it has none.
        system: System prompt for conversations without one.

    Returns:
        The format. If TRL has a version of the template for training, and the template writes an answer differently
        when other messages follow it, the format has TRL's version.

    Raises:
        FileNotFoundError: The file of the template does not exist.
        ValueError: The template is invalid, leaves out an answer or the system prompt, or form "text" is combined
            with a template or a system prompt.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from s2ft.text.prompts import prompt_format
        >>> print(prompt_format(ByT5Tokenizer(), chat_template="alpaca").template[:40])
        {%- set system = messages | selectattr('
    """
    if form != "chat":
        way_out = "has no effect on plain text: give form='chat', or leave it out"
        refuse((chat_template is not None, f"chat_template {way_out}"), (system is not None, f"system {way_out}"))
        return PromptFormat(form)
    template = template_of(tokenizer) if chat_template is None else _read_template(tokenizer, chat_template)
    given = "(given as text)" if "{" in str(chat_template) else chat_template
    name = "the tokenizer's chat template" if chat_template is None else f"chat_template {given}"
    template = _checked(tokenizer, template, name)
    if system is not None:
        messages = [{"role": "system", "content": system}, *PROBE[:1]]
        try:
            render(tokenizer, messages, template, prompt=True)
        except TemplateError as error:
            raise ValueError(f"{name} takes no system prompt: {error}; give another one with chat_template") from None
    return PromptFormat("chat", template, system)


def prompt_for_rows(tokenizer: "PreTrainedTokenizerBase", rows: "Dataset", options: DataOptions) -> PromptFormat:
    """Choose the format of prompts for rows of data.

    Args:
        tokenizer: The model's tokenizer.
        rows: The rows, as :func:`s2ft.text.data.load_rows` returns them.
        options: The options of the data: the form, the chat template and the system prompt.

    Returns:
        The format.

    Raises:
        FileNotFoundError: The file of the template does not exist.
        ValueError: See :func:`prompt_format`.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import ByT5Tokenizer
        >>> from s2ft.text.data import DataOptions
        >>> from s2ft.text.prompts import prompt_for_rows
        >>> rows = Dataset.from_list([{"messages": None, "prompt": None, "text": "Lima is in Peru."}])
        >>> prompt_for_rows(ByT5Tokenizer(), rows, DataOptions()).form
        'text'
    """
    return prompt_format(tokenizer, form_of(rows, options), options.chat_template, options.system_prompt)


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

    names = list(dict.fromkeys(name for batch in rows.iter(1000) for columns in batch["columns"] for name in columns))

    def spread(row: dict[str, Any]) -> dict[str, Any]:
        found = row["prompt"]
        if prompt.form == "chat":
            found = prompt.conversation([{"role": "user", "content": found}] if isinstance(found, str) else found)
        elif not isinstance(found, str):
            raise ValueError(f"{row['place']}: messages need a chat template, but form='text' uses none")
        values = {"prompt": found, **{name: row["columns"].get(name) for name in names}}
        return {name: json.dumps(value) for name, value in values.items()}  # else the text "5" would become a number

    return rows.map(
        spread,
        remove_columns=rows.column_names,
        features=Features({name: ExactJson("string") for name in ("prompt", *names)}),
        new_fingerprint=secrets.token_hex(8),
    )


def _read_template(tokenizer, chat_template: str | Path) -> str:
    text = str(chat_template)
    if text == "alpaca":
        return alpaca_template(tokenizer)
    if "{{" in text or "{%" in text:
        return text
    path = Path(text).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"chat_template {text} is no file, no template text, and not the name alpaca")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"chat_template {text} is not UTF-8 text: {error}") from None


def _checked(tokenizer, template: str, name: str) -> str:
    """Return the template, or TRL's version of it. Raises ValueError if it is invalid or leaves out the last answer."""
    try:
        render(tokenizer, PROBE[2:3], template, prompt=True)  # a template may take one question only
        text = render(tokenizer, PROBE[2:], template)
    except TemplateError as error:
        raise ValueError(f"{name}: {error}; give another one with chat_template") from None
    if "second answer" not in text:
        raise ValueError(
            f"{name} leaves out the answer: it writes {text[-160:]!r}; give another one with chat_template"
        )
    marked = marked_template(tokenizer, template)
    if marked and marked != template and render(tokenizer, PROBE, marked) != render(tokenizer, PROBE, template):
        logger.info(
            "chat template: TRL's version for training, since the model's own writes an answer differently when other "
            "messages follow it"
        )
        return marked
    return template


def prompt_text(tokenizer, conversation: Conversation | str, tools: list | None = None) -> str:
    """Return the text that ends where the assistant's answer begins.

    Args:
        tokenizer: The model's tokenizer. Without a chat template, the prompt of Alpaca is used.
        conversation: Messages for the chat template, or a text, which is returned as it is.
        tools: Schemas of the tools that the assistant can call.
    """
    if isinstance(conversation, str):
        return conversation
    return render(tokenizer, conversation, template_of(tokenizer), tools=tools, prompt=True)


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase", conversation: Conversation | str, tools: list | None = None
) -> list[int]:
    """Return the token ids of a prompt. Training begins with the same ids.

    Args:
        tokenizer: The model's tokenizer.
        conversation: Messages for the chat template, or a text. A text begins with the tokens that the tokenizer puts
            before every text.
        tools: Schemas of the tools that the assistant can call.

    Returns:
        The token ids.

    Raises:
        ValueError: The chat template refuses the messages.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from s2ft.text.prompts import encode_prompt
        >>> tokenizer = ByT5Tokenizer(chat_template="{{ messages[0]['content'] }}")
        >>> encode_prompt(tokenizer, [{"role": "user", "content": "2+3="}])
        [53, 46, 54, 64]
    """
    text = prompt_text(tokenizer, conversation, tools)
    if isinstance(conversation, str):
        rendered = Rendered(text, begin=tuple(begin_ids(tokenizer)))
    else:
        answers = (n for n, message in enumerate(conversation) if n and message["role"] == "assistant")
        earlier = [prompt_text(tokenizer, conversation[:number], tools) for number in answers]
        rendered = Rendered(text, tuple(len(prompt) for prompt in earlier if text.startswith(prompt)))
    ((ids, _),) = encode_rendered(tokenizer, [rendered])
    return ids


def end_ids(tokenizer, generation_config=None) -> list[int]:
    """Return the tokens that end an answer.

    These are the tokenizer's end of text, the end tokens of `generation_config`, and the chat template's end of turn.
    """
    ids = {tokenizer.eos_token_id}
    configured = getattr(generation_config, "eos_token_id", None)
    ids.update(configured if isinstance(configured, (list, tuple)) else [configured])
    try:
        text = render(tokenizer, PROBE[:2], template_of(tokenizer)).rstrip()
    except TemplateError:
        text = ""
    last = tokenizer(text, add_special_tokens=False)["input_ids"][-1:]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}  # also unnamed ones
    ids.update(special.union(tokenizer.all_special_ids).intersection(last))
    return sorted(ids - {None})


def pad_id(tokenizer) -> int:
    """Return the id to pad with. Padding is always masked, so the end-of-text token serves if there is no other."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
