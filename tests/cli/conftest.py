"""The folder in which most tests of commands work."""

import pytest
from train.tiny import save_tiny, sums, write_jsonl


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny model and rows to train on."""
    work = tmp_path_factory.mktemp("work")
    save_tiny(work / "model")
    write_jsonl(work / "data.jsonl", sums(12))
    return work
