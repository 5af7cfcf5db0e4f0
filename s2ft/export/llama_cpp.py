"""The tools of llama.cpp: its converter of checkpoints, and its quantizer. They are found and called, not built."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "LLAMA_CPP_DIR"
CONVERTER = ("convert_hf_to_gguf.py", "convert-hf-to-gguf.py")
QUANTIZER = ("llama-quantize", "llama-quantize.exe")
PLACES = (".", "build/bin", "bin", "build/bin/Release", "libexec")  # below the folder, for a built source tree too


@dataclass(frozen=True)
class Tools:
    """What was found of llama.cpp.

    Attributes:
        converter: The script convert_hf_to_gguf.py, or None.
        quantizer: The program llama-quantize, or None.
    """

    converter: Path | None
    quantizer: Path | None


def find_tools(folder: str | Path | None = None) -> Tools:
    """Look for the tools of llama.cpp.

    Args:
        folder: The folder of llama.cpp. Default: that of the variable LLAMA_CPP_DIR, else what is on the PATH.

    Raises:
        FileNotFoundError: The folder does not exist or has none of the tools.
    """
    named = folder if folder is not None else os.environ.get(VARIABLE) or None
    if named is None:
        return Tools(_on_path(CONVERTER), _on_path(QUANTIZER))
    what = f"llama_cpp {named}" if folder is not None else f"{VARIABLE}={named}"
    root = Path(named).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{what} is no folder: name the folder of llama.cpp")
    found = Tools(_below(root, CONVERTER), _below(root, QUANTIZER))
    if found == Tools(None, None):
        raise FileNotFoundError(f"{what} has neither {CONVERTER[0]} nor {QUANTIZER[0]} (nor build/bin/{QUANTIZER[0]})")
    return found


def _on_path(names: tuple[str, ...]) -> Path | None:
    found = next(filter(None, map(shutil.which, names)), None)
    return Path(found) if found else None


def _below(root: Path, names: tuple[str, ...]) -> Path | None:
    files = (root / place / name for place in PLACES for name in names)
    return next((file for file in files if file.is_file()), None)


def convert(converter: Path, checkpoint: Path, file: Path, outtype: str) -> None:
    """Convert a checkpoint of transformers by llama.cpp's script, in a process of its own.

    Args:
        converter: The script.
        checkpoint: The folder of the checkpoint.
        file: The file to write.
        outtype: "f32", "f16", "bf16" or "q8_0".

    Raises:
        ValueError: The script refused the checkpoint or failed. The message has its last line.
    """
    _run([sys.executable, str(converter), str(checkpoint), "--outfile", str(file), "--outtype", outtype], file)


def quantize(quantizer: Path, source: Path, file: Path, kind: str) -> None:
    """Quantize a GGUF file by llama.cpp's program.

    Args:
        quantizer: The program.
        source: The file to read, in float32, float16 or bfloat16.
        file: The file to write.
        kind: The quantization by its name in llama.cpp, such as Q4_K_M.

    Raises:
        ValueError: The program failed. The message has its last line.
    """
    _run([str(quantizer), str(source), str(file), kind], file)


def _run(command: list[str], file: Path) -> None:
    name = Path(command[1] if command[0] == sys.executable else command[0]).name
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise ValueError(f"llama.cpp's {name} can't be started: {error}") from error
    if ended.returncode or not file.is_file():
        lines = [line for line in f"{ended.stdout}\n{ended.stderr}".splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "it said nothing"
        raise ValueError(f"llama.cpp's {name} failed with status {ended.returncode}: {last}")
