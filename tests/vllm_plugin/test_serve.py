"""`s2ft serve --engine vllm`: all adapters of a folder at once, and new ones while it runs."""

import shutil
import sys

import pytest
from support.vllm_models import PROMPTS
from support.vllm_server import free_port, started

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SMALL = "--max-model-len 256 --max-num-seqs 16 --max-num-batched-tokens 512 --enforce-eager --skip-tokenizer-init"


@pytest.fixture(scope="module", params=["LoRA", "slices"])
def serving(served, tmp_path_factory, request):
    """A directory with two of the three adapters, and the server, which has the third under another name."""
    work, port = tmp_path_factory.mktemp("serving"), free_port()
    for name in ("down-o", "wide"):
        shutil.copytree(served.adapters / name, work / "adapters" / name)
    adapters = [work / "adapters", f"third={served.adapters / 'other'}"]
    command = [sys.executable, "-m", "s2ft", "serve", "--engine", "vllm", "--model", served.base]
    options = ["--adapters", *adapters, "--port", port, "--served-model-name", "base", "--dtype", "float32"]
    slices = ["--slices"] if request.param == "slices" else []
    with started([*map(str, [*command, *options, *slices, "--", *SMALL.split()])], port, work / "log") as server:
        yield work / "adapters", server


def test_three_adapters_and_the_base_share_batches(served, serving):
    _, server = serving
    assert {model["id"] for model in server.get("v1/models")["data"]} >= {"base", "down-o", "wide", "third"}
    assert server.answers(["base", "down-o", "wide", "third"], PROMPTS) == {
        "base": served.answers["base"],
        "down-o": served.answers["down-o"],
        "wide": served.answers["wide"],
        "third": served.answers["other"],
    }


def test_a_new_folder_is_found_while_the_server_runs(served, serving):
    folder, server = serving
    status, answer = server.post("v1/completions", {"model": "later", "prompt": PROMPTS[0]})
    assert status == 404 and "later" in str(answer)
    shutil.copytree(served.adapters / "other", folder / "later")
    assert server.answers(["later", "base"], PROMPTS) == {
        "later": served.answers["other"],
        "base": served.answers["base"],
    }
