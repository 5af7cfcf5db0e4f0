"""Export for Ollama: the merged checkpoint, which Ollama imports itself, and a Modelfile."""

from pathlib import Path

from s2ft.attached.loading import read_adapter
from s2ft.conversion.merged import write_checkpoint
from s2ft.export.streamed import temporary_folder
from s2ft.text.adapter_prompts import recorded_format
from s2ft.text.prompts import PromptFormat, end_ids

MODELFILE = "Modelfile"
LONGEST = 8192  # tokens of the default context; the memory of a longer one is the user's choice
QUOTES = '"""'


def export(
    model_name: str, adapter: str | Path, output: str | Path, dtype: str = "auto", *, num_ctx: int | None = None
) -> str:
    """Merge an adapter and write the checkpoint with a Modelfile, from which `ollama create` makes a model.

    Ollama chooses its template by the chat template of the checkpoint, and converts the weights.

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
        words = [tokenizer.convert_ids_to_tokens(token) for token in end_ids(tokenizer, model.generation_config)]
        context = num_ctx or min(getattr(model.config, "max_position_embeddings", None) or LONGEST, LONGEST)
        (folder / MODELFILE).write_text(modelfile(context, words, form), encoding="utf-8")
    place = Path(output)
    return f"merged checkpoint and Modelfile for Ollama: ollama create {place.name} -f {place / MODELFILE}"


def modelfile(context: int | None, stops: list[str], form: PromptFormat, source: str = ".") -> str:
    """Return the text of a Modelfile. Ollama reads the template of a GGUF file and its ends from the file.

    Args:
        context: Tokens of the context; None for Ollama's choice.
        stops: The tokens that end an answer.
        form: The prompts: their system prompt becomes the default one, and plain text has no template.
        source: The checkpoint's folder or a GGUF file.

    Raises:
        ValueError: A Modelfile can't hold the system prompt.
    """
    lines = [f"FROM {source}", *(['TEMPLATE """{{ .Prompt }}"""'] if form.form == "text" else [])]
    if form.system:
        if QUOTES in form.system:
            raise ValueError(f"the system prompt has {QUOTES}, which a Modelfile can't hold")
        lines.append(f"SYSTEM {QUOTES}{form.system}{QUOTES}")
    lines += [f'PARAMETER stop "{word}"' for word in stops if not set(word) & set('"\n\\')]
    lines += [f"PARAMETER num_ctx {context}"] if context else []
    return "\n".join(lines) + "\n"
