"""Calls functions before and after the backward of a module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def before_backward_of(outputs: Any, call: Callable[[], None]) -> bool:
    """Call `call` when the gradient of an output is known. Returns whether there is such an output."""
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:
        tensor.register_hook(lambda gradient: call())
    return bool(tensors)


def after_backward_of(inputs: Any, call: Callable[[], None]) -> Any:
    """Return the inputs of a module, such that `call` is called when the gradients of all of them are known."""
    if not torch.is_grad_enabled():
        return inputs
    leaves, tree = tree_flatten(inputs)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if places:
        for i, tensor in zip(places, _AfterBackward.apply(call, *(leaves[i] for i in places))):
            leaves[i] = tensor
    return tree_unflatten(leaves, tree)


def is_in_backward() -> bool:
    """Whether autograd is running a backward."""
    return torch._C._current_graph_task_id() != -1


class _AfterBackward(torch.autograd.Function):
    """Passes tensors on."""

    @staticmethod
    def forward(ctx, call: Callable[[], None], *tensors: Tensor):
        ctx.call = call
        return tensors

    @staticmethod
    def backward(ctx, *gradients):
        ctx.call()
        return None, *gradients
