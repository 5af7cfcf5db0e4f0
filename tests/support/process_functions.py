"""Functions that tests call in a process of their own. Each process imports this module, so it imports little."""

import os

import torch

from s2ft.reproduce.processes import PeakMemory


def allocate(size):
    return len(torch.ones(size, dtype=torch.uint8))


def peak_of(size):
    memory = PeakMemory("cpu")
    memory.forget_peak()
    torch.ones(size, dtype=torch.uint8)
    return memory.peak()


def end(number):
    os.kill(os.getpid(), number)


def fail():
    raise KeyError("no such thing")
