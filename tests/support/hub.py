"""A stand-in of the hub, on which nothing is looked up and to which nothing is sent."""

from unittest.mock import MagicMock


def fake_hub(monkeypatch, name: str) -> MagicMock:
    """Put a mock with the calls of HfApi, and `download`, in place of huggingface_hub's. `name` is the repository's."""
    made = MagicMock()
    made().create_repo().repo_id, made().file_exists.return_value = name, False
    made().create_commit().commit_url = "https://hub/commit/1"
    made.reset_mock()
    monkeypatch.setattr("huggingface_hub.HfApi", made)
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.download)
    return made


def uploaded(hub: MagicMock) -> dict:
    """The files of the last commit, by name."""
    return {one.path_in_repo: one.path_or_fileobj for one in hub().create_commit.call_args.args[1]}
