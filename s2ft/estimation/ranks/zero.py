"""DeepSpeed ZeRO-1 and ZeRO-2: every device has the whole model, and a part of the optimizer's state.

Trained parameters lie in one flat tensor that is cut into equal partitions. The optimizer updates a float32 copy of
this device's partition. Gradients are copied into a reduction buffer, summed, and those of this device's partition are
copied out of it.
"""

import math

import torch
from torch import Tensor, nn

from s2ft.estimation.memory import Memory
from s2ft.estimation.ranks.one import MakeOptimizer, OneDevice
from s2ft.estimation.strategy import Strategy

MASTER = torch.float32  # dtype in which DeepSpeed's optimizer keeps trained parameters


class FlatOptimizer(OneDevice):
    """What all stages share: the optimizer updates one flat partition of all trained parameters."""

    partition: int  # number of elements

    def update(self, make: MakeOptimizer) -> None:
        """Run the optimizer's step on the partition, and divide its state among the trained parameters."""
        flat = nn.Parameter(self.empty((self.partition,), MASTER))
        self.memory.leave_out(flat)
        flat.grad = self._flat_gradient()
        self.flat = {"": flat}
        super().update(make)
        self._share(self.states, self.states.pop(""))

    def optimized(self) -> dict[str, Tensor]:
        return self.flat

    def _flat_gradient(self) -> Tensor:
        gradient = self.empty((self.partition,), MASTER)
        self.memory.leave_out(gradient) if self.offload else self.memory.watch(gradient)
        return gradient

    def _share(self, counter: dict[str, int], total: int) -> None:
        """Divide bytes among the trained parameters by their size. The sum is exact."""
        elements, done, given = sum(p.numel() for p in self.trained.values()), 0, 0
        for name, parameter in self.trained.items():
            done += parameter.numel()
            share = total * done // elements - given
            counter[name] = share
            given += share


class ZeroDevice(FlatOptimizer):
    """A device under ZeRO-1 or ZeRO-2: of all devices the one whose partition has most parameters."""

    def __init__(self, shadow: nn.Module, memory: Memory, strategy: Strategy, devices: int) -> None:
        super().__init__(shadow, memory, strategy, devices)
        self.partitions_gradients = strategy.name == "zero2"
        elements = sum(p.numel() for p in self.trained.values())
        self.partition = math.ceil(elements / (2 * devices)) * 2  # DeepSpeed aligns the flat tensor to 2 × devices
        self.mine = self._parameters_of_partition()
        self._share(self.masters, self.partition * MASTER.itemsize)
        self.buffer: Tensor | None = None
        self.in_buffer: list[Tensor] = []
        self.out: Tensor | None = None  # gradients of this device's partition
        self.last = True

    def _parameters_of_partition(self) -> set[str]:
        """Return the names of the parameters that lie in a partition, in full or with a part: the largest such set."""
        spans, start = {}, 0
        for name, parameter in self.trained.items():
            spans[name] = (start, start + parameter.numel())
            start += parameter.numel()
        sets = [
            {
                name
                for name, (begin, end) in spans.items()
                if begin < (i + 1) * self.partition and end > i * self.partition
            }
            for i in range(self.devices)
        ]
        return max(sets, key=lambda names: sum(self.trained[name].numel() for name in names))

    def gradient(self, name: str) -> int:
        parameter = self.trained[name]
        return parameter.nbytes if name in self.mine else 0

    def buffers(self) -> int:
        dtype = next(iter(self.trained.values())).dtype
        return self.strategy.reduce_bucket_size * dtype.itemsize * (2 if self.strategy.overlap_comm else 1)

    # ---- the step --------------------------------------------------------------------------------

    def start(self) -> None:
        self._master = None if self.offload else self.hold(self.masters.total())
        if self.offload:
            self._copied = self.hold(max(p.nbytes for p in self.trained.values()))  # a gradient on its way to the host
        for parameter in self.trained.values():
            parameter.register_post_accumulate_grad_hook(self._after_gradient)

    def before_forward(self, last: bool) -> None:
        self.last = last

    def _after_gradient(self, parameter: Tensor) -> None:
        self.buffer = self.hold(self.buffers()) if self.buffer is None else self.buffer
        if self.partitions_gradients or self.strategy.overlap_comm:
            self._into_buffer(parameter)

    def _into_buffer(self, parameter: Tensor) -> None:
        size = self.strategy.reduce_bucket_size
        if sum(p.numel() for p in self.in_buffer) + parameter.numel() > size:
            self._reduce()
        if parameter.numel() <= size:
            view = self.empty(tuple(parameter.shape), parameter.dtype)
            self.memory.leave_out(view)
            parameter.grad = view
        self.in_buffer.append(parameter)

    def _reduce(self) -> None:
        summed = self.hold(sum(p.nbytes for p in self.in_buffer))
        del summed
        mine = [p for name, p in self.trained.items() if name in self.mine]
        if not self.offload and self.out is None and self.in_buffer:
            self.out = self.hold(sum(p.nbytes for p in mine))
        if self.partitions_gradients or self.offload:
            for parameter in self.in_buffer:
                parameter.grad = None
        self.in_buffer = []

    def after_backward(self) -> None:
        if not self.partitions_gradients and not self.strategy.overlap_comm and self.last:
            for parameter in self.trained.values():
                self._into_buffer(parameter)
        if self.partitions_gradients or self.last:
            self._reduce()
        views = len(self.mine) < len(self.trained) and self.last  # ZeRO-1 keeps the views of others until the step
        if self.partitions_gradients or not views:
            self.buffer = None

    def update(self, make: MakeOptimizer) -> None:
        self.buffer = None
        super().update(make)

    def _flat_gradient(self) -> Tensor:
        gradient = super()._flat_gradient()
        self.out = None
        for parameter in self.trained.values():
            parameter.grad = None
        return gradient
