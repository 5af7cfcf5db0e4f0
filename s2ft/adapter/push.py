"""Uploading an adapter to the Hugging Face hub."""

from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from s2ft.adapter.folders import adapter_folder
from s2ft.adapter.formats import native
from s2ft.adapter.hub import CARD, card_of
from s2ft.adapter.saving import save_adapter


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
    made = api.create_repo(repo_id, private=private, exist_ok=True)
    repo_id = getattr(made, "repo_id", repo_id)  # with the owner, if only a name was given
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if CARD not in files and not api.file_exists(repo_id, CARD, revision=revision):
        files[CARD] = card
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    return str(api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url)
