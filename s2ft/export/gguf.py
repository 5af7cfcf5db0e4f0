"""Export of a merged model as a GGUF file, by the converter of llama.cpp where it is installed, else by our writer."""

import logging
import shutil
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import torch

from s2ft.export.gguf_writer import ARCHITECTURES, KINDS, PLAIN, kind_of_dtype, write
from s2ft.export.llama_cpp import CONVERTER, QUANTIZER, VARIABLE, Tools, convert, find_tools, quantize
from s2ft.export.merged import merged_model, temporary_folder
from s2ft.packages import check_packages
from s2ft.text.models import load_model, locate

logger = logging.getLogger(__name__)
FILE = "model.gguf"
OUTTYPES = (*PLAIN, "Q8_0")  # what the converter writes itself
WRITERS = ("auto", "llama.cpp", "s2ft")
# The largest error of a tensor, relative to its norm, by the first letters of its type. On normal weights the types
# stay at a third to two thirds of it.
LARGEST_ERROR = {"F32": 0.0, "F16": 1e-3, "BF16": 5e-3, "Q8": 0.015, "Q6": 0.04, "Q5": 0.08, "Q4": 0.15, "Q3": 0.3}
OTHERS = 0.7  # of all other types, those of 2 bits and less
# A text with the cases in which tokenizers differ
PROBE = "Some text of words, it's (not) so long\n\n  and\tsome signs: äöü 漢字 \U0001f642 <|im_start|>a+b=c"


def export(
    model_name: str,
    adapter: str | Path,
    output: str | Path,
    dtype: str = "auto",
    *,
    quantization: str | None = None,
    llama_cpp: str | None = None,
    writer: str = "auto",
) -> str:
    """Merge an adapter and write the model as output/model.gguf. The file is loaded again for a comparison.

    Args:
        model_name: The adapter's base: a checkpoint folder, a name on the hub, or a .gguf file.
        adapter: The adapter's folder, or the output folder of a run.
        output: The folder to write; it must not exist.
        dtype: Dtype of the merged weights: float32, float16 or bfloat16; "auto" is that of the training.
        quantization: Type of the weights in the file, such as "q8_0" or "q4_k_m"; default: that of the dtype.
        llama_cpp: Folder of llama.cpp; default: that of the variable LLAMA_CPP_DIR, else what is on the PATH.
        writer: "llama.cpp" uses its converter, "s2ft" our own writer, and "auto" the converter if it is installed.
            A base that is a GGUF file is always written by our own, which copies its metadata.

    Returns:
        A sentence about the output.

    Raises:
        FileExistsError: The output exists.
        FileNotFoundError: `llama_cpp` does not exist.
        ValueError: The base or the adapter can't be loaded, its family or tokenizer is not written, or a tool of
            llama.cpp is missing or fails.
        MissingPackages: The package gguf is not installed.
        RuntimeError: The file is not the merged model. Nothing is left in any of these cases.
    """
    with temporary_folder(output) as folder:
        model, tokenizer, how = write_merged(folder, model_name, adapter, dtype, quantization, llama_cpp, writer)
    return f"GGUF of the merged model, {how}: {Path(output) / FILE}"


def write_merged(
    folder: Path,
    model_name: str,
    adapter: str | Path,
    dtype: str = "auto",
    quantization: str | None = None,
    llama_cpp: str | None = None,
    writer: str = "auto",
):
    """Write model.gguf into a folder and compare it. The arguments are those of :func:`export`.

    Returns:
        The merged model, its tokenizer, and how the file was written and compared.
    """
    check_packages("s2ft export --format gguf")
    if writer not in WRITERS:
        raise ValueError(f"writer must be one of {', '.join(WRITERS)}, got {writer!r}")
    kind = _known(quantization)
    tools = find_tools(llama_cpp)
    source, options = locate(model_name)
    base = Path(source) / options["gguf_file"] if options else None
    by_converter = _uses_converter(tools, writer, base)
    _check_quantizer(kind, tools, by_converter)  # before a model is loaded
    model, tokenizer = merged_model(model_name, adapter, dtype)
    kind = kind or kind_of_dtype(model.dtype)
    if by_converter:
        try:
            names = _write(folder, kind, OUTTYPES, tools, model, partial(_convert, tools.converter, model, tokenizer))
        except ValueError as error:
            if writer != "auto" or model.config.model_type not in ARCHITECTURES:
                raise
            logger.warning("%s; s2ft writes the file instead", error)
            by_converter = False
    if not by_converter:
        names = _write(folder, kind, KINDS, tools, model, partial(_write_ourselves, model, tokenizer, base))
    compared = _compare(model, tokenizer, folder / FILE)
    return model, tokenizer, f"{kind}, written by {' and '.join(names)}, {compared}"


def _write(folder: Path, kind: str, direct: tuple[str, ...], tools: Tools, model, first: Callable) -> list[str]:
    """Write the file, through a plain one and llama-quantize if the first program does not have the type.

    Returns:
        The names of the programs that were used.
    """
    if kind in direct:
        return [first(folder / FILE, kind)]
    plain = folder / "unquantized.gguf"
    name = first(plain, kind_of_dtype(model.dtype))
    if tools.quantizer is None:
        raise ValueError(_needs_quantizer(kind))
    quantize(tools.quantizer, plain, folder / FILE, kind)
    plain.unlink()
    return [name, f"llama.cpp's {tools.quantizer.name}"]


def _known(quantization: str | None) -> str | None:
    """Return the name in capital letters. Raises ValueError for a type that llama.cpp does not have."""
    if quantization is None:
        return None
    import gguf

    known = [kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in gguf.LlamaFileType][:-1]
    name = quantization.upper()
    if name not in known:
        close = "".join(f"; did you mean {kind.lower()}?" for kind in get_close_matches(name, known, 1))
        raise ValueError(
            f"quantization must be a type of llama.cpp, such as q8_0 or q4_k_m, got {quantization!r}{close}"
        )
    return name


def _uses_converter(tools: Tools, writer: str, base: Path | None) -> bool:
    if writer == "llama.cpp":
        if base is not None:
            raise ValueError(f"writer llama.cpp: {base.name} is a GGUF file, whose metadata only the writer s2ft keeps")
        if tools.converter is None:
            raise ValueError(
                f"writer llama.cpp: {CONVERTER[0]} is not on the PATH; --llama-cpp DIR or {VARIABLE} names the folder "
                "of llama.cpp"
            )
    return writer != "s2ft" and tools.converter is not None and base is None


def _check_quantizer(kind: str | None, tools: Tools, by_converter: bool) -> None:
    if kind is not None and tools.quantizer is None and kind not in (OUTTYPES if by_converter else KINDS):
        raise ValueError(_needs_quantizer(kind))


def _needs_quantizer(kind: str) -> str:
    return (
        f"quantization {kind.lower()} needs llama.cpp's {QUANTIZER[0]}, which is not on the PATH: --llama-cpp DIR or "
        f"{VARIABLE} names the folder of llama.cpp; --writer s2ft has {', '.join(name.lower() for name in KINDS)}"
    )


def _write_ourselves(model, tokenizer, base: Path | None, file: Path, kind: str) -> str:
    write(model, tokenizer, file, base, kind)
    return "s2ft"


def _convert(converter: Path, model, tokenizer, file: Path, kind: str) -> str:
    """Save a checkpoint beside the file, convert it and remove it. Returns the name of the converter."""
    checkpoint = file.parent / "checkpoint"
    try:
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        convert(converter, checkpoint, file, kind.lower())
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)
    return f"llama.cpp's {converter.name}"


# ---- comparison ----------------------------------------------------------------------------------------


def _compare(model, tokenizer, file: Path) -> str:
    """Compare a file with the model. Returns what was compared.

    Raises:
        RuntimeError: A weight, or the tokenizer, is not that of the model.
    """
    import gguf
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    reader = gguf.GGUFReader(file)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    if reader.fields["general.architecture"].contents() not in GGUF_SUPPORTED_ARCHITECTURES:
        return _only_read(reader, file)
    again, again_tokenizer = load_model(str(file), "float32")
    errors = _errors(again.state_dict(), model.state_dict())
    largest = _largest_error(model, kinds)
    different = sorted(key for key, error in errors.items() if not error <= largest)
    if different:
        raise RuntimeError(f"the GGUF file is not the merged model: {', '.join(different[:5])} differ")
    if again_tokenizer(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"]:
        raise RuntimeError("the GGUF file's tokenizer is not the model's: it splits text into other tokens")
    worst = max(errors.values())
    return "loaded again and compared" + (f" (weights differ by {worst:.1%} at most)" if worst else "")


def _errors(saved: dict[str, torch.Tensor], model: dict[str, torch.Tensor]) -> dict[str, float]:
    """The error of each tensor relative to its norm; infinite for one that only one side has."""
    found = dict.fromkeys(saved.keys() ^ model.keys(), float("inf"))
    for key in saved.keys() & model.keys():
        expected = model[key].detach().cpu().float()
        if saved[key].shape != expected.shape:
            found[key] = float("inf")
        elif torch.equal(saved[key], expected):
            found[key] = 0.0
        else:
            found[key] = float((saved[key] - expected).norm() / expected.norm().clamp(min=1e-30))
    return found


def _largest_error(model, kinds: dict[str, str]) -> float:
    """The largest error that the types of a file explain: none if one of them is the model's own dtype."""
    exact = {"F32", kind_of_dtype(model.dtype)}
    used = [kind for kind in kinds.values() if kind not in exact]
    allowed = (LARGEST_ERROR.get(kind, LARGEST_ERROR.get(kind[:2], OTHERS)) for kind in used)
    return max(allowed, default=0.0)


def _only_read(reader, file: Path) -> str:
    """Check that the tensors of a family that transformers can't load from GGUF are finite numbers."""
    import gguf
    import numpy

    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if not numpy.isfinite(values).all():
            raise RuntimeError(f"{tensor.name} in {file.name} has NaN or infinite values")
    return f"read again, {len(reader.tensors)} tensors (transformers can't load this family for a comparison)"
