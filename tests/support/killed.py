"""A script that a launcher can run: the command line of s2ft, in which one rank kills itself at a chosen function.

killed.py RANK MODULE:NAME NUMBER ARGUMENTS...
"""

import importlib
import os
import signal
import sys
from collections.abc import Callable


def kill_at(point: str, number: int = 1) -> None:
    """Kill this process when it calls a function for the nth time. The point is "module:name"."""
    module, _, names = point.partition(":")
    *classes, name = names.split(".")
    owner = importlib.import_module(module)
    for one in classes:
        owner = getattr(owner, one)
    function: Callable = getattr(owner, name)
    calls: list[int] = []

    def kill(*args, **options):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    setattr(owner, name, kill)


if __name__ == "__main__":
    from s2ft.cli.main import main

    rank, point, number, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        kill_at(point, int(number))
    sys.exit(main(arguments))
