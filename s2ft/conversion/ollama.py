"""Export for Ollama: the merged checkpoint, which Ollama imports itself, and a Modelfile."""

import logging
from dataclasses import replace
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

from s2ft.attached.loading import read_adapter
from s2ft.conversion.merged import write_checkpoint
from s2ft.export.streamed import temporary_folder
from s2ft.files.plain_text import first_line
from s2ft.text.adapter_prompts import recorded_format, standalone_template
from s2ft.text.models import load_tokenizer
from s2ft.text.prompts import PromptFormat, end_ids

logger = logging.getLogger(__name__)
MODELFILE = "Modelfile"
LONGEST = 8192  # tokens of the default context; the memory of a longer one is the user's choice
QUOTES = '"""'
SYSTEM, PROMPT, RESPONSE = "{{ .System }}", "{{ .Prompt }}", "{{ .Response }}"  # in a template of Ollama


def export(
    model_name: str, adapter: str | Path, output: str | Path, dtype: str = "auto", *, num_ctx: int | None = None
) -> str:
    """Merge an adapter and write the checkpoint with a Modelfile, from which `ollama create` makes a model.

    Ollama converts the weights. It chooses its template by the base's chat template; another one of the training is
    written for it.

    Args:
        model_name: The adapter's base: a checkpoint folder, a name on the hub, or a .gguf file.
        adapter: The adapter's folder, or the output folder of a run.
        output: The folder to write; it must not exist.
        dtype: Dtype of the merged weights; "auto" is that of the training.
        num_ctx: Tokens of the context; default: those of the model, at most 8192.

    Returns:
        A sentence about the output.

    Raises:
        FileExistsError: The output exists.
        FileNotFoundError: The base or the adapter does not exist.
        ValueError: The base or the adapter can't be loaded, `num_ctx` is less than 1, or a Modelfile can't hold the
            system prompt.
        RuntimeError: The saved checkpoint is not the merged model. Nothing is left in any of these cases.
    """
    if num_ctx is not None and num_ctx < 1:
        raise ValueError(f"num_ctx must be at least 1, got {num_ctx}")
    form = recorded_format(read_adapter(adapter).info) or PromptFormat()
    with temporary_folder(output) as folder:
        # Ollama reads the chat template in tokenizer_config.json alone
        model, tokenizer = write_checkpoint(folder, model_name, adapter, dtype, save_jinja_files=False)
        found = map(tokenizer.convert_ids_to_tokens, end_ids(tokenizer, model.generation_config))
        words = [word for word in found if word is not None]  # a generation config may have ids of no token
        context = num_ctx or min(
            getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST, LONGEST
        )
        is_new = tokenizer.chat_template != load_tokenizer(model_name).chat_template
        text = modelfile(context, words, form, template=turn(form, tokenizer.eos_token) if is_new else None)
        (folder / MODELFILE).write_text(text, encoding="utf-8")
    return (
        f"merged checkpoint and Modelfile for Ollama: ollama create {Path(output).name} -f {Path(output) / MODELFILE}"
    )


def turn(form: PromptFormat, eos: str | None) -> str | None:
    """Return the template of one turn in the language of Ollama, from the chat template of the training.

    Ollama chooses a template for the chat templates that it knows. With another one it would give the bare text.

    Args:
        form: The prompts, with a chat template.
        eos: The token that ends a text. The one that begins it is added by Ollama.

    Returns:
        The template; None, with a warning, if the chat template has no such turn.

    Example:
        >>> from s2ft.conversion.ollama import turn
        >>> from s2ft.text.prompts import PromptFormat
        >>> turn(PromptFormat(template="{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"), "<e>")
        '{{ .Prompt }}<e>{{ .Response }}<e>'
    """
    template = standalone_template(replace(form, system=form.system and SYSTEM))
    chat = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": RESPONSE}]

    def text(*messages: dict[str, str], prompt: bool) -> str:
        return render_jinja_template(
            [[*messages]], chat_template=template, add_generation_prompt=prompt, bos_token="", eos_token=eos or ""
        )[0][0]

    try:
        asked, (_, found, end) = text(chat[0], prompt=True), text(*chat, prompt=False).partition(RESPONSE)
        if PROMPT in asked and found and QUOTES not in asked + end:
            return asked + RESPONSE + end
        reason = "it changes the messages"
    except Exception as error:  # of the template
        reason = first_line(error)
    logger.warning("Ollama gets no chat template: write TEMPLATE into the Modelfile by hand (%s)", reason)
    return None


def modelfile(
    context: int | None, stops: list[str], form: PromptFormat, source: str = ".", template: str | None = None
) -> str:
    """Return the text of a Modelfile. Ollama reads the ends of a GGUF file from the file.

    Args:
        context: Tokens of the context; None for Ollama's choice.
        stops: The tokens that end an answer.
        form: The prompts: their system prompt becomes the default one, and plain text has no template.
        source: The checkpoint's folder or a GGUF file.
        template: The template of a turn; None for the one that Ollama chooses by the chat template of the source.

    Raises:
        ValueError: A Modelfile can't hold the system prompt.
    """
    template = PROMPT if form.form == "text" else template
    lines = [f"FROM {source}", *([f"TEMPLATE {QUOTES}{template}{QUOTES}"] if template else [])]
    if form.system:
        if QUOTES in form.system:
            raise ValueError(f"the system prompt has {QUOTES}, which a Modelfile can't hold")
        lines.append(f"SYSTEM {QUOTES}{form.system}{QUOTES}")
    lines += [f'PARAMETER stop "{word}"' for word in stops if not set(word) & set('"\n\\')]
    lines += [f"PARAMETER num_ctx {context}"] if context else []
    return "\n".join(lines) + "\n"
