"""Slice sync over HTTP: errors reach the client with their reasons, the server lives on, the weights are as before."""

import base64
import re
import threading

import pytest
from support.inside import to_message
from support.vllm_models import PROMPTS
from support.vllm_server import vllm_server
from support.vllm_transfer import slices_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(served, tmp_path_factory):
    options = ["--weight-transfer-config", '{"backend": "s2ft"}']
    log = tmp_path_factory.mktemp("server") / "log"
    with vllm_server(served.base, log, options, {"VLLM_SERVER_DEV_MODE": "1"}) as server:
        server.first = server.checksums()
        yield server


def init(server, specs, sender="a", **more):
    info = {"sender": sender, "dtype": "float32", "slices": to_message(specs), **more}
    return server.post("init_weight_transfer_engine", {"init_info": info})


def update(server, **info):
    """Send one update. Returns the status and the answer of the call that failed, or of the last one."""
    for path, body in (("start_weight_update", {}), ("update_weights", {"update_info": info})):
        status, answer = server.post(path, body)
        if status != 200:
            return status, answer
    return server.post("finish_weight_update", {})


def ok(answer):
    assert answer[0] == 200, answer
    return True


def refused(answer, words):
    assert answer[0] != 200 and words in answer[1]["error"]["message"], answer
    return True


def answers(server):
    return server.answers(["base"], PROMPTS)["base"]


def test_while_requests_run(server, served):
    specs, numbers = slices_of(served, "down-o")
    good = dict(sender="a", step=1, values=base64.b64encode(numbers.numpy().tobytes()).decode())
    assert ok(init(server, specs))
    found, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            found.append(server.complete("base", PROMPTS[0], 240))

    clients = [threading.Thread(target=ask, daemon=True) for _ in range(4)]  # so that a request is running at any time
    for client in clients:
        client.start()
    try:
        while not re.search(r"(?m)^vllm:num_requests_running\{.* [1-9]\S*$", server.get("metrics")):
            pass
        assert refused(update(server, **good), "requests are running, so the weights are not changed: pause the engine")
        assert refused(init(server, specs, "b", take_over=True), "requests are running")
        assert ok(server.post("pause", mode="keep")) and server.checksums() == server.first
        assert ok(update(server, **good)) and ok(server.post("resume"))
    finally:
        stop.set()
    for client in clients:
        client.join()
    assert {len(one) for one in found} == {240}
    assert answers(server) == served.answers["down-o"], "keys and values of the former weights were used"
    assert ok(update(server, base=True, sender="a"))
    assert answers(server) == served.answers["base"] and server.checksums() == server.first
