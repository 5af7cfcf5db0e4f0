"""Gradients through checkpointed blocks whose inputs are frozen.

A reentrant checkpoint gives no gradient, not even to the weights inside it, where none of its inputs needs one; and
with the embeddings frozen the first blocks' inputs need none. So the input of such a block is made to need one: of a
checkpointed block that trains something, and of no other, so that the backward still ends at the lowest of them.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn


def open_blocks(model: nn.Module, trained: Iterable[str]) -> None:
    """Hook transformers' checkpointable blocks around the modules `trained`."""
    around = {parent for path in trained for parent in _parents(path)}
    blocks = [module for path, module in model.named_modules() if path in around and _block_class(module)]
    if any("__call__" in vars(_block_class(block)) for block in blocks):  # transformers 4: a block's hooks run inside
        for embeddings in _embeddings(model):
            embeddings.register_forward_hook(_Embeddings(blocks))
    else:
        for block in blocks:
            block.register_forward_pre_hook(_need_gradient)


def close_blocks(model: nn.Module) -> None:
    """Take the hooks of :func:`open_blocks` off, wherever they are. Handles could be lost by an interrupt."""
    for module in model.modules():
        remove_hooks(module._forward_pre_hooks, lambda hook: hook is _need_gradient)
        remove_hooks(module._forward_hooks, lambda hook: isinstance(hook, _Embeddings))


def remove_hooks(hooks: dict[int, Callable], ours: Callable[[Callable], bool]) -> None:
    """Remove from a module's dict of hooks those that `ours` says yes to."""
    for key in [key for key, hook in hooks.items() if ours(hook)]:
        hooks.pop(key, None)


def _parents(path: str) -> Iterator[str]:
    while path := path.rpartition(".")[0]:
        yield path


def _block_class(module: nn.Module) -> type | None:
    return next((kind for kind in type(module).__mro__ if kind.__name__ == "GradientCheckpointingLayer"), None)


def _need_gradient(block: nn.Module, inputs: tuple):
    if not inputs or not _is_reentrant(block) or any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return None
    hidden_states, *rest = inputs
    return (hidden_states.detach().requires_grad_(), *rest)  # a view: nobody else's tensor is changed


def _is_reentrant(block: nn.Module) -> bool:
    """Whether the block will be run in a reentrant checkpoint now; other kinds look at what is inside."""
    if not (block.gradient_checkpointing and block.training and torch.is_grad_enabled()):
        return False  # transformers checkpoints no block then
    if torch.compiler.is_compiling():
        return False  # in a graph there are no reentrant ones
    return getattr(block._gradient_checkpointing_func, "keywords", {}).get("use_reentrant") is not False


class _Embeddings:
    """The hook for transformers 4: what goes into the lowest block needs a gradient, whichever trains."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        wanted = isinstance(output, Tensor) and any(map(_is_reentrant, self.blocks)) and not output.requires_grad
        return output.detach().requires_grad_() if wanted else None


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """Of the model and of the models in it, each once."""
    found = {}
    for module in model.modules():
        try:
            embeddings = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
        except NotImplementedError:
            continue
        if isinstance(embeddings, nn.Module):
            found[id(embeddings)] = embeddings
    return list(found.values())
