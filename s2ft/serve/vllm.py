"""Serving by vLLM: every adapter is exported as a LoRA, and vLLM is started with the command of this module."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import s2ft
from s2ft.adapter.formats import lora
from s2ft.serve.sources import source_of
from s2ft.text.adapter_prompts import recorded_format, standalone_template
from s2ft.text.models import load_model
from s2ft.text.prompts import PromptFormat

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """An adapter that was exported as a LoRA.

    Attributes:
        name: Name of the adapter.
        folder: The LoRA's folder.
        rank: The LoRA's rank.
        prompt: The format of prompts that it was trained with, or None for an adapter that records none.
    """

    name: str
    folder: Path
    rank: int
    prompt: PromptFormat | None = None


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
            adapter = s2ft.read_adapter(folder)
            lora.write(adapter, target / name, model)
        prompt = recorded_format(adapter.info, f"adapter {name!r}")
        exported.append(Exported(name, target / name, lora.rank_of(target / name), prompt))
        if lora.vllm_rank(exported[-1].rank) is None:
            raise ValueError(f"adapter {name!r} needs rank {exported[-1].rank}; vLLM's limit is {lora.VLLM_RANKS[-1]}")
    return exported


def write_template(adapters: Sequence[Exported], folder: Path) -> Path | None:
    """Write the chat template that all adapters were trained with, since vLLM has one template for all of them.

    Args:
        adapters: The exported adapters.
        folder: The folder to write to.

    Returns:
        The file, or None if the adapters record no template, or different ones, which is logged.
    """
    templates = {one.prompt and standalone_template(one.prompt) for one in adapters}
    if len(templates) > 1:
        logger.warning(
            "warning: the adapters were trained with different prompts, and vLLM has one chat template: it uses the "
            "base's, or the one of each request; --engine transformers uses each adapter's own"
        )
        return None
    (template,) = templates
    if template is None:
        return None
    file = folder / "chat_template.jinja"
    file.write_text(template, encoding="utf-8")
    return file


def command(
    model: str,
    adapters: list[Exported],
    host: str,
    port: int,
    base: str,
    key: str | None = None,
    template: Path | None = None,
) -> list[str]:
    """Return the command line of ``vllm serve``.

    Args:
        model: The base, as vLLM loads it.
        adapters: The exported adapters.
        host: Address to listen on.
        port: Port to listen on.
        base: The name under which the base is served.
        key: The API key that clients must send; default: none.
        template: File with the chat template. None uses the base's own.
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
        *(["--chat-template", str(template)] if template else []),
        "--lora-modules",
        *(f"{one.name}={one.folder}" for one in adapters),
    ]
