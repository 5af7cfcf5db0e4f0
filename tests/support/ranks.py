"""Processes of one gloo group on this machine, which run functions for the tests."""

import faulthandler
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from support.rounding import set_up_kernels

RANKS = 2
LIMIT, AFTER_DEATH = 120, 5  # seconds for one function, and for the others of a rank that has died
CALLS = 20  # of the same processes: each mesh makes groups, whose threads of gloo look for work for ever
PRELOADED = [
    *("torch", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "transformers.trainer"),
    *("accelerate", "s2ft.api", "s2ft.adapter", "support.models"),
]


@dataclass
class Outcome:
    """What became of a function on one rank.

    Attributes:
        result: What it returned.
        error: The traceback of its exception, or an empty string.
        died: Whether the process has ended.
    """

    result: Any = None
    error: str = ""
    died: bool = False


class Ranks:
    """``ranks(function, *args)`` runs ``function(rank, *args)`` on all ranks and returns their results in order.

    Functions and arguments are pickled, so a function must be defined in a module. If it raises, the call fails with
    its traceback. The first call starts the processes. The next one after a failure, or after CALLS calls, starts new
    ones.

    Args:
        count: Number of ranks.
        agent: Whether this process has the ranks' store, as the agent of torchrun does. Otherwise rank 0 has it.
    """

    def __init__(self, count: int = RANKS, agent: bool = False) -> None:
        self.count, self.agent, self.pipes, self.processes, self.calls = count, agent, [], [], 0

    def start(self) -> None:
        context, port = mp.get_context("forkserver"), free_port()
        context.set_forkserver_preload(PRELOADED)  # imported once, not by each process
        self.calls = 0
        if self.agent:
            self.store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.count, port, self.agent, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            self.pipes.append(ours)
            self.processes.append(process)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []

    def __call__(self, function: Callable, *args: Any) -> list[Any]:
        outcomes = self._run(function, args, AFTER_DEATH)
        failed = [
            f"rank {rank}:\n{outcome.error or 'died'}"
            for rank, outcome in enumerate(outcomes)
            if outcome.error or outcome.died
        ]
        if failed:
            raise AssertionError("\n".join(failed))
        return [outcome.result for outcome in outcomes]

    def outcomes(self, function: Callable, *args: Any) -> list[Outcome]:
        """Run a function on all ranks, some of which may raise or die.

        Raises:
            AssertionError: A rank did neither return, raise nor die within LIMIT seconds.
        """
        return self._run(function, args, LIMIT)

    def _run(self, function: Callable, args: tuple, after_death: float) -> list[Outcome]:
        """Run a function on all ranks, and wait for so many seconds for the others of a rank that has died."""
        if self.calls == CALLS:
            self.close()
        if not self.processes:
            self.start()
        self.calls += 1
        for pipe in self.pipes:
            pipe.send((function, args))
        outcomes: list[Outcome | None] = [None] * self.count
        while None in outcomes:
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if outcomes[rank] is None}
            has_died = any(outcome is not None and outcome.died for outcome in outcomes)
            ready = wait(waiting, after_death if has_died else LIMIT)
            if not ready and has_died and after_death < LIMIT:
                outcomes = [outcome or Outcome(error="waited for a rank that has died") for outcome in outcomes]
            elif not ready:
                self.close()
                raise AssertionError(f"ranks {list(waiting.values())} did not answer; the others: {outcomes}")
            for pipe in ready:
                outcomes[waiting[pipe]] = _received(pipe)
        if any(outcome.error or outcome.died for outcome in outcomes):
            self.close()  # the ranks may be at different places now
        return outcomes


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Inside, this rank waits for others for so long."""
    store = dist.distributed_c10d._get_default_store()
    before = store.timeout
    store.set_timeout(timedelta(seconds=seconds))
    try:
        yield
    finally:
        store.set_timeout(before)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _received(pipe) -> Outcome:
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return Outcome(died=True)


def forget_deepspeed() -> None:
    """Forget the DeepSpeed config of an earlier call, which transformers would use for new models while it lives."""
    module = sys.modules.get("transformers.integrations.deepspeed")
    if module is not None:
        module.unset_hf_deepspeed_config()


def _serve(rank: int, count: int, port: int, agent: bool, pipe) -> None:
    faulthandler.enable()  # a crash tells where it was
    set_up_kernels()  # the same as in the process that compares the results
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
        OMP_NUM_THREADS="1",
        TORCHELASTIC_USE_AGENT_STORE=str(agent),
    )
    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:  # the process that started this one has ended
            return
        try:
            torch.manual_seed(0)  # as before each test
            forget_deepspeed()
            pipe.send(Outcome(function(rank, *args)))
        except BaseException:
            pipe.send(Outcome(error=traceback.format_exc()))
