"""Hand the work to vLLM: every adapter as a LoRA, and the command that serves them."""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import s2ft
from s2ft.adapter.folders import adapters_in
from s2ft.text.models import load_model

logger = logging.getLogger(__name__)
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank can be


@dataclass(frozen=True)
class Exported:
    """An adapter as a LoRA folder."""

    name: str
    folder: Path
    rank: int


def export(model_name: str, directory: str, target: Path) -> list[Exported]:
    """Every adapter of the directory as a LoRA in `target`. Raises: ValueError for one that is none, or too wide."""
    lora = _exporter()
    folders = adapters_in(Path(directory))
    if not folders:
        raise ValueError(f"{directory} has no adapters")
    model, _ = load_model(model_name)
    exported = []
    for name, folder in folders.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about ranks; said below, by the adapter's name
            lora.write(s2ft.adapter.read_adapter(folder), model, target / name)
        exported.append(Exported(name, target / name, _rank(target / name)))
        if exported[-1].rank > RANKS[-1]:
            raise ValueError(f"adapter {name!r} needs rank {exported[-1].rank}; vLLM's limit is {RANKS[-1]}")
    return exported


def command(model: str, adapters: list[Exported], host: str, port: int, base: str, key: str | None = None) -> list[str]:
    """The command line of ``vllm serve``."""
    rank = next(rank for rank in RANKS if rank >= max(one.rank for one in adapters))
    return [
        "vllm",
        "serve",
        model,
        "--served-model-name",
        base,
        "--enable-lora",
        "--max-lora-rank",
        str(rank),
        "--host",
        host,
        "--port",
        str(port),
        *(["--api-key", key] if key else []),
        "--lora-modules",
        *(f"{one.name}={one.folder}" for one in adapters),
    ]


def _exporter():
    try:
        from s2ft.adapter.formats import lora
    except ImportError as error:
        raise ValueError(f"this s2ft can't write LoRA ({error}), which vLLM needs") from error
    return lora


def _rank(folder: Path) -> int:
    import json

    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"]
