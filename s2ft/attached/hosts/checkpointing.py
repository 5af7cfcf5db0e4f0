"""Gradients through checkpointed blocks whose inputs are frozen.

A reentrant checkpoint gives no gradient, not even to the weights inside it, if none of its inputs requires one. With
frozen embeddings the inputs of the first blocks require none. So hooks make the input of a checkpointed block require a
gradient if the block trains something. Other blocks are left alone, so that the backward ends at the lowest of these.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn


def open_blocks(model: nn.Module, trained: Iterable[str]) -> None:
    """Register hooks on transformers' checkpointable blocks that contain trained modules. trained: paths of modules."""
    around = {parent for path in trained for parent in _parents(path)}
    blocks = [module for path, module in model.named_modules() if path in around and _block_class(module)]
    # up to 5.20 transformers runs a block's hooks inside its checkpoint
    if any("__call__" in vars(_block_class(block)) for block in blocks):
        for embeddings in _embeddings(model):
            embeddings.register_forward_hook(_Embeddings(blocks))
    else:
        for block in blocks:
            block.register_forward_pre_hook(_need_gradient)


def close_blocks(model: nn.Module) -> None:
    """Remove the hooks of :func:`open_blocks`. They are searched for, because an interrupt could lose handles."""
    for module in model.modules():
        remove_hooks(module._forward_pre_hooks, _need_gradient)
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, _Embeddings)]:
            module._forward_hooks.pop(key, None)


def remove_hooks(hooks: dict[int, Callable], *ours: Callable) -> None:
    """Remove functions from a module's dict of hooks. PyTorch wraps those that run before a state dict is loaded."""
    for key in [key for key, hook in hooks.items() if any(getattr(hook, "hook", hook) is one for one in ours)]:
        hooks.pop(key, None)


def _parents(path: str) -> Iterator[str]:
    """Yield the paths of the modules that contain the module at `path`."""
    while path := path.rpartition(".")[0]:
        yield path


def _block_class(module: nn.Module) -> type | None:
    return next((kind for kind in type(module).__mro__ if kind.__name__ == "GradientCheckpointingLayer"), None)


def _need_gradient(block: nn.Module, inputs: tuple) -> tuple | None:
    """Forward pre-hook: make the first input require a gradient if no input does."""
    if not inputs or not _is_reentrant(block) or any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return None
    hidden_states, *rest = inputs
    return (hidden_states.detach().requires_grad_(), *rest)  # detach gives a view: the caller's tensor does not change


def _is_reentrant(block: nn.Module) -> bool:
    """Whether the next forward runs the block in a reentrant checkpoint. Other checkpoints need no hook."""
    if not (block.gradient_checkpointing and block.training and torch.is_grad_enabled()):
        return False  # transformers checkpoints no block in these cases
    if torch.compiler.is_compiling():
        return False  # a compiled graph has no reentrant checkpoints
    return getattr(block._gradient_checkpointing_func, "keywords", {}).get("use_reentrant") is not False


class _Embeddings:
    """The hook up to transformers 5.20: the embeddings' output requires a gradient, whichever block trains."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        is_needed = isinstance(output, Tensor) and any(map(_is_reentrant, self.blocks)) and not output.requires_grad
        return output.detach().requires_grad_() if is_needed else None


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the input embeddings of the model and of the models in it, each once."""
    found = {}
    for module in model.modules():
        try:
            embeddings = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
        except NotImplementedError:
            continue
        if isinstance(embeddings, nn.Module):
            found[id(embeddings)] = embeddings
    return list(found.values())
