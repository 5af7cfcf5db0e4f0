"""Serving by vLLM: every adapter is exported as a LoRA, and vLLM is started with the command of this module."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import s2ft
from s2ft.adapter.formats import lora
from s2ft.serve.sources import source_of
from s2ft.text.models import load_model


@dataclass(frozen=True)
class Exported:
    """An adapter that was exported as a LoRA.

    Attributes:
        name: Name of the adapter.
        folder: The LoRA's folder.
        rank: The LoRA's rank.
    """

    name: str
    folder: Path
    rank: int


def export(model_name: str, sources: Sequence[str], target: Path) -> list[Exported]:
    """Export every adapter of some sources as a LoRA.

    Args:
        model_name: The adapters' base: a checkpoint folder, a name on the hub, or a .gguf file.
        sources: Directories of adapters or of runs, or single ones, see :func:`s2ft.serve.sources.source_of`.
        target: The folder to write to; each LoRA is a folder in it.

    Returns:
        The exported adapters, sorted by name.

    Raises:
        ValueError: There are no adapters, an adapter can't be exported, or its rank is too high for vLLM.
    """
    folders = {name: folder for source in map(source_of, sources) for name, folder in source.folders().items()}
    if not folders:
        raise ValueError(f"{', '.join(sources)}: there are no adapters")
    model, _ = load_model(model_name)
    exported = []
    for name, folder in folders.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a rank that is too high is an error below, with the adapter's name
            lora.write(s2ft.read_adapter(folder), target / name, model)
        exported.append(Exported(name, target / name, lora.rank_of(target / name)))
        if lora.vllm_rank(exported[-1].rank) is None:
            raise ValueError(f"adapter {name!r} needs rank {exported[-1].rank}; vLLM's limit is {lora.VLLM_RANKS[-1]}")
    return exported


def command(model: str, adapters: list[Exported], host: str, port: int, base: str, key: str | None = None) -> list[str]:
    """Return the command line of ``vllm serve``.

    Args:
        model: The base, as vLLM loads it.
        adapters: The exported adapters.
        host: Address to listen on.
        port: Port to listen on.
        base: The name under which the base is served.
        key: The API key that clients must send; default: none.
    """
    rank = lora.vllm_rank(max(one.rank for one in adapters))
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
