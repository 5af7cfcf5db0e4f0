"""DeepSpeed ZeRO-3: a device holds a partition of each parameter, and gathers the parameters of a module while it runs.

The order in which memory is taken and freed is that of DeepSpeed's coordinator. A first step records the order of the
modules. After it the parameters of the next modules are gathered ahead, and a parameter that is used again soon stays
gathered. DeepSpeed replaces F.linear by a function that also saves the inputs of frozen layers.
"""

import math
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.estimation.memory import Memory, bytes_of
from s2ft.estimation.ranks.hooks import after_backward_of, before_backward_of, is_in_backward
from s2ft.estimation.ranks.one import MakeOptimizer
from s2ft.estimation.ranks.zero import MASTER, FlatOptimizer
from s2ft.estimation.strategy import Strategy


class Weight:
    """A parameter that is gathered when a module needs it."""

    def __init__(self, parameter: Tensor, devices: int, persistent: bool) -> None:
        self.numel, self.dtype = parameter.numel(), parameter.dtype
        self.bytes = self.numel * self.dtype.itemsize
        self.partition = math.ceil(self.numel / devices)
        self.trained, self.persistent = parameter.requires_grad, persistent
        self.whole: Tensor | None = None
        self.handle: Handle | None = None
        self.users: set[nn.Module] = set()  # modules that run with it


class Handle:
    """Parameters of a dtype that are gathered in one call, and the buffer that receives them."""

    def __init__(self, weights: list[Weight], buffer: Tensor) -> None:
        self.weights, self.buffer, self.is_complete = weights, buffer, False


class Zero3Device(FlatOptimizer):
    """A device under ZeRO-3."""

    def __init__(self, shadow: nn.Module, memory: Memory, strategy: Strategy, devices: int) -> None:
        super().__init__(shadow, memory, strategy, devices)
        least = strategy.persistence_threshold
        self.weights = {id(p): Weight(p, devices, p.numel() <= least) for p in shadow.parameters()}
        self.partition = sum(self.weights[id(p)].partition for p in self.trained.values())
        self.names = {id(p): name for name, p in self.trained.items()}
        for name, parameter in self.trained.items():
            if parameter.dtype != MASTER:
                self.masters[name] = self.weights[id(parameter)].partition * MASTER.itemsize
        self.in_buffer: list[Tensor] = []
        self.order: list[nn.Module] = []  # of the forward and the backward, as recorded
        self.is_recorded = False
        self.position = 0
        self.ahead: deque[tuple[Weight, int]] = deque()  # what may be gathered next, with the position of its module
        self.fetched_for: defaultdict[int, float] = defaultdict(lambda: -math.inf)  # position by id of the weight
        self.backward_of: dict[nn.Module, set[Weight]] = {}  # modules in their backward, with weights that run again
        self.live = 0  # gathered elements

    def resident(self, name: str, parameter: Tensor, seen: set[int]) -> int:
        if not bytes_of([parameter], seen) or (self.offload == "all"):
            return 0
        return self.weights[id(parameter)].partition * parameter.itemsize

    def gradient(self, name: str) -> int:
        return self.weights[id(self.trained[name])].partition * MASTER.itemsize

    def on_host(self) -> int:
        weights = (w.partition * w.dtype.itemsize for w in self.weights.values()) if self.offload == "all" else ()
        return super().on_host() + sum(weights)

    def buffers(self) -> int:
        return self.strategy.reduce_bucket_size * next(iter(self.trained.values())).itemsize

    # ---- the step --------------------------------------------------------------------------------

    def start(self) -> None:
        self._buffer = self.hold(self.buffers())
        if self.offload is None:
            self._gradients = self.hold(sum(self.gradient(name) for name in self.trained))
            self._master = self.hold(self.masters.total())
        for weight in self.weights.values():
            if weight.persistent:
                weight.whole = self.hold(weight.bytes if self._copies else 0)
        for parameter in self.trained.values():
            parameter.register_post_accumulate_grad_hook(self._into_buffer)
        for module in self.shadow.modules():
            module.register_forward_pre_hook(self._before_module)
            module.register_forward_hook(self._after_module)

    rehearses = True

    def before_forward(self, last: bool) -> None:
        if self.order and not self.is_recorded:
            self.is_recorded = True
        self.position = 0
        self.fetched_for.clear()
        self.ahead = deque(
            (weight, position) for position, module in enumerate(self.order) for weight in self._of(module)
        )

    def context(self) -> AbstractContextManager:
        return _saving_inputs()

    def after_backward(self) -> None:
        self._reduce()
        for module in list(self.backward_of):
            self._release(module, self.backward_of.pop(module), everything=True)

    def _of(self, module: nn.Module) -> list[Weight]:
        parameters = {id(p): p for p in module.parameters(recurse=False)}
        return [self.weights[key] for key in parameters]

    def _before_module(self, module: nn.Module, inputs: tuple) -> tuple:
        self._fetch(module, forward=True)
        return after_backward_of(inputs, partial(self._after_backward_of, module))

    def _after_module(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        self._release(module, set())
        before_backward_of(output, partial(self._fetch, module, forward=False))

    def _after_backward_of(self, module: nn.Module) -> None:
        if module in self.backward_of:
            self._release(module, self.backward_of.pop(module))

    # ---- gathering -------------------------------------------------------------------------------

    def _fetch(self, module: nn.Module, forward: bool) -> None:
        if not self.is_recorded:
            self.order.append(module)
        if not forward:
            self.backward_of.setdefault(module, set())
        needed = self._of(module)
        self._gather([weight for weight in needed if weight.whole is None and weight.handle is None])
        again = forward and is_in_backward() and self.backward_of
        for weight in needed:
            weight.users.add(module)
            if again and not weight.trained:
                self.backward_of[next(reversed(self.backward_of))].add(weight)
            self._wait(weight)
        if self.is_recorded:
            self._gather_ahead(needed)
        self.position += 1

    def _gather(self, weights: list[Weight]) -> None:
        self.live += sum(weight.numel for weight in weights)
        if len(weights) == 1:
            self._gather_one(weights[0])
            return
        by_dtype: defaultdict[torch.dtype, list[Weight]] = defaultdict(list)
        for weight in weights:
            by_dtype[weight.dtype].append(weight)
        moved = self._from_host(weights)
        for dtype, together in by_dtype.items():
            elements = sum(weight.partition for weight in together) * self.devices
            handle = Handle(together, self.hold(elements * dtype.itemsize if self._copies else 0))
            for weight in together:
                weight.handle = handle
        del moved

    def _gather_one(self, weight: Weight) -> None:
        moved = self._from_host([weight])
        weight.handle = Handle([weight], self.hold(0))
        weight.handle.is_complete = True
        weight.whole = self.hold(weight.partition * self.devices * weight.dtype.itemsize if self._copies else 0)
        del moved

    @property
    def _copies(self) -> bool:
        """Whether gathering copies. A single device uses its partitions, which are whole, in place."""
        return self.devices > 1 or self.offload == "all"

    def _from_host(self, weights: list[Weight]) -> Tensor | None:
        """Return the copies on the device of partitions that are on the host, which live during the gathering."""
        if self.offload != "all" or self.device.type == "cpu":
            return None
        return self.hold(sum(weight.partition * weight.dtype.itemsize for weight in weights))

    def _wait(self, weight: Weight) -> None:
        handle, weight.handle = weight.handle, None
        if handle is None or handle.is_complete:
            return
        for one in handle.weights:
            one.whole = self.hold(one.bytes if self._copies else 0)
        handle.is_complete = True

    def _gather_ahead(self, needed: list[Weight]) -> None:
        missing = {id(weight) for weight in needed if self.fetched_for[id(weight)] < self.position}
        done: set[int] = set()
        while self.ahead and len(done) < len(missing):
            weight, position = self.ahead.popleft()
            self.fetched_for[id(weight)] = position
            done.add(id(weight))
        room = min(self.strategy.max_live_parameters - self.live, self.strategy.prefetch_bucket_size)
        chosen: list[Weight] = []
        while self.ahead and sum(weight.numel for weight in chosen) < room:
            weight, position = self.ahead.popleft()
            self.fetched_for[id(weight)] = max(self.fetched_for[id(weight)], position)
            if weight.whole is None and weight.handle is None and weight not in chosen:
                chosen.append(weight)
        if chosen:
            self._gather(chosen)

    def _release(self, module: nn.Module, again: set[Weight], everything: bool = False) -> None:
        own = self._of(module)
        free = {id(weight) for weight in own if not weight.persistent}
        if self.is_recorded and not everything:
            free -= self._used_soon(own)
        free |= {id(weight) for weight in again if not weight.persistent}
        for weight in {*own, *again}:
            weight.users.discard(module)
            if id(weight) in free and weight.whole is not None and weight.handle is None and not weight.users:
                weight.whole = None
                self.live -= weight.numel

    def _used_soon(self, weights: list[Weight]) -> set[int]:
        """Return the ids of weights that are used again within the reuse distance, or were gathered ahead for it."""
        kept = {id(weight) for weight in weights if self.fetched_for[id(weight)] > self.position}
        passed = 0
        for module in self.order[self.position :]:
            if passed >= self.strategy.max_reuse_distance:
                break
            for weight in self._of(module):
                kept.add(id(weight))
                passed += weight.numel
        return kept

    # ---- gradients -------------------------------------------------------------------------------

    def _into_buffer(self, parameter: Tensor) -> None:
        size, elements = self.strategy.reduce_bucket_size, sum(p.numel() for p in self.in_buffer)
        if self.in_buffer and elements + parameter.numel() > size:
            self._reduce()
            elements = 0
        if elements + parameter.numel() <= size:
            view = self.empty(tuple(parameter.shape), parameter.dtype)
            self.memory.leave_out(view)
            parameter.grad = view
        self.in_buffer.append(parameter)

    def _reduce(self) -> None:
        alone = len(self.in_buffer) == 1 and self.in_buffer[0].numel() % self.devices == 0
        copied = 0 if alone else sum(self.weights[id(p)].partition * p.itemsize for p in self.in_buffer)
        sent = self.hold(copied * self.devices)
        del sent
        for parameter in self.in_buffer:
            parameter.grad = None
        self.in_buffer = []

    def update(self, make: MakeOptimizer) -> None:
        for weight in self.weights.values():
            weight.whole = weight.handle = None
        super().update(make)

    def _flat_gradient(self) -> Tensor:
        gradient = super()._flat_gradient()
        if len(self.trained) == 1 and self.offload is None:
            self._gradients = None  # flattening a single tensor does not copy it
        return gradient


@contextmanager
def _saving_inputs() -> Iterator[None]:
    """Inside, F.linear is replaced as DeepSpeed replaces it under ZeRO-3.

    A TorchFunctionMode would not reach the blocks that gradient checkpointing runs again: it is off while
    torch.autograd.backward runs.
    """
    functional, before = torch.nn.functional, torch.nn.functional.linear
    functional.linear = _linear
    try:
        yield
    finally:
        functional.linear = before


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Linear.apply(input, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight, bias)
        output = input.matmul(weight.t())
        return output if bias is None else output.add_(bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        input, weight, bias = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        of_input = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
        of_weight = flat.t().matmul(input.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return of_input, of_weight, flat.sum(0) if bias is not None and ctx.needs_input_grad[2] else None
