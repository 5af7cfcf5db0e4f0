"""A stock checkpoint of a model with an adapter merged in."""
import os
import shutil
import tempfile
from pathlib import Path

import torch

import s2ft
from s2ft.train.models import dtype_of_base, load_model


def merge_checkpoint(model_name: str, adapter: str | Path, output: str | Path, dtype: str = "auto") -> None:
    """Merge, save with tokenizer and generation settings, load it again with plain transformers and compare.

    Written beside `output` and renamed when every weight came back bit for bit.
    Raises: FileExistsError if `output` exists; ValueError or FileNotFoundError for a model or adapter
    that doesn't load; RuntimeError if the saved checkpoint is not the merged model. Nothing is left then.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"output {output} exists")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"output {output} is in a folder that doesn't exist")
    saved = s2ft.adapter.read_adapter(adapter)   # a broken adapter is found before a model is loaded
    model, tokenizer = load_model(model_name, dtype_of_base(saved, dtype))
    s2ft.load_adapter(model, adapter)
    model = s2ft.merge(model)
    beside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
    try:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        _compare(model, beside)
        beside.chmod(0o777 & ~_umask())   # mkdtemp's folder is the user's alone
        os.rename(beside, output)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _compare(model, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    saved, merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict(), model.state_dict()
    different = sorted(saved.keys() ^ merged.keys()) or sorted(
        key for key, weight in merged.items()
        if weight.dtype != saved[key].dtype or not torch.equal(weight.cpu(), saved[key]))
    if different:
        raise RuntimeError(f"the saved checkpoint is not the merged model: {', '.join(different[:5])} differ")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
