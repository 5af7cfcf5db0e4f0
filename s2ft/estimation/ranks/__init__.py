"""What one of several devices holds and gathers, by strategy."""

from torch import nn

from s2ft.estimation.memory import Memory
from s2ft.estimation.ranks.ddp import DdpDevice
from s2ft.estimation.ranks.fsdp import FsdpDevice
from s2ft.estimation.ranks.one import OneDevice
from s2ft.estimation.ranks.zero import ZeroDevice
from s2ft.estimation.ranks.zero3 import Zero3Device
from s2ft.estimation.strategy import Strategy

KINDS = {"ddp": DdpDevice, "fsdp2": FsdpDevice, "zero1": ZeroDevice, "zero2": ZeroDevice, "zero3": Zero3Device}


def rank_of(shadow: nn.Module, memory: Memory, strategy: Strategy | None, devices: int) -> OneDevice:
    """Return the device of a strategy, for a shadow model whose weights are those of one tensor-parallel device.

    Args:
        shadow: Shadow model on fake tensors, in training mode.
        memory: Counts the storages of the step.
        strategy: The strategy, None for one device.
        devices: Number of devices.
    """
    if strategy is None or strategy.name == "tp":
        return OneDevice(shadow, memory, strategy)
    if strategy.name == "tp+fsdp2":
        return FsdpDevice(shadow, memory, strategy, devices // strategy.tp_size)
    return KINDS[strategy.name](shadow, memory, strategy, devices)
