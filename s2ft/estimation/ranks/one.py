"""One device that has everything, and what the devices of all strategies share."""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from s2ft.estimation.memory import Memory, bytes_of
from s2ft.estimation.strategy import Strategy

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


class OneDevice:
    """What the first of several devices holds of a shadow model, and what it gathers and sends in a step.

    Memory that a strategy takes beside the model's own step is held as tensors without data, so that it lives exactly
    as long as the strategy keeps it. This class is the plain step on one device.

    Args:
        shadow: Shadow model on fake tensors, in training mode.
        memory: Counts the storages of the step.
        strategy: The strategy, None for one device.
        devices: Number of devices over which the strategy spreads the model.
    """

    def __init__(self, shadow: nn.Module, memory: Memory, strategy: Strategy | None = None, devices: int = 1) -> None:
        self.shadow, self.memory, self.strategy, self.devices = shadow, memory, strategy, devices
        self.trained = {name: p for name, p in shadow.named_parameters() if p.requires_grad}
        self.states: Counter = Counter()  # bytes that optimizer.step() allocates, by name
        self.masters: Counter = Counter()  # bytes of copies of trained weights for the optimizer, by name
        self.mode, self.device = _mode_of(shadow), memory.device

    rehearses = False  # whether the strategy behaves otherwise in the first step than in the others

    # ---- what the device holds between steps -----------------------------------------------------

    @property
    def offload(self) -> str | None:
        """What is on the host: "optimizer", "all" or None."""
        return self.strategy.offload if self.strategy is not None else None

    def resident(self, name: str, parameter: Tensor, seen: set[int]) -> int:
        """Return the bytes of a parameter on this device between its uses. A storage in `seen` counts as 0."""
        return bytes_of([parameter], seen)

    def gradient(self, name: str) -> int:
        """Return the bytes of the gradient that the optimizer reads."""
        gradient = self.trained[name].grad
        return 0 if gradient is None else bytes_of([gradient])

    def on_host(self) -> int:
        """Return the bytes of gradients, states and copies that are on the host."""
        if self.offload is None:
            return 0
        return sum(self.gradient(name) for name in self.trained) + self.states.total() + self.masters.total()

    def buffers(self) -> int:
        """Return the bytes of communication buffers that exist during the whole step."""
        return 0

    # ---- the step --------------------------------------------------------------------------------

    def start(self) -> None:
        """Allocate what exists from the start, and register hooks."""

    def before_forward(self, last: bool) -> None:
        """Note the start of a forward. `last`: its backward is followed by the optimizer's step."""

    def context(self) -> AbstractContextManager:
        """Return a context for each forward and backward."""
        return nullcontext()

    def after_backward(self) -> None:
        """Finish what autograd's hooks have left."""

    def optimized(self) -> dict[str, Tensor]:
        """Return the parameters that the optimizer updates, with gradients, by name."""
        return self.trained

    def update(self, make: MakeOptimizer) -> None:
        """Run the optimizer's step and count its state.

        Raises:
            TypeError: `make` does not make an optimizer.
        """
        updated = self.optimized()
        optimizer = make(list(updated.values()))
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must make a torch.optim.Optimizer, got {type(optimizer).__name__}")
        on_host = self.memory.paused() if self.offload else nullcontext()
        with on_host, self.memory.scalars_are(1.0):  # a step may read a norm; its memory does not depend on the value
            optimizer.step()
        seen: set[int] = set()
        for name, parameter in updated.items():
            if parameter in optimizer.state:
                leaves = tree_leaves(dict(optimizer.state[parameter]))
                self.states[name] = bytes_of((leaf for leaf in leaves if isinstance(leaf, Tensor)), seen)

    # ---- tensors of the strategy -----------------------------------------------------------------

    def hold(self, number: int) -> Tensor:
        """Return a tensor of so many bytes. They count until the tensor is dropped."""
        held = self.empty((number,), torch.uint8)
        self.memory.watch(held)
        return held

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor without data that does not count."""
        with self.mode:
            return torch.empty(shape, dtype=dtype, device=self.device)

    def part_of_trained(self, parameter: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
        """Return a parameter for the optimizer that stands for a part of a trained one and does not count."""
        part = nn.Parameter(self.empty(shape, parameter.dtype))
        self.memory.leave_out(part)
        return part


def _mode_of(shadow: nn.Module) -> FakeTensorMode:
    tensors = [*shadow.parameters(), *shadow.buffers()]
    found = next((tensor for tensor in tensors if isinstance(tensor, FakeTensor)), None)
    return FakeTensorMode(allow_non_fake_inputs=True) if found is None else found.fake_mode
