"""s2ft sft --push-to-hub: the hub gets the adapter with its card at the end."""

import pytest
import yaml
from support.commands import files_of
from support.hub import fake_hub, uploaded
from train.tiny import save_random_adapter

from s2ft.cli.main import main


@pytest.fixture
def hub(monkeypatch):
    return fake_hub(monkeypatch, "me/my-run")


@pytest.fixture
def words(work, tmp_path):
    return [
        *files_of(work, tmp_path / "my-run"),
        *("--max-steps", "1", "--batch-size", "4", "--system-prompt", "Add | up."),
    ]


def test_the_adapter_is_uploaded_with_its_card(words, hub, tmp_path, capsys):
    assert (
        main(
            ["sft", *words, "--push-to-hub", "--learning-rate", "0.002", "--hub-private-repo", "--hub-token", "secret"]
        )
        == 0
    )
    assert "uploaded: https://hub/commit/1" in capsys.readouterr().out
    assert {call.kwargs["token"] for call in hub.call_args_list} == {"secret"}
    assert hub().create_repo.call_args.args == ("my-run",) and hub().create_repo.call_args.kwargs["private"]
    assert set(uploaded(hub)) == {"s2ft_config.json", "s2ft_adapter.safetensors", "README.md"}
    card = (tmp_path / "my-run/adapter/README.md").read_text()
    assert card.encode() == uploaded(hub)["README.md"]
    assert yaml.safe_load(card.split("---")[1]) == {"library_name": "s2ft", "tags": ["s2ft"]}  # no path of this machine
    assert str(tmp_path) not in card and "secret" not in (tmp_path / "my-run/config.yaml").read_text()
    told = (
        "| 12 rows |",
        "method sft, max_steps 1",
        "batch_size 4, learning_rate 0.002",
        "system prompt “Add \\| up.”",
    )
    assert [text for text in (": d_ratio 0.3", *told) if text not in card] == []
    hub().file_exists.return_value = True  # a card by hand, which stays
    assert main(["sft", *words, "--push-to-hub", "--overwrite"]) == 0 and "README.md" not in uploaded(hub)


def test_without_access_the_adapter_is_kept(words, hub, tmp_path, capsys):
    hub().create_repo.side_effect = OSError("no token found")
    assert main(["sft", *words, "--push-to-hub"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    kept = tmp_path / "my-run/adapter"
    assert f"the adapter was not uploaded: no token found; the trained adapter is saved in {kept}" in said


def test_the_card_names_what_is_on_the_hub(tmp_path):
    from support.inside import card_of
    from train.tiny import tiny_model

    from s2ft import read_adapter

    info = {"base_model": "org/base", "training": {"method": "dpo", "data": ["org/chats"], "epochs": 2, "rows": 1000}}
    save_random_adapter(tmp_path / "saved", tiny_model(), info=info, d_ratio=0.1)
    card = card_of(read_adapter(tmp_path / "saved"))
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"base_model": "org/base", "datasets": ["org/chats"], "library_name": "s2ft", "tags": ["s2ft"]}
    assert "| org/chats, 1,000 rows |" in card and "method dpo, epochs 2" in card
