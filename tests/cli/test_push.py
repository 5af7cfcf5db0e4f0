"""s2ft sft --push-to-hub: the hub is asked before the training, and gets the adapter with its card at the end."""

from types import SimpleNamespace

import pytest
import yaml

from s2ft.cli.main import main


class Hub:
    """Stands for the hub: it notes the calls, and holds the files of one repository."""

    def __init__(self, writable=True):
        self.calls, self.files, self.writable = [], {}, writable

    def __call__(self, token=None):
        self.calls.append(("token", token))
        return self

    def whoami(self):
        if not self.writable:
            raise OSError("no token found. See the documentation")
        return {"name": "me"}

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.calls.append(("repository", repo_id, private))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def file_exists(self, repo_id, name, revision=None):
        return name in self.files

    def create_commit(self, repo_id, operations, commit_message, revision):
        self.files.update({operation.path_in_repo: operation.path_or_fileobj for operation in operations})
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def words(work, tmp_path):
    paths = ["--model", work / "model", "--data", work / "data.jsonl", "--output", tmp_path / "my-run"]
    return [*map(str, paths), "--max-steps", "1", "--batch-size", "4", "--system-prompt", "Add | up."]


def test_the_adapter_is_uploaded_with_its_card(words, tmp_path, capsys, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    assert main(["sft", *words, "--push-to-hub", "--hub-private-repo", "--hub-token", "secret"]) == 0
    assert "uploaded: https://hub/me/my-run/commit/1" in capsys.readouterr().out
    assert ("repository", "my-run", True) in hub.calls and {call[1] for call in hub.calls if call[0] == "token"} == {
        "secret"
    }
    assert set(hub.files) == {"s2ft_config.json", "s2ft_adapter.safetensors", "README.md"}
    card = (tmp_path / "my-run/adapter/README.md").read_text()
    assert card.encode() == hub.files["README.md"]
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "s2ft", "tags": ["s2ft"]}  # no path of this machine
    assert str(tmp_path) not in card and "secret" not in (tmp_path / "my-run/config.yaml").read_text()
    for text in ("supervised fine-tuning: d_ratio 0.03", "| 12 rows |", "1 steps, 4 rows an update, learning rate 0.001",
                 "the system prompt “Add \\| up.”"):  # fmt: skip
        assert text in card
    hub.files["README.md"] = b"by hand"
    assert main(["sft", *words, "--push-to-hub", "--overwrite"]) == 0
    assert hub.files["README.md"] == b"by hand"


def test_without_access_nothing_is_trained(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub(writable=False))
    assert main(["sft", *words, "--push-to-hub"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "push_to_hub: the hub does not let you write (no token found): run `hf auth login` first" in said[-1]
    assert not (tmp_path / "my-run").exists()
