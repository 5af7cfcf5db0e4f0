"""Export for Ollama: a GGUF file of the merged model, and a Modelfile with its template, system prompt and limits."""

from pathlib import Path

from s2ft.adapter import read_adapter
from s2ft.export.gguf import FILE, write_merged
from s2ft.export.go_template import Message, NotWritten, pieces_of
from s2ft.export.merged import temporary_folder
from s2ft.text.adapter_prompts import recorded_format
from s2ft.text.prompts import end_ids

MODELFILE = "Modelfile"
LONGEST = 8192  # tokens of the default context; the memory of a longer one is the user's choice
QUOTES = '"""'


def export(
    model_name: str,
    adapter: str | Path,
    output: str | Path,
    dtype: str = "auto",
    *,
    quantization: str | None = None,
    llama_cpp: str | None = None,
    writer: str = "auto",
    num_ctx: int | None = None,
) -> str:
    """Merge an adapter and write output/model.gguf and output/Modelfile.

    Args:
        model_name: As for :func:`s2ft.export.gguf.export`.
        adapter: As there.
        output: As there.
        dtype: As there.
        quantization: As there.
        llama_cpp: As there.
        writer: As there.
        num_ctx: Tokens of the context; default: those of the model, at most 8192.

    Returns:
        A sentence about the output.

    Raises:
        ValueError: As there, or `num_ctx` is less than 1.
        FileExistsError: As there.
        FileNotFoundError: As there.
        MissingPackages: As there.
        RuntimeError: As there. Nothing is left in any of these cases.
    """
    if num_ctx is not None and num_ctx < 1:
        raise ValueError(f"num_ctx must be at least 1, got {num_ctx}")
    form = recorded_format(read_adapter(adapter).info)
    with temporary_folder(output) as folder:
        model, tokenizer, how = write_merged(folder, model_name, adapter, dtype, quantization, llama_cpp, writer)
        context = num_ctx or min(getattr(model.config, "max_position_embeddings", None) or LONGEST, LONGEST)
        text, note = modelfile(
            tokenizer,
            context,
            system=form.system if form else None,
            plain=form is not None and form.form == "text",
            stops=end_ids(tokenizer, model.generation_config),
        )
        (folder / MODELFILE).write_text(text, encoding="utf-8")
    place = Path(output)
    return f"GGUF of the merged model, {how}, and {note}: ollama create {place.name} -f {place / MODELFILE}"


def modelfile(
    tokenizer, context: int, system: str | None = None, plain: bool = False, stops: list[int] | None = None
) -> tuple[str, str]:
    """Return the text of a Modelfile, and a few words about its template.

    Args:
        tokenizer: The tokenizer, with the chat template of the model.
        context: Tokens of the context.
        system: The default system prompt.
        plain: Whether the model continues plain text, so that there is no template.
        stops: The token ids that end an answer.
    """
    lines = [f"FROM ./{FILE}"]
    if plain:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
        note = "a Modelfile for plain text"
    else:
        template, note = _template(tokenizer)
        lines += [f"# {note}"] if template is None else [f"TEMPLATE {QUOTES}{template}{QUOTES}"]
    if system:
        if QUOTES in system:
            raise ValueError(f"the system prompt has {QUOTES}, which a Modelfile can't hold")
        lines.append(f"SYSTEM {QUOTES}{system}{QUOTES}")
    words = [tokenizer.convert_ids_to_tokens(token) for token in stops or ()]
    lines += [f'PARAMETER stop "{word}"' for word in words if not set(word) & set('"\n\\')]
    lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n", note


def _template(tokenizer) -> tuple[str | None, str]:
    """Return the template of Ollama, or None, and a few words about it."""
    if not isinstance(tokenizer.chat_template, str):
        return None, "no TEMPLATE: the tokenizer has no chat template"
    try:
        found = pieces_of(lambda messages, asks: _rendered(tokenizer, messages, asks)).to_go()
    except NotWritten as error:
        return None, f"no TEMPLATE, Ollama uses its own: the chat template can't be written for it ({error})"
    except Exception as error:  # a template can raise anything
        first = str(error).strip().split("\n")[0] or type(error).__name__
        return None, f"no TEMPLATE, Ollama uses its own: the chat template refuses a test conversation ({first})"
    if QUOTES in found:
        return None, f"no TEMPLATE, Ollama uses its own: the chat template has {QUOTES}"
    dated = ", with the date of this export" if "strftime_now" in tokenizer.chat_template else ""
    return found, f"a Modelfile whose template renders as the chat template{dated}"


def _rendered(tokenizer, messages: list[Message], asks: bool) -> str:
    """Render the chat template, without the token at the start that llama.cpp adds itself."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
    bos = tokenizer.bos_token
    adds = bos is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if adds else text
