"""Send real SIGINTs at random moments of five loops; after each, detach must restore the base, bit for bit.

    python -m tests.state.interrupts --count 300

prints one line per loop and exits with 1 if a loop failed. S2FT_TEST_KERNELS=reference runs the PyTorch reference.
"""

import argparse
import copy
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import nn

import s2ft
from state import REFERENCE
from state.models import tokens
from state.plain import describe, detach_if_attached, differences
from state.sweep import Sweep

WIDE = dict(layers=2, hidden_size=64, intermediate_size=256)  # so large that products and copies take time
Loop = Callable[[nn.Module], None]


class Scene(Sweep):
    """Loops over the operations of the sweep, on larger models."""

    def attach_and_detach(self, model: nn.Module) -> None:
        for _ in range(2):
            s2ft.attach(model, self.config)
            s2ft.detach(model)

    def load_and_detach(self, model: nn.Module) -> None:
        for _ in range(3):
            s2ft.load_adapter(model, self.a)
            s2ft.detach(model)

    def switch(self, model: nn.Module) -> None:
        for active in ("a", "b", None, {"a": 0.5, "b": 0.5}) * 3:
            s2ft.set_adapter(model, active)

    def switch_trainable(self, model: nn.Module) -> None:
        for active in (None, "t") * 6:
            s2ft.set_adapter(model, active)

    def train(self, model: nn.Module) -> None:
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(2):
            ids = tokens(model, seed=step)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def loops(self) -> dict[str, tuple[nn.Module, Loop]]:
        """Map the name of each loop to the model that it starts from, which must be copied, and to the loop."""
        return {
            "attach+detach": (self.plain, self.attach_and_detach),
            "load_adapter+detach": (self.plain, self.load_and_detach),
            "set_adapter": (self.loaded, self.switch),
            "set_adapter, trainable": (self.trainable, self.switch_trainable),
            "training step": (self.trainable, self.train),
        }


def interrupt(model: nn.Module, loop: Loop, delay: float) -> bool:
    """Run the loop and send SIGINT to this process after `delay` seconds. Returns whether the loop was interrupted."""
    timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
    finished = False
    try:
        timer.start()
        loop(model)
        finished = True
        timer.join()  # a signal after the end of the loop is caught here
    except KeyboardInterrupt:
        pass
    timer.join()
    torch.set_grad_enabled(True)  # an interrupt in no_grad of PyTorch, as in a step, may leave it off
    return not finished


def problem_after_detach(model: nn.Module, base: dict) -> str | None:
    """Detach and compare with the base. Returns a description of the problem, or None."""
    try:
        detach_if_attached(model)
    except Exception as error:
        return f"detach raised {type(error).__name__}: {error}"
    model.eval()  # the training loop left it in training mode
    found = differences(base, describe(model))
    return f"{len(found)} differences from the base, the first: {found[0]}" if found else None


def run_loop(start: nn.Module, loop: Loop, base: dict, count: int, generator: random.Random) -> tuple[int, list[str]]:
    """Interrupt `count` runs of a loop. Returns the number of interrupted runs, and the problems."""
    model, begin = copy.deepcopy(start), time.perf_counter()
    loop(model)
    length = time.perf_counter() - begin
    cut, problems = 0, []
    for number in range(count):
        model = copy.deepcopy(start)
        try:
            cut += interrupt(model, loop, generator.uniform(0.0, 1.05 * length))
        except Exception as error:
            problems.append(f"run {number}: the loop raised {type(error).__name__}: {error}")
            continue
        problem = problem_after_detach(model, base)
        if problem is not None:
            problems.append(f"run {number}: {problem}")
    return cut, problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=300, help="number of interrupted runs of each loop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", choices=("permuted", "indexed"), default="permuted")
    parser.add_argument("--loop", help="only this one")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background processes ignore Ctrl-C
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-4)  # so that a signal also arrives between two calls of torch
    scene, generator, failed = Scene(options.layout, **WIDE), random.Random(options.seed), False
    for name, (start, loop) in scene.loops().items():
        if options.loop in (None, name):
            cut, problems = run_loop(start, loop, scene.base, options.count, generator)
            failed = failed or bool(problems) or not cut  # a run that nothing cuts short shows nothing
            print(
                f"{name:<22} {options.layout}, {'reference' if REFERENCE else 'compiled'}: {options.count} runs, {cut} cut short, "
                f"{len(problems)} failures",
                *problems[:3],
                sep="\n    ",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
