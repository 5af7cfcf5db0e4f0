"""Training whose answers vLLM generates with the trained weights, each in a process of its own (support/vllm_rl.py)."""

import pytest
from support.vllm_rl import run, save_base
from support.vllm_server import vllm_server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("rl") / "base")


@pytest.fixture(scope="module")
def server(base, tmp_path_factory):
    with vllm_server(
        base,
        tmp_path_factory.mktemp("log") / "server.log",
        ["--weight-transfer-config", '{"backend": "s2ft"}', "--logprobs-mode", "processed_logprobs"],
        {"VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1"},
    ) as found:
        yield found


@pytest.mark.parametrize(
    ("form", "dtype", "served"),
    [("permuted", "float32", ""), ("peft", "bfloat16", ""), ("indexed", "float32", "bfloat16")],
)
def test_after_each_of_50_syncs_the_engine_has_the_merged_tensors(form, dtype, served, base, tmp_path):
    found = run("syncs", base if dtype == "float32" else save_base(tmp_path / "base", dtype), form, dtype, served, 50)
    assert found["equal"] == (0 if served else 50) and found["bytes"] <= 1.05 * found["slices"]


@pytest.mark.parametrize("workers", [1, 2])
def test_weights_in_other_processes_get_the_numbers_in_a_message(workers, base):
    """vLLM's LLM with its engine in a process of its own, and with two workers."""
    more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    more |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if workers == 2 else {}
    assert run("syncs", base, "permuted", "float32", "", 4, workers, **more)["equal"] == 4


@pytest.mark.parametrize(
    ("kind", "form"), [("grpo", "permuted"), ("grpo", "peft"), ("rloo", "indexed"), ("online_dpo", "permuted")]
)
def test_trl_in_one_process(kind, form, base):
    found = run("colocate", base, kind, form)
    assert found["checked"] == 3 and found.get("logp", 0) < 1e-4


@pytest.mark.parametrize(
    "words",
    [
        *(["server", "grpo", "permuted"], ["server", "grpo", "peft"], ["server", "rloo", "peft"]),
        *(["server", "online_dpo", "indexed"], ["async_grpo", "permuted"], ["async_grpo", "peft"]),
    ],
    ids=" ".join,
)
def test_trl_with_a_server(words, base, server):
    before, (scenario, *rest) = server.checksums(), words
    found = run(scenario, base, server.url, *rest)
    assert found["syncs"] == 3 if scenario == "server" else found["syncs"] >= 3 and found["equal"]
    assert found.get("logp", 0) < 1e-4 and server.checksums() == before


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_s2ft_grpo(mode, base, server, tmp_path):
    before = server.checksums()
    where = ["--vllm-mode", "server", "--vllm-server-base-url", server.url] if mode == "server" else []
    found = run("command", base, tmp_path / "run", *where)
    assert found["steps"] == 4 and found["logp"] < 1e-4 and server.checksums() == before
