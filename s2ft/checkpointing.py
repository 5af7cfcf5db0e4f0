"""Gradients through checkpointed blocks whose inputs are frozen.

A reentrant checkpoint gives no gradient, not even to the weights inside it, where none of its inputs needs one; and
with the embeddings frozen the first blocks' inputs need none. So the input of such a block is made to need one: of a
checkpointed block that trains something, and of no other, so that the backward still ends at the lowest of them.
"""
from typing import Iterable, List

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def open_blocks(model: nn.Module, trained: Iterable[str]) -> List[RemovableHandle]:
    """Give transformers' checkpointable blocks around the modules `trained` the hook. Returns: what removes it."""
    around = {parent for path in trained for parent in _parents(path)}
    return [module.register_forward_pre_hook(_need_gradient) for path, module in model.named_modules()
            if path in around and _is_block(module)]


def _parents(path: str) -> Iterable[str]:
    while path := path.rpartition(".")[0]:
        yield path


def _is_block(module: nn.Module) -> bool:
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)


def _need_gradient(block: nn.Module, inputs: tuple):
    if not (block.gradient_checkpointing and block.training and torch.is_grad_enabled()):
        return None   # transformers checkpoints no block then
    if torch.compiler.is_compiling() or not _is_reentrant(block):
        return None   # these kinds look at what is inside
    if not inputs or any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return None
    hidden_states, *rest = inputs
    return (hidden_states.detach().requires_grad_(), *rest)   # a view: nobody else's tensor is changed


def _is_reentrant(block: nn.Module) -> bool:
    """Where nothing is said, PyTorch's default is True."""
    options = getattr(block._gradient_checkpointing_func, "keywords", {})
    return options.get("use_reentrant") is not False
