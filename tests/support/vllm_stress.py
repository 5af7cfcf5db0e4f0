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
from dataclasses import dataclass, field
from pathlib import Path

import torch

import s2ft
from support.states import randomize
from support.vllm_models import Served, answers, tiny_llama
from support.vllm_server import Server

CHANGED = "changed"  # the adapter that is loaded, replaced and removed
STEADY = ("steady-1", "steady-2")
CONTENTS = ("one", "two", "three")  # that it has in turn
RATIOS = dict(d_ratio=0.08, u_ratio=0.03, o_ratio=0.13, v_ratio=0.3)
PROMPTS = [torch.randint(3, 512, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (40, 55, 70, 100)]
# Fewer places in the batch and in host memory than adapters, so that adapters are read again from their folders
SMALL = ["--max-loras", "2", "--max-cpu-loras", "2"]
CACHE = ["--block-size", "32", "--enable-prefix-caching"]


def save_contents(folder: Path) -> Served:
    """Save the base, two adapters, and the contents of a third, with the answers of all to PROMPTS."""
    model = tiny_llama(initializer_range=0.05)  # answers of many different tokens
    model.save_pretrained(folder / "base")
    found = {"base": answers(model, PROMPTS)}
    for seed, name in enumerate((*STEADY, *CONTENTS)):
        s2ft.attach(model, s2ft.S2FTConfig(**RATIOS, seed=seed), name=name)
        randomize(model, seed, 0.02)
        s2ft.save_adapter(model, folder / "adapters" / name)
        s2ft.fuse(model)
        found[name] = answers(model, PROMPTS)
        s2ft.detach(model)
    for number in range(len(PROMPTS)):
        assert len({tuple(of_name[number]) for of_name in found.values()}) == len(found), "two answers are equal"
    return Served(folder / "base", folder / "adapters", found)


@dataclass
class Stress:
    """A server, its clients, and the changes of one adapter.

    Attributes:
        server: The server. It serves STEADY by name.
        served: The contents and their answers.
        place: The folder that CHANGED is loaded from.
        history: The contents of CHANGED, one after the other. None is for its absence.
        settled: The number of the last content whose change is over: requests meet it or a later one.
        seen: How many answers there were, by content.
        wrong: Descriptions of wrong answers.
        changes: How many changes there were, by kind.
        failed: Changes that the server refused, and requests that it did not answer. The first one ends the run.
    """

    server: Server
    served: Served
    place: Path
    history: list[str | None] = field(default_factory=lambda: [None])
    settled: int = 0
    seen: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    changes: Counter = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    def run(self, rounds: int, clients: int, seed: int = 0) -> None:
        """Make changes while clients ask.

        Args:
            rounds: Number of changes.
            clients: Number of clients.
            seed: Of the clients' choices.
        """
        self.lock, self.done, draw = threading.Lock(), threading.Event(), random.Random(seed)
        threads = [threading.Thread(target=self._ask, args=(draw.random(),)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(rounds):
                if self.failed:
                    break
                self._change(draw)
                self._wait_for(draw.randint(2, clients))
        finally:
            self.done.set()
            for thread in threads:
                thread.join()

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
        try:
            status, answer = self.server.post(path, body)
        except OSError as error:
            status, answer = 0, error
        if status != 200:
            self.failed.append(f"{path} {body}: HTTP {status}: {answer}")
        self.settled = len(self.history) - 1

    def _wait_for(self, count: int) -> None:
        """Wait for some more answers, for a minute at most."""
        begin, before = time.monotonic(), self.seen.total() + len(self.wrong)
        while self.seen.total() + len(self.wrong) < before + count and time.monotonic() < begin + 60:
            time.sleep(0.01)

    # ---- clients -------------------------------------------------------------------------------------

    def _ask(self, seed: float) -> None:
        draw = random.Random(seed)
        while not self.done.is_set():
            name = draw.choice(("base", *STEADY, CHANGED, CHANGED, CHANGED))
            number, first = draw.randrange(len(PROMPTS)), self.settled
            try:
                answer = self.server.complete(name, PROMPTS[number])
            except OSError as error:  # the server ended
                self.failed.append(f"{name}: {type(error).__name__}: {error}")
                return
            met = self.history[first:] if name == CHANGED else [name]
            with self.lock:
                self._judge(name, number, answer, met)

    def _judge(self, name: str, number: int, answer: list[int] | str, met: Sequence[str | None]) -> None:
        for content in met:
            if answer == (None if content is None else self.served.answers[content][number]):
                self.seen[content] += 1
                return
            if content is None and str(answer).startswith("HTTP 404"):
                self.seen["404"] += 1
                return
        everything = self.served.answers.items()
        other = [content for content, of_name in everything if of_name[number] == answer]
        self.wrong.append(f"{name}, prompt {number}, of {met}: {other or answer}")


def options_of(served: Served) -> Sequence[str]:
    """Options of the server for the steady adapters."""
    modules = [f"{name}={served.adapters / name}" for name in STEADY]
    return ["--enable-lora", "--max-lora-rank", "64", *SMALL, *CACHE, "--lora-modules", *modules]
