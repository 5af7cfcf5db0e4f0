"""A stock checkpoint of a model with an adapter merged in."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import s2ft
from s2ft.packages import check_packages
from s2ft.text.models import dtype_of_base, load_model, locate


def merge_checkpoint(
    model_name: str, adapter: str | Path, output: str | Path, dtype: str = "auto", max_shard_size: str | None = None
) -> None:
    """Merge, save with tokenizer and generation settings, load it again with plain transformers and compare.

    Written beside `output` and renamed when every weight came back bit for bit.

    Args: max_shard_size: of a file of weights, "2GB" say; default: transformers'.
    Raises: FileExistsError if `output` exists; ValueError or FileNotFoundError for a model or adapter
    that doesn't load; RuntimeError if the saved checkpoint is not the merged model. Nothing is left then.
    """
    with folder_beside(output) as beside:
        model, tokenizer = merged(model_name, adapter, dtype)
        model.save_pretrained(beside, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
        tokenizer.save_pretrained(beside)
        _compare(model, beside)


def merged(model_name: str, adapter: str | Path, dtype: str = "auto"):
    """(plain model with the adapter merged in, tokenizer). Raises: ValueError or FileNotFoundError."""
    saved = s2ft.adapter.read_adapter(adapter)  # a broken adapter is found before a model is loaded
    model, tokenizer = load_model(model_name, dtype_of_base(saved, dtype))
    s2ft.load_adapter(model, adapter)
    return s2ft.merge(model), tokenizer


@contextmanager
def folder_beside(output: str | Path) -> Iterator[Path]:
    """An empty folder that becomes `output` where nothing is raised, and is removed where something is.

    Raises: FileExistsError if `output` exists; FileNotFoundError where its folder doesn't.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"output {output} exists")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"output {output} is in a folder that doesn't exist")
    beside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
    try:
        yield beside
        beside.chmod(0o777 & ~_umask())  # mkdtemp's folder is the user's alone
        os.rename(beside, output)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _compare(model, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    saved, merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict(), model.state_dict()
    different = sorted(saved.keys() ^ merged.keys()) or sorted(
        key
        for key, weight in merged.items()
        if weight.dtype != saved[key].dtype or not torch.equal(weight.cpu(), saved[key])
    )
    if different:
        raise RuntimeError(f"the saved checkpoint is not the merged model: {', '.join(different[:5])} differ")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---- GGUF ----------------------------------------------------------------------------------------------

PROBE = "Some text of words, it's (not) so long\n\n  and\tsome signs: äöü 漢字 \U0001f642 <|im_start|>a+b=c"


def merge_gguf(model_name: str, adapter: str | Path, output: str | Path, dtype: str = "auto") -> Path:
    """Merge, write as `output`/model.gguf, load it again with plain transformers and compare.

    Returns: the file. Raises: as :func:`merge_checkpoint`; ValueError for a family or a tokenizer that is not written;
    MissingPackages without the package gguf.
    """
    from s2ft.export import gguf

    check_packages("s2ft export --format gguf")
    with folder_beside(output) as beside:
        model, tokenizer = merged(model_name, adapter, dtype)
        source, options = locate(model_name)
        base = Path(source) / options["gguf_file"] if options else None
        gguf.write(model, tokenizer, beside / "model.gguf", base)
        _compare_gguf(model, tokenizer, beside / "model.gguf")
    return Path(output) / "model.gguf"


def _compare_gguf(model, tokenizer, file: Path) -> None:
    again, words = load_model(str(file), "float32")
    saved = again.state_dict()
    different = sorted(saved.keys() ^ model.state_dict().keys()) or sorted(
        key for key, weight in model.state_dict().items() if not torch.equal(weight.cpu().float(), saved[key])
    )
    if different:
        raise RuntimeError(f"the GGUF file is not the merged model: {', '.join(different[:5])} differ")
    if words(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"]:
        raise RuntimeError("the GGUF file's tokenizer is not the model's: it cuts text in other tokens")
