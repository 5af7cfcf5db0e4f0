"""Clients that ask a vLLM server for adapters and the base, while one adapter is loaded, replaced and removed.

Every answer must be the whole answer of a content that the adapter had while the request ran, or status 404 if the
adapter was away then. The prompts are longer than a block of the prefix cache, and are asked again and again.
"""

import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from support.vllm_models import Served, save_adapters, tiny_llama
from support.vllm_server import Server

CHANGED = "changed"  # the adapter that is loaded, replaced and removed
STEADY = ("steady-1", "steady-2")
CONTENTS = ("one", "two", "three")  # that it has in turn
RATIOS = dict(d_ratio=0.08, u_ratio=0.03, o_ratio=0.13, v_ratio=0.3)
PROMPTS = [torch.randint(3, 512, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (40, 55, 70, 100)]
# Fewer places in the batch and in host memory than adapters, so that adapters are read again from their folders
SMALL = ["--max-loras", "2", "--max-cpu-loras", "2"]


def save_contents(folder: Path) -> Served:
    """Save the base, two adapters, and the contents of a third, with the answers of all to PROMPTS."""
    model = tiny_llama(initializer_range=0.05)  # answers of many different tokens
    served = save_adapters(model, folder, dict.fromkeys((*STEADY, *CONTENTS), RATIOS), prompts=PROMPTS)
    for number in range(len(PROMPTS)):
        found = {tuple(of_name[number]) for of_name in served.answers.values()}
        assert len(found) == len(served.answers), "two answers are equal"
    return served


class Stress:
    """A server, its clients, and the changes of one adapter.

    Attributes:
        server: The server. It serves STEADY by name.
        served: The contents and their answers.
        place: The folder that CHANGED is loaded from.
        history: The contents of CHANGED, one after the other. None is for its absence.
        settled: The number of the last content whose change is over: requests meet it or a later one.
        asked: Of each request the model, the number of the prompt, the answer, and the contents that it may have met.
        changes: How many changes there were, by kind.
    """

    def __init__(self, server: Server, served: Served, place: Path) -> None:
        self.server, self.served, self.place = server, served, place
        self.history: list[str | None] = [None]
        self.settled, self.asked, self.changes = 0, [], Counter()

    def run(self, rounds: int, clients: int, seed: int = 0) -> None:
        """Make changes while clients ask.

        Args:
            rounds: Number of changes.
            clients: Number of clients.
            seed: Of the clients' choices.

        Raises:
            OSError: The server ended.
            AssertionError: The server refused a change.
        """
        draw, done = random.Random(seed), threading.Event()
        with ThreadPoolExecutor(clients) as pool:
            jobs = [pool.submit(self._ask, draw.random(), done) for _ in range(clients)]
            try:
                for _ in range(rounds):
                    self._change(draw)
                    self._wait_for(draw.randint(2, clients))
            finally:
                done.set()
        for job in jobs:
            job.result()

    def content_of(self, number: int, answer: list[int] | str, met: Sequence[str | None]) -> str | None:
        """The content of `met` whose answer this is, "404" where the adapter was away, None if it is a wrong answer."""
        for content in met:
            if content is None and str(answer).startswith("HTTP 404"):
                return "404"
            if content is not None and answer == self.served.answers[content][number]:
                return content
        return None

    # ---- changes -------------------------------------------------------------------------------------

    def _change(self, draw: random.Random) -> None:
        """Load the adapter if it is away; else replace it in place, by an unload and a load, or remove it."""
        current = self.history[-1]
        content = draw.choice([name for name in CONTENTS if name != current])
        others = self.changes.total() - self.changes["load"]
        kind = "load" if current is None else ("replace in place", "replace", "remove")[others % 3]
        self.changes[kind] += 1
        if kind in ("replace", "remove"):
            self._turn(None, "v1/unload_lora_adapter", lora_name=CHANGED)
        if kind == "remove":
            shutil.rmtree(self.place)  # requests that run keep what they began with
        else:
            self._put(content)
            more = dict(lora_path=str(self.place), load_inplace=kind == "replace in place")
            self._turn(content, "v1/load_lora_adapter", lora_name=CHANGED, **more)

    def _put(self, content: str) -> None:
        """Put a content in the folder by renaming."""
        fresh, old = self.place.with_name("fresh"), self.place.with_name("old")
        shutil.copytree(self.served.adapters / content, fresh)
        if self.place.exists():
            self.place.rename(old)
        fresh.rename(self.place)
        shutil.rmtree(old, ignore_errors=True)

    def _turn(self, content: str | None, path: str, **body: object) -> None:
        """Ask the server for a change. Until it is over, requests meet the content before or this one."""
        self.history.append(content)
        status, answer = self.server.post(path, body)
        assert status == 200, f"{path} {body}: HTTP {status}: {answer}"
        self.settled = len(self.history) - 1

    def _wait_for(self, count: int) -> None:
        """Wait for some more answers, for a minute at most."""
        begin, before = time.monotonic(), len(self.asked)
        while len(self.asked) < before + count and time.monotonic() < begin + 60:
            time.sleep(0.01)

    # ---- clients -------------------------------------------------------------------------------------

    def _ask(self, seed: float, done: threading.Event) -> None:
        draw = random.Random(seed)
        while not done.is_set():
            name = draw.choice(("base", *STEADY, CHANGED, CHANGED, CHANGED))
            number, first = draw.randrange(len(PROMPTS)), self.settled
            answer = self.server.complete(name, PROMPTS[number])
            self.asked.append((name, number, answer, self.history[first:] if name == CHANGED else [name]))


def options_of(served: Served) -> Sequence[str]:
    """Options of the server for the steady adapters."""
    return [
        "--enable-lora",
        "--max-lora-rank",
        "64",
        *SMALL,
        "--block-size",
        "32",
        "--enable-prefix-caching",
        "--lora-modules",
        *[f"{name}={served.adapters / name}" for name in STEADY],
    ]
