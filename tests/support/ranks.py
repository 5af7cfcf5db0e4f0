"""Two processes of one gloo group on this machine, which run functions for the tests."""

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

from support.rounding import set_up_kernels

RANKS = 2
LIMIT = 120  # seconds for one function


class Ranks:
    """``ranks(function, *args)`` runs ``function(rank, *args)`` on both ranks and returns their results in order.

    Functions and arguments are pickled, so a function must be defined in a module. If it raises, the call fails with
    its traceback. The first call starts the processes. After a failure the next call starts new ones.
    """

    def __init__(self) -> None:
        self.pipes, self.processes = [], []

    def start(self) -> None:
        context, port = mp.get_context("spawn"), free_port()
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []

    def __call__(self, function: Callable, *args: Any) -> list[Any]:
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            answers.append(self._answer(rank, pipe, answers))
        failed = [f"rank {rank}:\n{error}" for rank, (error, _) in enumerate(answers) if error]
        if failed:
            self.close()  # the ranks may be at different places now
            raise AssertionError("\n".join(failed))
        return [result for _, result in answers]

    def _answer(self, rank: int, pipe, before: list):
        try:
            if pipe.poll(LIMIT):
                return pipe.recv()
            error = "did not answer"
        except EOFError:
            error = "died"
        self.close()
        raise AssertionError(f"rank {rank} {error}; before it: {[error for error, _ in before]}")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _serve(rank: int, port: int, pipe) -> None:
    set_up_kernels()  # the same as in the process that compares the results
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        LOCAL_WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    while True:
        function, args = pipe.recv()
        try:
            pipe.send(("", function(rank, *args)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
