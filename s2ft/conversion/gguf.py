"""Export of a merged model as a GGUF file, by the tools of llama.cpp.

The converter of checkpoints and the quantizer are found and called, not built.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from s2ft.config import did_you_mean, refuse
from s2ft.conversion.merged import write_checkpoint
from s2ft.export.streamed import temporary_folder
from s2ft.packages import check_packages

VARIABLE = "LLAMA_CPP_DIR"
CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"
PLACES = (".", "build/bin", "bin", "libexec")  # below the folder, for a built source tree too
FILE = "model.gguf"
OUTTYPES = ("F32", "F16", "BF16", "Q8_0")  # what the converter writes itself
EXACT = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # the types that hold a dtype's values


def export(
    model_name: str,
    adapter: str | Path,
    output: str | Path,
    dtype: str = "auto",
    *,
    quantization: str | None = None,
    llama_cpp: str | None = None,
) -> str:
    """Merge an adapter and write the model as output/model.gguf. The file is read again.

    Args:
        model_name: The adapter's base: a checkpoint folder, a name on the hub, or a .gguf file.
        adapter: The adapter's folder, or the output folder of a run.
        output: The folder to write; it must not exist.
        dtype: Dtype of the merged weights: float32, float16 or bfloat16; "auto" is that of the training.
        quantization: Type of the weights in the file, such as "q8_0" or "q4_k_m"; default: that of the dtype.
        llama_cpp: Folder of llama.cpp; default: that of the variable LLAMA_CPP_DIR, else what is on the PATH.

    Returns:
        A sentence about the output.

    Raises:
        FileExistsError: The output exists.
        FileNotFoundError: `llama_cpp` does not exist.
        ValueError: The base or the adapter can't be loaded, or a tool of llama.cpp is missing or fails.
        MissingPackages: The package gguf is not installed.
        RuntimeError: The file has NaN or infinite values. Nothing is left in any of these cases.
    """
    check_packages("s2ft export --format gguf")
    kind = None if quantization is None else _known(quantization)
    converter, quantizer = find_tools(llama_cpp)
    where = f"--llama-cpp DIR or {VARIABLE} names the folder of llama.cpp, of https://github.com/ggml-org/llama.cpp"
    with temporary_folder(output) as folder:
        refuse(
            (
                converter is None,
                f"a GGUF file needs llama.cpp's {CONVERTER}, which is not on the PATH: {where}. --format merged writes "
                "the checkpoint that it converts, and --format ollama one that Ollama imports itself",
            ),
            (
                kind not in (None, *OUTTYPES) and quantizer is None,
                f"quantization {quantization} needs llama.cpp's {QUANTIZER}, which is not on the PATH: {where}; "
                f"without it there are {', '.join(OUTTYPES).lower()}",
            ),
        )
        checkpoint = folder / "checkpoint"
        checkpoint.mkdir()
        model, _ = write_checkpoint(checkpoint, model_name, adapter, dtype)
        kind = kind or EXACT[model.dtype]
        _write(folder, kind, converter, quantizer, EXACT[model.dtype])
        read = _check(folder / FILE)
    names = CONVERTER if kind in OUTTYPES else f"{CONVERTER} and {QUANTIZER}"
    return f"GGUF of the merged model, {kind}, written by llama.cpp's {names}, {read}: {Path(output) / FILE}"


def _known(quantization: str) -> str:
    """Return the name in capital letters. Raises ValueError for a type that llama.cpp does not have."""
    import gguf

    known = [kind.name.removeprefix("MOSTLY_").removeprefix("ALL_").lower() for kind in gguf.LlamaFileType][:-1]
    name = quantization.lower()
    if name not in known:
        raise ValueError(
            "quantization must be a type of llama.cpp, such as q8_0 or q4_k_m, got "
            f"{quantization!r}{did_you_mean(name, known)}"
        )
    return name.upper()


def _write(folder: Path, kind: str, converter: Any, quantizer: Any, exact: str) -> None:
    """Write the file from the checkpoint, through a plain one of type `exact` if only llama-quantize has the type."""
    checkpoint, file = folder / "checkpoint", folder / FILE
    first, by_converter = (file, kind) if kind in OUTTYPES else (folder / "plain.gguf", exact)
    script = [sys.executable, converter, checkpoint, "--outfile", first, "--outtype", by_converter.lower()]
    _run(script, CONVERTER, first)
    shutil.rmtree(checkpoint)
    if first != file:
        _run([quantizer, first, file, kind], QUANTIZER, file)
        first.unlink()


# ---- the tools of llama.cpp -----------------------------------------------------------------------------------


def find_tools(folder: str | Path | None = None) -> tuple[str | None, str | None]:
    """Look for the tools of llama.cpp.

    Args:
        folder: The folder of llama.cpp. Default: that of the variable LLAMA_CPP_DIR, else what is on the PATH.

    Returns:
        The script that converts checkpoints, which may lack the right to be run, and the program that quantizes; None
        for one that is missing.

    Raises:
        FileNotFoundError: The folder does not exist or has none of the tools.
    """
    named = folder if folder is not None else os.environ.get(VARIABLE) or None
    if named is None:
        return shutil.which(CONVERTER, os.F_OK), shutil.which(QUANTIZER)
    what = f"llama_cpp {named}" if folder is not None else f"{VARIABLE}={named}"
    root = Path(named).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{what} is no folder: name the folder of llama.cpp")
    places = os.pathsep.join(str(root / place) for place in PLACES)
    converter, quantizer = (shutil.which(name, os.F_OK, places) for name in (CONVERTER, QUANTIZER))
    if converter is None and quantizer is None:
        raise FileNotFoundError(f"{what} has neither {CONVERTER} nor {QUANTIZER} (nor build/bin/{QUANTIZER})")
    return converter, quantizer


def _run(command: list[Any], name: str, file: Path) -> None:
    """Run a program of llama.cpp that writes a file. Raises ValueError with its last line if it fails."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise ValueError(f"llama.cpp's {name} can't be started: {error}") from error
    if ended.returncode or not file.is_file():
        lines = [line for line in f"{ended.stdout}\n{ended.stderr}".splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "it said nothing"
        raise ValueError(f"llama.cpp's {name} failed with status {ended.returncode}: {last}")


# ---- reading it again ----------------------------------------------------------------------------------


def _check(file: Path) -> str:
    """Read the file again. Raises RuntimeError if a tensor has something else than finite numbers."""
    import gguf
    import numpy

    reader = gguf.GGUFReader(file)
    for tensor in reader.tensors:
        if not numpy.isfinite(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).all():
            raise RuntimeError(f"{tensor.name} in {file.name} has NaN or infinite values")
    return f"{len(reader.tensors)} tensors read again"
