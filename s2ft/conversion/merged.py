"""A checkpoint of transformers with an adapter merged into the base."""

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import s2ft
from s2ft.attached.record import check_fits, check_plain_and_untied, new_record
from s2ft.export.streamed import (
    Changes,
    DiskSource,
    check_size,
    give_generation_config,
    temporary_folder,
    write_config,
    write_weights,
)
from s2ft.model.checkpoint import CannotStream, StoredWeights, find_file, read_from
from s2ft.text.adapter_prompts import give_prompt
from s2ft.text.models import dtype_of_base, hollow_model, load_model, load_tokenizer, locate, model_on_disk

logger = logging.getLogger(__name__)


def export(
    model_name: str, adapter: str | Path, output: str | Path, dtype: str = "auto", *, max_shard_size: str | None = None
) -> str:
    """Merge an adapter and save the checkpoint with tokenizer and generation settings.

    The weights are read, changed and written one at a time, so that memory stays below a few times the largest of
    them. A base whose weights can't be read so (a GGUF file, a pickle, conversions that transformers can't invert) is
    merged in memory, and a line of the log says why. The checkpoint is written to a temporary folder, read again and
    compared. The folder is renamed to `output` if every weight is equal bit for bit.

    Args:
        model_name: The adapter's base: a checkpoint folder, a name on the hub, or a .gguf file.
        adapter: The adapter's folder, or the output folder of a run.
        output: The folder to write; it must not exist.
        dtype: Dtype of the weights; "auto" is that of the training.
        max_shard_size: The largest file of weights, for example "2GB"; default: that of transformers.

    Returns:
        A sentence about the output.

    Raises:
        FileExistsError: The output exists.
        ValueError: The base or the adapter can't be loaded.
        FileNotFoundError: The base or the adapter does not exist.
        RuntimeError: The saved checkpoint is not the merged model. Nothing is left in any of these cases.
    """
    with temporary_folder(output) as folder:
        write_checkpoint(folder, model_name, adapter, dtype, max_shard_size)
    return f"merged checkpoint, loaded again and compared: {output}"


def write_checkpoint(
    folder: Path,
    model_name: str,
    adapter: str | Path,
    dtype: str = "auto",
    max_shard_size: str | None = None,
    **of_tokenizer: bool,
):
    """Write a merged checkpoint into an empty folder and compare it, see :func:`export`.

    Args:
        folder: The folder.
        model_name: The adapter's base.
        adapter: The adapter's folder.
        dtype: Dtype of the weights; "auto" is that of the training.
        max_shard_size: The largest file of weights.
        of_tokenizer: Options with which the tokenizer is saved.

    Returns:
        The model, which may be on the meta device, and its tokenizer.
    """
    if max_shard_size is not None:
        check_size(max_shard_size)
    saved = s2ft.read_adapter(adapter)  # before the base is opened, so that a damaged adapter is found at once
    try:
        model, weights = model_on_disk(model_name, dtype_of_base(saved, dtype))
        tokenizer = give_prompt(load_tokenizer(model_name), saved.info, f"adapter {saved.name!r}")
        compare = write_merged(folder, model, weights, saved, max_shard_size)
        give_generation_config(model, locate(model_name)[0])
        write_config(folder, model)
    except CannotStream as reason:
        logger.info("merging in memory, which has to hold the whole model: %s", reason)
        model, tokenizer = merged_model(model_name, adapter, dtype)
        model.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
        compare = partial(_compare, model, folder)
    tokenizer.save_pretrained(folder, **of_tokenizer)
    source, options = locate(model_name)
    # transformers 5 saves tokenizer.json alone; beside a .gguf file it may be another model's
    if (vocabulary := None if options else find_file(source, "tokenizer.model")) is not None:
        shutil.copy(vocabulary, folder)  # llama.cpp's converter needs it for some families
    compare()
    hollow_model(str(folder))  # an error says what is wrong
    if load_tokenizer(str(folder)).chat_template != tokenizer.chat_template:
        raise RuntimeError("the saved checkpoint has another chat template than the merged model")
    return model, tokenizer


def write_merged(
    folder: Path, model, weights: StoredWeights, adapter: s2ft.Adapter, max_shard_size: str | None
) -> Callable[[], None]:
    """Write the merged weights one at a time, see :func:`s2ft.export.streamed.write_weights`."""
    with read_from(model, weights):
        record = new_record(model, adapter.couplings)
        check_fits(adapter, model, record)
    check_plain_and_untied(model, record, adapter.deltas)
    passes = {name: [[(delta, 1.0)]] for name, delta in adapter.deltas.items()}
    return write_weights(
        folder, model, DiskSource(weights), Changes(record.projections, passes, adapter.extra_weights), max_shard_size
    )


def merged_model(model_name: str, adapter: str | Path, dtype: str = "auto"):
    """Load a base and merge an adapter into it.

    Returns:
        The plain model, and its tokenizer with the chat template that the adapter was trained with.
    """
    saved = s2ft.read_adapter(adapter)  # before the model is loaded, so that a damaged adapter is found at once
    model, tokenizer = load_model(model_name, dtype_of_base(saved, dtype))
    s2ft.load_adapter(model, saved)
    return s2ft.merge(model), give_prompt(tokenizer, saved.info, f"adapter {saved.name!r}")


def _compare(model, folder: Path) -> None:
    saved, merged = type(model).from_pretrained(folder, dtype="auto").state_dict(), model.state_dict()
    different = sorted(saved.keys() ^ merged.keys()) or sorted(
        key
        for key, weight in merged.items()
        if weight.dtype != saved[key].dtype or not torch.equal(weight.cpu(), saved[key])
    )
    if different:
        raise RuntimeError(f"the saved checkpoint is not the merged model: {', '.join(different[:5])} differ")
