"""A vLLM server in a process of its own, and the requests that tests send to it."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.ranks import free_port
from support.sources import ROOT
from support.vllm_models import TOKENS

QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
START = 540  # seconds; a busy machine takes up to two minutes


@dataclass
class Server:
    """A running vLLM server whose base is called `base`.

    Attributes:
        url: Its address, without a slash at the end.
        log: The file with all that it prints.
    """

    url: str
    log: Path

    def post(self, path: str, body: Any = None, **query: Any) -> tuple[int, Any]:
        """Send a POST request. Returns the status and the answer, as JSON values if it is JSON."""
        text = "&".join(f"{name}={value}" for name, value in query.items())
        data = b"" if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}?{text}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, _content(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _content(error.read())

    def get(self, path: str) -> Any:
        """Return the answer to a GET request."""
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=60) as answer:
            return _content(answer.read())

    def complete(self, model: str, prompt: Sequence[int], tokens: int = TOKENS) -> list[int] | str:
        """Return the greedy answer to a prompt as token ids, or the error as a text."""
        fields = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        status, answer = self.post("v1/completions", {"model": model, "prompt": list(prompt), **fields})
        return answer["choices"][0]["token_ids"] if status == 200 else f"HTTP {status}: {answer}"

    def answers(
        self, models: Iterable[str], prompts: Sequence[Sequence[int]], tokens: int = TOKENS
    ) -> dict[str, list[list[int] | str]]:
        """Send all prompts to all models at once, so that they share batches. Returns the answers of each model."""
        with ThreadPoolExecutor(32) as pool:
            jobs = {name: [] for name in models}
            for prompt in prompts:
                for name in jobs:
                    jobs[name].append(pool.submit(self.complete, name, prompt, tokens))
            return {name: [job.result() for job in of_name] for name, of_name in jobs.items()}

    def checksums(self) -> dict[str, str]:
        """Return the checksums of all parameters on all workers. The server needs VLLM_SERVER_DEV_MODE."""
        return self.post("weight_checker", {"action": "checksum"})[1]["checksums"]


def _content(raw: bytes) -> Any:
    return json.loads(raw) if raw[:1] in (b"{", b"[") else raw.decode()


@contextmanager
def vllm_server(
    model: Path, log: Path, options: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run a vLLM server inside the context.

    Args:
        model: The base's folder. A folder without a tokenizer is served by token ids.
        log: File for all that the server prints.
        options: More options of the command line.
        environment: More variables.

    Raises:
        RuntimeError: The server ended or did not start in time. The message has the end of its log.
    """
    port = free_port()
    tokenizer = [] if (Path(model) / "tokenizer_config.json").exists() else ["--skip-tokenizer-init"]
    fixed = {
        "--model": model,
        "--served-model-name": "base",
        "--dtype": "float32",
        "--max-model-len": 256,
        "--host": "127.0.0.1",
        "--port": port,
        "--max-num-seqs": 16,
        "--max-num-batched-tokens": 512,
    }
    defaults = [str(word) for pair in fixed.items() if pair[0] not in options for word in pair]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *defaults, "--enforce-eager", *tokenizer]
    with started([*command, *options], port, log, environment) as server:
        yield server


@contextmanager
def started(
    command: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run a command that serves on a port inside the context, see :func:`vllm_server`."""
    variables = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT), **(environment or {})}
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=variables, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", Path(log))
    try:
        _wait(process, server)
        yield server
    finally:
        _stop(process)


def _wait(process: subprocess.Popen, server: Server) -> None:
    began = time.monotonic()
    while True:
        if process.poll() is not None or time.monotonic() - began > START:
            raise RuntimeError(f"the server did not start:\n{server.log.read_text()[-8000:]}")
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.5)


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
