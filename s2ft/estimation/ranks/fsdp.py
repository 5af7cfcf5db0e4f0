"""FSDP2: a device holds a shard of each parameter, and gathers a group of modules while it runs.

The order in which memory is taken and freed is that of torch.distributed.fsdp.fully_shard: the gathered weights of a
group live from its forward to the end of its forward, and from the start to the end of its backward, when its gradients
are reduced. The receiving buffer of a gather lives until the next group has been gathered. In the backward the next
group is gathered ahead.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from s2ft.estimation.memory import Memory, bytes_of
from s2ft.estimation.ranks.hooks import after_backward_of, before_backward_of, is_in_backward
from s2ft.estimation.ranks.one import OneDevice
from s2ft.estimation.strategy import Strategy

IDLE, FORWARD, PRE_BACKWARD, POST_BACKWARD = "idle", "forward", "pre_backward", "post_backward"


class FsdpDevice(OneDevice):
    """A device under FSDP2."""

    def __init__(self, shadow: nn.Module, memory: Memory, strategy: Strategy, devices: int) -> None:
        super().__init__(shadow, memory, strategy, devices)
        self.groups = list(_groups(self))  # in the order in which fully_shard is called
        self.of_parameter = {id(p): group for group in self.groups for p in group.parameters}
        self.shards = {name: self.part_of_trained(p, shard_shape(p, devices)) for name, p in self.trained.items()}
        self.names = {id(p): name for name, p in self.trained.items()}
        self.before: Tensor | None = None  # receiving buffer of the last gather of the forward
        self.sent: list[Tensor] = []  # gradients that are being reduced
        self.forward_order: list[Group] = []
        self.last = True

    def resident(self, name: str, parameter: Tensor, seen: set[int]) -> int:
        whole = bytes_of([parameter], seen)
        if not whole or id(parameter) not in self.of_parameter:
            return whole
        return 0 if self.offload else padded_numel(parameter, self.devices) // self.devices * parameter.itemsize

    def gradient(self, name: str) -> int:
        gradient = self.shards[name].grad
        return 0 if gradient is None else gradient.nbytes

    def on_host(self) -> int:
        shards = sum(group.bytes // self.devices for group in self.groups) if self.offload else 0
        return super().on_host() + shards

    def optimized(self) -> dict[str, Tensor]:
        return self.shards

    # ---- the step --------------------------------------------------------------------------------

    def start(self) -> None:
        for group in self.groups:
            group.register()
        self.shadow.register_forward_hook(self._after_root)

    def before_forward(self, last: bool) -> None:
        self.last = last

    def _after_root(self, module: nn.Module, inputs: tuple, output: Any) -> Any:
        for group in self.groups:
            if group.left:  # a module of the group did not run
                output = group.after_forward(output)
                group.left = set()
        self.before = None
        return output

    def after_backward(self) -> None:
        for group in self.groups:
            if group.training != POST_BACKWARD:
                group.after_backward()
            group.training = group.state = IDLE
            group.gathered = None
            group.positions.clear()
        self.forward_order.clear()
        self.sent.clear()

    def reduce(self, parameters: list[Tensor]) -> None:
        """Sum gradients over the devices and keep this device's shards."""
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        whole = sum(padded_numel(gradient, self.devices) * gradient.itemsize for gradient in gradients)
        dtype = gradients[0].dtype
        self.sent.append(self.hold(whole))
        gradients.clear()
        mine = self.empty((whole // self.devices // dtype.itemsize,), dtype)
        self.memory.watch(mine)
        for parameter in parameters:
            shard = self.shards[self.names[id(parameter)]]
            shard.grad = self._on_host(shard) if self.offload else mine.as_strided(shard.shape, shard.stride())

    def _on_host(self, shard: Tensor) -> Tensor:
        gradient = self.empty(tuple(shard.shape), shard.dtype)
        self.memory.leave_out(gradient)
        return gradient


class Group:
    """Modules that FSDP2 gathers together.

    Args:
        device: The device.
        modules: The modules. The group is gathered before the first of them runs.
        parameters: Parameters in them that no other group has.
        reshard: Whether the gathered weights are freed after the forward.
    """

    def __init__(
        self, device: FsdpDevice, modules: tuple[nn.Module, ...], parameters: list[Tensor], reshard: bool
    ) -> None:
        self.device, self.modules, self.parameters, self.reshard = device, modules, parameters, reshard
        self.bytes = sum(padded_numel(p, device.devices) * p.itemsize for p in parameters)
        self.whole: Tensor | None = None  # gathered weights
        self.gathered: Tensor | None = None  # receiving buffer, before its weights are copied out
        self.left: set[nn.Module] = set()  # modules that have not run in this forward
        self.positions: list[int] = []  # in the order of the forward
        self.state = self.training = IDLE  # of the modules, and of the group, as in fully_shard

    def register(self) -> None:
        """Register hooks at the places at which FSDP2 has its own."""
        for module in self.modules:
            module.register_forward_pre_hook(self._before_module, prepend=True, with_kwargs=True)
            module.register_forward_hook(self._after_module, always_call=True)

    # ---- forward ---------------------------------------------------------------------------------

    def _before_module(self, module: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
        if not self.left:
            self.left = set(self.modules)
        if self.state == PRE_BACKWARD:  # a checkpointed block runs again
            self._gather()
            self._copy_out()
            return inputs, named
        first = self.training != FORWARD
        self.state = self.training = FORWARD
        self._gather()
        self._copy_out()
        return after_backward_of((inputs, named), self.after_backward) if first else (inputs, named)

    def _after_module(self, module: nn.Module, inputs: tuple, output: Any) -> Any:
        self.left.discard(module)
        return output if self.left else self.after_forward(output)

    def after_forward(self, output: Any) -> Any:
        """Free the gathered weights, and watch for the backward of the output."""
        if self.state == PRE_BACKWARD:
            return output
        if not is_in_backward():
            if self.reshard:
                self.whole = None
            self.positions.append(len(self.device.forward_order))
            self.device.forward_order.append(self)
        self.training = self.state = IDLE
        before_backward_of(output, self._before_backward)
        return output

    # ---- backward --------------------------------------------------------------------------------

    def _before_backward(self) -> None:
        self.state = PRE_BACKWARD
        if self.training == PRE_BACKWARD:
            return
        self.training = PRE_BACKWARD
        self._gather()
        self._copy_out()
        if self.positions and (position := self.positions.pop()) > 0:
            self.device.forward_order[position - 1]._gather()

    def after_backward(self) -> None:
        """Free the gathered weights and reduce the gradients."""
        self.training = POST_BACKWARD
        with_gradient = [p for p in self.parameters if p.grad is not None]
        self.whole = None
        if self.device.last:
            self.device.sent.clear()
            if with_gradient:
                self.device.reduce(with_gradient)

    # ---- gathering -------------------------------------------------------------------------------

    def _gather(self) -> None:
        if self.whole is not None or self.gathered is not None:
            return
        moved = self.device.hold(self.bytes // self.device.devices) if self._is_moved() else None
        self.gathered = self.device.hold(self.bytes if self.device.devices > 1 else 0)
        del moved

    def _is_moved(self) -> bool:
        """Whether the shards come from the host's memory."""
        return self.device.offload is not None and self.device.device.type != "cpu"

    def _copy_out(self) -> None:
        if self.gathered is None:
            return
        if self.training == FORWARD:
            self.device.before = None
        self.whole = self.device.hold(self.bytes)
        if self.training == FORWARD:
            self.device.before = self.gathered
        self.gathered = None


# ---- shards ------------------------------------------------------------------------------------------------


def shard_shape(parameter: Tensor, devices: int) -> tuple[int, ...]:
    """Return the shape of the first device's shard: equal shares of the first dimension, rounded up."""
    if parameter.dim() == 0:
        return ()
    return (math.ceil(parameter.shape[0] / devices), *parameter.shape[1:])


def padded_numel(parameter: Tensor, devices: int) -> int:
    """Return the number of elements of all shards together. Every device has as many as the first."""
    return math.prod(shard_shape(parameter, devices)) * devices


# ---- groups ------------------------------------------------------------------------------------------------


def _groups(device: FsdpDevice) -> Iterator[Group]:
    """Yield the groups that accelerate makes, or those of fully_shard on each block and then on the model."""
    shadow, strategy = device.shadow, device.strategy
    taken: set[int] = set()
    make = partial(_group, device, taken)
    for block in _blocks(shadow):
        yield from make((block,), strategy.reshard_after_forward)
    if strategy.wrap == "accelerate":
        embedding, head = _called(shadow, "get_input_embeddings"), _called(shadow, "get_output_embeddings")
        tied = embedding is not None and head is not None and embedding.weight is head.weight
        if embedding is not None and not tied:
            yield from make((embedding,), strategy.reshard_after_forward)
        tail = (_final_norm(shadow), embedding, head) if tied else (_final_norm(shadow), head)
        yield from make(tuple(module for module in tail if module is not None), False)
    yield from make((shadow,), False)


def _group(device: FsdpDevice, taken: set[int], modules: tuple[nn.Module, ...], reshard: bool) -> Iterator[Group]:
    parameters = []
    for parameter in (p for module in modules for p in module.parameters()):
        if id(parameter) not in taken and parameter.is_floating_point():
            taken.add(id(parameter))
            parameters.append(parameter)
    if parameters:
        yield Group(device, modules, parameters, reshard)


def _blocks(shadow: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that transformers does not split, the inner ones first."""
    names = set(getattr(shadow, "_no_split_modules", None) or ())
    found = [module for module in shadow.modules() if module is not shadow and type(module).__name__ in names]
    yield from reversed(found)


def _called(shadow: nn.Module, name: str) -> nn.Module | None:
    get: Callable = getattr(shadow, name, lambda: None)
    return get()


def _final_norm(shadow: nn.Module) -> nn.Module | None:
    """Return the last norm among the direct children of the base model, which accelerate looks for."""
    prefix = getattr(shadow, "base_model_prefix", "")
    base = getattr(shadow, prefix, None) if prefix else shadow
    norms = [module for module in base.children() if "Norm" in type(module).__name__] if base is not None else []
    return norms[-1] if norms else None
