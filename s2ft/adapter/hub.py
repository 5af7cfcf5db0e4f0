"""Adapters on the Hugging Face hub: two files in a repository, and the page that it shows of them."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from s2ft.adapter.adapter import Adapter
from s2ft.adapter.folders import adapter_folder
from s2ft.adapter.formats import native
from s2ft.adapter.saving import save_adapter
from s2ft.files.writing import replace_file

FILES = [native.CONFIG, native.TENSORS]
CARD = "README.md"
WORD = r"[A-Za-z0-9][\w.\-]*"
REPOSITORY = re.compile(rf"{WORD}/{WORD}(?:@[\w./\-]+)?", re.ASCII)  # org/name, org/name@revision


def resolve(directory_or_repo, **options) -> Path:
    """The folder of an adapter: one that is here, the one in the output folder of a run, or that of a repository on
    the hub, "org/name" or "org/name@revision", whose two files are downloaded unless they are in the cache. A folder
    that is here comes first.

    Args:
        options: for huggingface_hub's snapshot_download: token, cache_dir, local_files_only …
    Raises: FileNotFoundError where there is neither, with the hub's reason, or for a run without an adapter.
    """
    path = Path(directory_or_repo).expanduser()
    if path.exists() or not isinstance(directory_or_repo, str) or not REPOSITORY.fullmatch(directory_or_repo):
        return adapter_folder(path)  # where there is none, the reader says what is missing
    from huggingface_hub import snapshot_download  # not at the top: `import s2ft` would load it

    repo_id, _, revision = directory_or_repo.partition("@")
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=FILES, **options))
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors: no such repository, no network …
        first = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"there is no folder {directory_or_repo}, and the hub gives no adapter of this name: "
            f"{first or type(error).__name__}"
        ) from error


def push_to_hub(
    model_or_folder: nn.Module | str | Path,
    repo_id: str,
    name: str | None = None,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    message: str = "S²FT adapter",
) -> str:
    """Upload one adapter, its two files, to a repository on the hub, which is made if need be; with a page about it,
    unless there is one.

    Args:
        model_or_folder: a model with adapters, or a folder that :func:`s2ft.save_adapter` wrote; it is read first.
        repo_id: "org/name". name: which of the model's adapters, as in save_adapter.
        revision: a branch, made if need be. private: of a repository that is made now.
        token: default: that of `hf auth login`.
    Returns: the commit's address.
    Raises: ValueError or FileNotFoundError for an adapter that could not be read again, nothing uploaded; what
        huggingface_hub raises.
    """
    if not isinstance(model_or_folder, nn.Module):
        if name is not None:
            raise ValueError("name says which adapter of a model; a folder holds one")
        return _upload(adapter_folder(Path(model_or_folder)), repo_id, revision, private, token, message)
    with TemporaryDirectory() as folder:
        save_adapter(model_or_folder, folder, name)
        return _upload(Path(folder), repo_id, revision, private, token, message)


def _upload(folder: Path, repo_id: str, revision, private, token, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    adapter, files = native.read_files(folder)
    if (folder / CARD).exists():
        files[CARD] = (folder / CARD).read_bytes()
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if CARD not in files and not api.file_exists(repo_id, CARD, revision=revision):
        files[CARD] = card_of(adapter).encode()
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    return str(api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url)


# ---- the page ------------------------------------------------------------------------------------------


def card_of(adapter: Adapter) -> str:
    """Front matter (library, tags, the base if the hub has it), how to load it, and what was trained."""
    from huggingface_hub import ModelCardData  # not at the top: `import s2ft` would load it

    base = adapter.info.get("base_model")
    metadata: dict[str, Any] = {"library_name": "s2ft", "tags": ["s2ft"]}
    if isinstance(base, str) and REPOSITORY.fullmatch(base) and not Path(base).exists():
        metadata["base_model"] = base
    else:  # a folder of someone's machine
        base = "path/to/the/base"
    keys = ", ".join(f"{key}_ratio {ratio:g}" for key, ratio in adapter.config.ratios.items()) or "units given by name"
    whole = f" and {', '.join(adapter.extra_weights)} trained whole" if adapter.extra_weights else ""
    return "\n".join(
        [
            "---",
            ModelCardData(**metadata).to_yaml(),
            "---",
            "",
            f"# {adapter.name}: an S²FT adapter",
            "",
            f"{adapter.parameters:,} trained parameters on {len(adapter.deltas)} projections ({keys}){whole}, trained and",
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
    """Unless there is one already."""
    if not (directory / CARD).exists():
        replace_file(directory / CARD, card_of(adapter).encode())
