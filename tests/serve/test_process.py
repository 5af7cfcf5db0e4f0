"""The command as users run it: start, signals and messages."""

import json
import signal
import socket
import threading
from contextlib import ExitStack, suppress

import httpx
import pytest
from serve.fleet import eventually, running, save_adapters
from serve.process import served
from support.inside import server
from train.tiny import save_tiny, tiny_model

from s2ft.cli.main import main

LONG = dict(max_position_embeddings=1 << 16, tie_word_embeddings=False, eos_token_id=None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), **LONG)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return save_adapters(tmp_path_factory.mktemp("adapters"), 1, **LONG)


class Stream(threading.Thread):
    """A streamed request in a thread of its own, and its events."""

    def __init__(self, url, tokens):
        super().__init__()
        self.url, self.tokens, self.events, self.begun = url, tokens, [], threading.Event()
        self.start()
        assert self.begun.wait(60)

    def run(self):
        body = dict(model="a0", prompt="a", max_tokens=self.tokens, temperature=0, stream=True)
        url = f"{self.url}/v1/completions"
        with suppress(httpx.RemoteProtocolError), httpx.stream("POST", url, json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line:
                    self.events.append(line.removeprefix("data: "))
                    self.begun.set()

    def ended(self):
        """The last event before [DONE]."""
        self.join(60)
        assert self.events[-1] == "[DONE]"
        return json.loads(self.events[-2])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_requests_finish_after_a_signal(model, adapters, number):
    with served("--model", model, "--adapters", adapters) as server:
        stream = Stream(server.url, 300)
        server.signal(number)
        assert stream.ended()["choices"][0]["finish_reason"] in ("length", "stop") and server.exit_code() == 0
    assert not [line for line in server.lines if "Traceback" in line]


def test_a_request_out_of_time_is_504(adapters):
    with running(adapters, tiny_model(**LONG), timeout=0.2) as (url, service):
        body = dict(model="a0", prompt="a", max_tokens=60000, temperature=0)
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        assert Stream(url, 60000).ended()["error"]["code"] == "timeout"
        eventually(lambda: not any(httpx.get(f"{url}/health").json()[key] for key in ("running", "waiting")))


def test_an_address_in_use_is_an_error(model, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert main(["serve", "--model", str(model), "--port", str(other.getsockname()[1])]) == 1
    assert "in use" in capsys.readouterr().err


def test_clients_that_hold_half_a_header_keep_nobody_out_and_connections_are_limited(monkeypatch):
    monkeypatch.setattr(server, "HEADER_TIME", 1)
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 3)
    with running(None) as (url, _), ExitStack() as opened:
        address = url.removeprefix("http://").split(":")
        with httpx.Client() as client:  # a connection that is kept
            assert client.get(f"{url}/health").status_code == 200
            slow = [opened.enter_context(socket.create_connection(address, timeout=30)) for _ in range(4)]
            slow[0].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-")
            for connection in reversed(slow):  # two of them are closed at once, the others when their time has passed
                with suppress(ConnectionResetError):
                    assert connection.recv(1) == b""
            assert client.get(f"{url}/health").status_code == 200


def test_half_of_the_second_header_of_a_connection_has_a_time_limit_too(monkeypatch):
    monkeypatch.setattr(server, "HEADER_TIME", 1)
    with running(None) as (url, _), socket.create_connection(url.removeprefix("http://").split(":"), 30) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /health HTTP/1.1\r\nX-")
        with suppress(ConnectionResetError):
            while client.recv(1 << 16):
                pass


def test_descriptors_are_left_for_what_is_accepted_and_for_files(monkeypatch):
    monkeypatch.setattr(server.resource, "getrlimit", lambda which: (128, 128))
    config = server.config_of(None)
    assert config.http.keywords["most"] + config.backlog <= 128 * 3 // 4
