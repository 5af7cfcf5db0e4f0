"""Adapters on the Hugging Face hub: finding the folder of an adapter, its model card, and uploading it."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from s2ft.adapter.adapter import Adapter
from s2ft.adapter.folders import adapter_folder
from s2ft.adapter.formats import native
from s2ft.adapter.saving import save_adapter
from s2ft.files.replacing import replace_file

FILES = [native.CONFIG, native.TENSORS]
CARD = "README.md"
UNKNOWN = "path/to/the/base"  # in a card of a base that is not on the hub
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

TRAINING = ("method", "max_steps", "epochs", "batch_size", "learning_rate", "seed")  # of the recorded training


def card_of(adapter: Adapter) -> str:
    """The model card: front matter, what was trained on which data, the prompt, and how to load the adapter.

    Bases and data sets are named if they are on the hub. A path on the machine of the training is not published.
    """
    from huggingface_hub import ModelCardData  # imported here, because `import s2ft.adapter` is faster so

    base, training = _on_hub(adapter.info.get("base_model")), adapter.info.get("training") or {}
    data = [name for name in training.get("data") or () if _on_hub(name)]
    metadata = {"library_name": "s2ft", "tags": ["s2ft"], "base_model": base, "datasets": data}
    chosen = ", ".join(f"{key}_ratio {ratio:g}" for key, ratio in adapter.config.ratios.items()) or "units by name"
    whole = f" and {', '.join(adapter.extra_weights)} trained in full" if adapter.extra_weights else ""
    rows = {
        "base model": f"[{base}](https://huggingface.co/{base})" if base else "a local model",
        "method": f"S²FT (structured sparse fine-tuning, arXiv 2412.06289): {chosen}",
        "trained": f"{adapter.parameters:,} parameters on {len(adapter.deltas)} projections{whole}",
        "data": ", ".join([*data, *([f"{training['rows']:,} rows"] if training.get("rows") else [])]),
        "training": ", ".join(f"{name} {training[name]}" for name in TRAINING if training.get(name) is not None),
        "prompt": _prompt(adapter.info.get("prompt")),
    }
    return "\n".join(
        [
            "---",
            ModelCardData(**{name: value for name, value in metadata.items() if value}).to_yaml(),
            "---",
            "",
            f"# {adapter.name}: an S²FT adapter",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {text} |" for name, text in rows.items() if text),
            "",
            "```python",
            "import s2ft",
            "from transformers import AutoModelForCausalLM",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{base or UNKNOWN}", dtype="auto")',
            's2ft.load_adapter(model, "path/or/repository/of/this/adapter")',
            "```",
            "",
            "`s2ft chat` and `s2ft serve` use the prompt that is recorded in the adapter:",
            "",
            "```bash",
            f"s2ft chat --model {base or UNKNOWN} --adapter path/or/repository/of/this/adapter",
            "```",
            "",
        ]
    )


def _on_hub(name: Any) -> str | None:
    return name if isinstance(name, str) and REPOSITORY.fullmatch(name) and not Path(name).exists() else None


def _prompt(prompt: Any) -> str:
    if not isinstance(prompt, dict):
        return ""
    if prompt.get("form") == "text":
        return "plain text"
    system = " ".join(str(prompt["system"]).replace("|", "\\|").split()) if prompt.get("system") else ""
    return "the chat template in s2ft_config.json" + (f", with the system prompt “{system}”" if system else "")


def write_card(adapter: Adapter, directory: Path) -> None:
    """Write the model card into a folder, unless it has one."""
    if not (directory / CARD).exists():
        replace_file(directory / CARD, card_of(adapter).encode())


# ---- uploading ---------------------------------------------------------------------------------------------


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
    """Upload one adapter to a repository on the Hugging Face hub.

    The two files of the adapter are uploaded in one commit. A model card is added, unless the folder or the repository
    has one. The repository is created if it does not exist. :func:`s2ft.load_adapter` loads the adapter by `repo_id`.

    Args:
        model_or_folder: A model with adapters, or a folder that :func:`s2ft.save_adapter` wrote.
        repo_id: The repository, as "org/name". A name without owner is one of your own.
        name: The adapter of the model; default as in :func:`s2ft.save_adapter`.
        revision: The branch, which is created if it does not exist; default: the repository's main branch.
        private: Whether a repository that is created now is private.
        token: A token of the hub; default: the one of `hf auth login`.
        message: The commit's message.

    Returns:
        The address of the commit.

    Raises:
        ValueError: The files of the adapter are damaged, or `name` is given with a folder. Nothing has been uploaded.
        FileNotFoundError: The folder has no adapter.
        huggingface_hub.errors.HfHubHTTPError: The hub has refused the upload.

    Example:
        >>> # Skipped, because it needs a network and an account.
        >>> s2ft.push_to_hub(model, "org/math", private=True)  # doctest: +SKIP
        'https://huggingface.co/org/math/commit/...'
    """
    if not isinstance(model_or_folder, nn.Module):
        if name is not None:
            raise ValueError("name selects an adapter of a model, but a folder holds one adapter: leave name out")
        return _upload(adapter_folder(Path(model_or_folder)), repo_id, revision, private, token, message)
    with TemporaryDirectory() as folder:
        save_adapter(model_or_folder, folder, name)
        return _upload(Path(folder), repo_id, revision, private, token, message)


def _upload(folder: Path, repo_id: str, revision, private, token, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi  # imported here, because `import s2ft.adapter` is faster so

    adapter, files = native.read_files(folder)
    card = card_of(adapter).encode()
    if (folder / CARD).exists() and (folder / CARD).read_bytes() != card:  # A card that was written by hand.
        files[CARD] = (folder / CARD).read_bytes()
    api = HfApi(token=token)
    # with the owner, if only a name was given
    repo_id = getattr(api.create_repo(repo_id, private=private, exist_ok=True), "repo_id", repo_id)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if CARD not in files and not api.file_exists(repo_id, CARD, revision=revision):
        files[CARD] = card
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    return str(api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url)
