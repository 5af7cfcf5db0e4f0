"""Running a model whose weights ZeRO-3 has partitioned, before DeepSpeed's engine runs it.

After deepspeed.zero.Init a parameter is empty on every rank, and only an engine gathers it for a forward. Selections
that run the model come before the engine. They run it inside :func:`gathered_forwards`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.distributed import full_shape, is_partitioned


@contextmanager
def gathered_forwards(model: nn.Module) -> Iterator["Gathered"]:
    """Inside, the model's forward and backward run on gathered weights. Every rank must run them on the same inputs.

    The weights of a block are gathered when it starts and freed when it ends, those outside the blocks for the whole
    forward. For the backward a weight is gathered again, each time that an operation needs it. Gathered weights are
    tensors of their own: the parameters stay partitioned. Nothing happens for a model that is not partitioned.

    Args:
        model: The model. Its modules must not be exchanged inside.

    Returns:
        A context manager that yields an object with the leaves to which gradients are added.
    """
    gathered = Gathered()
    with ExitStack() as stack:
        if any(map(is_partitioned, model.parameters())):
            stack.callback(gathered.restore_all)
            for module, owners in _units(model):
                before = partial(gathered.before, owners)
                stack.callback(module.register_forward_pre_hook(before, prepend=True).remove)
                stack.callback(module.register_forward_hook(gathered.after, always_call=True).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(gathered.pack, gathered.unpack))
        yield gathered


def _units(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Yield modules, with the modules whose parameters are gathered for their forwards.

    That is a block with everything inside, because a forward may read the weights of modules below without running
    them, the model with everything outside the blocks, and each other module by itself: a model may run it without
    running the block around it.
    """
    blocks = dict(_blocks(model))
    inside = {module for found in blocks.values() for module in found}
    yield model, [module for module in model.modules() if module not in inside]
    for module in model.modules():
        if module is not model:
            yield module, blocks.get(module, [module])


def _blocks(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from ((block, list(block.modules())) for block in child.children())
        else:
            yield from _blocks(child)


class Gathered:
    """What is gathered now, and which saved tensors of a graph stand for weights that were freed."""

    def __init__(self) -> None:
        self.leaves: dict[int, Tensor] = {}  # by the id of the parameter
        self.replaced: list[list[tuple[nn.Module, str, nn.Parameter]]] = []  # one list for each forward under way
        self.by_storage: dict[int, tuple[nn.Parameter, int]] = {}  # parameter, offset of its values in the storage

    def leaf(self, weight: Tensor) -> Tensor:
        """The leaf to which the backward adds a weight's gradient: the weight, or for a partitioned one a stand-in.

        A stand-in has the full shape and no memory. It requires a gradient if it is asked to.
        """
        if not is_partitioned(weight):
            return weight
        if id(weight) not in self.leaves:
            self.leaves[id(weight)] = weight.new_zeros(()).detach().expand(full_shape(weight))
        return self.leaves[id(weight)]

    def before(self, owners: list[nn.Module], module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook: gather the parameters of these modules, unless they are gathered already."""
        self.replaced.append([])
        found: dict[int, Tensor] = {}  # a tied weight is gathered once
        for owner in owners:
            for name, parameter in list(owner._parameters.items()):
                if parameter is not None and is_partitioned(parameter):
                    if id(parameter) not in found:
                        found[id(parameter)] = self.full(parameter)
                    self.replaced[-1].append((owner, name, parameter))
                    owner._parameters[name] = found[id(parameter)]

    def after(self, module: nn.Module | None = None, inputs: Any = None, output: Any = None) -> None:
        """Forward hook: put the parameters back, and free what was gathered."""
        freed = {}
        for owner, name, parameter in self.replaced.pop() if self.replaced else ():
            freed[id(parameter)] = owner._parameters[name]
            owner._parameters[name] = parameter
        for full in freed.values():
            self.by_storage.pop(full.untyped_storage().data_ptr(), None)

    def restore_all(self) -> None:
        """Put all parameters back, after a forward that was interrupted."""
        while self.replaced:
            self.after()

    def full(self, parameter: nn.Parameter) -> Tensor:
        """Gather a parameter into a tensor of its own, whose gradient goes to the parameter's leaf if it wants one."""
        full = _gather(parameter)
        self.by_storage[full.untyped_storage().data_ptr()] = parameter, full.storage_offset()
        leaf = self.leaves.get(id(parameter))
        if leaf is None or not leaf.requires_grad:
            return nn.Parameter(full, requires_grad=False)
        return _Differentiable.apply(leaf, full)

    def pack(self, saved: Tensor) -> Any:
        """Keep the name of a weight in place of the weight, which would stay in memory until the backward."""
        if saved.layout != torch.strided or (storage := saved.untyped_storage().data_ptr()) not in self.by_storage:
            return saved
        parameter, offset = self.by_storage[storage]
        return parameter, saved.size(), saved.stride(), saved.storage_offset() - offset

    def unpack(self, packed: Any) -> Tensor:
        """Return a saved tensor; a weight is gathered again."""
        if isinstance(packed, Tensor):
            return packed
        parameter, size, stride, offset = packed
        full = _gather(parameter)
        return full.as_strided(size, stride, full.storage_offset() + offset)


def _gather(parameter: nn.Parameter) -> Tensor:
    parameter.all_gather([parameter])
    full = parameter.data
    parameter.partition([parameter])  # frees nothing as long as `full` is used
    return full


class _Differentiable(torch.autograd.Function):
    """A weight whose gradient goes to a leaf. The graph keeps the leaf, not the weight."""

    @staticmethod
    def forward(ctx, leaf: Tensor, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
