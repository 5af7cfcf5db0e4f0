"""Adapters on the Hugging Face hub: finding the folder of an adapter, and its model card."""

import re
from pathlib import Path
from typing import Any

from s2ft.adapter.adapter import Adapter
from s2ft.adapter.folders import adapter_folder
from s2ft.adapter.formats import native
from s2ft.files.writing import replace_file

FILES = [native.CONFIG, native.TENSORS]
CARD = "README.md"
WORD = r"[A-Za-z0-9][\w.\-]*"
REPOSITORY = re.compile(rf"{WORD}/{WORD}(?:@[\w./\-]+)?", re.ASCII)  # org/name, org/name@revision


def resolve(directory_or_repo, **options) -> Path:
    """Return the folder of an adapter. The files of a repository are downloaded, unless they are in the cache.

    Args:
        directory_or_repo: A folder of an adapter, the output folder of a run, or a repository on the hub, as
            "org/name" or "org/name@revision". A folder that exists takes precedence over a repository.
        options: Arguments of huggingface_hub's snapshot_download, for example token, cache_dir or local_files_only.

    Returns:
        The folder. If it does not exist, the reader of the folder raises the error.

    Raises:
        FileNotFoundError: There is neither a folder nor a repository, or the run has not saved an adapter.
    """
    path = Path(directory_or_repo).expanduser()
    if path.exists() or not isinstance(directory_or_repo, str) or not REPOSITORY.fullmatch(directory_or_repo):
        return adapter_folder(path)
    from huggingface_hub import snapshot_download  # imported here, because `import s2ft.adapter` is faster so

    repo_id, _, revision = directory_or_repo.partition("@")
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=FILES, **options))
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors: no such repository, no network
        first = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"adapter {directory_or_repo} doesn't exist as a folder, and the hub gives no adapter of this name: "
            f"{first or type(error).__name__}"
        ) from error


# ---- the model card ------------------------------------------------------------------------------------


def card_of(adapter: Adapter) -> str:
    """The model card: front matter with the base if it is on the hub, what was trained, and how to load it."""
    from huggingface_hub import ModelCardData  # imported here, because `import s2ft.adapter` is faster so

    base = adapter.info.get("base_model")
    metadata: dict[str, Any] = {"library_name": "s2ft", "tags": ["s2ft"]}
    if isinstance(base, str) and REPOSITORY.fullmatch(base) and not Path(base).exists():
        metadata["base_model"] = base
    else:  # a path on the machine of the training must not be published
        base = "path/to/the/base"
    keys = ", ".join(f"{key}_ratio {ratio:g}" for key, ratio in adapter.config.ratios.items()) or "units given by name"
    whole = f" and {', '.join(adapter.extra_weights)} trained in full" if adapter.extra_weights else ""
    return "\n".join(
        [
            "---",
            ModelCardData(**metadata).to_yaml(),
            "---",
            "",
            f"# {adapter.name}: an S²FT adapter",
            "",
            f"{adapter.parameters:,} trained parameters on {len(adapter.deltas)} projections ({keys}){whole}, "
            "trained and",
            "loaded with s2ft (structured sparse fine-tuning, arXiv 2412.06289).",
            "",
            "```python",
            "import s2ft",
            "from transformers import AutoModelForCausalLM",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{base}")',
            's2ft.load_adapter(model, "path/or/repository/of/this/adapter")',
            "```",
            "",
        ]
    )


def write_card(adapter: Adapter, directory: Path) -> None:
    """Write the model card into a folder, unless it has one."""
    if not (directory / CARD).exists():
        replace_file(directory / CARD, card_of(adapter).encode())
