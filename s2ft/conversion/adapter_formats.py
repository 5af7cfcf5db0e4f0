"""Adapters in the formats of other tools: written, or read and saved in the format of s2ft."""

from pathlib import Path
from types import ModuleType

import torch

from s2ft.adapter import native
from s2ft.adapter.adapter import Adapter
from s2ft.adapter.formats import ADAPTER_FORMATS
from s2ft.attached.loading import read_adapter
from s2ft.attached.saving import model_info
from s2ft.export.streamed import temporary_folder
from s2ft.text.adapter_prompts import give_prompt, recorded_format
from s2ft.text.models import dtype_of_base, load_model

TEMPLATE = "chat_template.jinja"  # transformers' name of the file


def export(
    model_name: str, adapter: str | Path, output: str | Path, dtype: str = "auto", *, format_name: str, **options
) -> str:
    """Write an adapter in another format, read it again and compare.

    Args:
        model_name: The adapter's base: a checkpoint folder, a name on the hub, or a .gguf file.
        adapter: The adapter's folder, or the output folder of a run.
        output: The folder to write; it must not exist.
        dtype: Dtype of the base's weights; "auto" is that of the training.
        format_name: Key of ADAPTER_FORMATS.
        options: Options of the format.

    Returns:
        A sentence about the output.

    Raises:
        FileExistsError: The output exists.
        ValueError: The base or the adapter can't be loaded, or the adapter can't be written in this format.
        RuntimeError: The files read again are not the adapter. Nothing is left in any of these cases.
    """
    target = ADAPTER_FORMATS[format_name].module
    original = read_adapter(adapter)
    with temporary_folder(output) as folder:
        model, tokenizer = load_model(model_name, dtype_of_base(original, dtype))
        target.write(original, folder, model, **options)
        prompt = recorded_format(original.info)
        if prompt is not None and prompt.template:  # vLLM takes the file by --chat-template
            give_prompt(tokenizer, original.info, f"adapter {original.name!r}")
            (folder / TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")
        _check_equal(target.read(folder, model), original)
        return _sentence(target, folder, output)


def convert(
    model_name: str, source: str | Path, output: str | Path, dtype: str = "auto", *, format_name: str, name: str | None
) -> str:
    """Read an adapter in another format, save it in the format of s2ft, read it again and compare.

    Args:
        model_name: The adapter's base: a checkpoint folder, a name on the hub, or a .gguf file.
        source: The folder to read.
        output: The folder to write; it must not exist.
        dtype: Dtype of the base's weights; "auto" is that of the checkpoint.
        format_name: Key of ADAPTER_FORMATS.
        name: Name of the new adapter; default: that of the source, or "default".

    Returns:
        A sentence about the output.

    Raises:
        FileExistsError: The output exists.
        ValueError: The base can't be loaded, or the source is not an adapter of it. Nothing is left.
    """
    with temporary_folder(output) as folder:
        model, _ = load_model(model_name, dtype)
        adapter = ADAPTER_FORMATS[format_name].module.read(source, model, name)
        adapter.info |= {**model_info(model), "base_model": model_name}
        native.write(adapter, folder)
        _check_equal(native.read(folder), adapter)
        return _sentence(native, folder, output)


def _sentence(form: ModuleType, folder: Path, output: str | Path) -> str:
    size = sum(file.stat().st_size for file in folder.iterdir())
    return f"{form.describe(folder)}, {size:,} bytes, read again and compared: {output}"


def _check_equal(found: Adapter, expected: Adapter) -> None:
    same = (
        found.selection == expected.selection
        and found.deltas.keys() == expected.deltas.keys()
        and found.extra_weights.keys() == expected.extra_weights.keys()
        and all(
            torch.equal(delta.index, expected.deltas[path].index)
            and torch.equal(delta.values.double(), expected.deltas[path].values.cpu().double())
            for path, delta in found.deltas.items()
        )
    )
    if not same:
        raise RuntimeError("the files that were written do not hold the adapter")
