"""What s2ft replaces on modules around trainable layers, and gives back: forwards, and attributes of the model.

A gated FFN runs in one op, and experts by grouped products. The forwards are partial objects: torch.load could not
make a bound method of a module that it is still loading.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from s2ft.attached.record import Attachment
from s2ft.layers import act_mul_of, forward_of, is_intercepted
from s2ft.model.coupling import Coupling
from s2ft.ops import act_mul


def gated_forward(block: nn.Module, x: Tensor, activation: str, act_class: type) -> Tensor:
    """The forward of a gated FFN, x [..., width] → [..., width].

    For the backward it keeps the outputs of gate and up, and of their product only what the down projection keeps. The
    block's own forward runs if `act_fn` is not of the class that `activation` stands for, or has hooks.
    """
    if type(block.act_fn) is not act_class or is_intercepted(block.act_fn):
        return type(block).forward(block, x)
    return block.down_proj(act_mul(block.gate_proj(x), block.up_proj(x), activation))


def replace_forward(model: nn.Module, coupling: Coupling, record: Attachment) -> None:
    """Give the coupling's block the forward that its trainable layers need.

    A module of experts must have that of :func:`s2ft.layers.forward_of`. A gated FFN gets :func:`gated_forward`, unless
    someone else has replaced its forward already.

    Raises:
        ValueError: Someone else has replaced the forward of experts.
    """
    for path in experts_modules(coupling):
        block = model.get_submodule(path)
        if "forward" not in block.__dict__:
            activation = act_mul_of(block) if record.config.ffn_kernel else None
            act_class = type(getattr(block, "act_fn", None))
            options = {} if activation is None else {"activation": activation, "act_class": act_class}
            _put(block, path, partial(forward_of(block), block, **options), record)
        elif path not in record.forwards:
            forward = block.__dict__["forward"]
            name = getattr(forward, "__qualname__", type(forward).__name__)
            raise ValueError(
                f"the forward of {path} has been replaced by {name}, which can't run "
                "trainable experts: leave the experts out of what replaces it, for Liger-Kernel with swiglu=False"
            )
    if coupling.activation is not None and record.config.ffn_kernel:
        block = model.get_submodule(coupling.block)
        if "forward" not in block.__dict__:
            forward = partial(gated_forward, block, activation=coupling.activation, act_class=type(block.act_fn))
            _put(block, coupling.block, forward, record)


def _put(block: nn.Module, path: str, forward: partial, record: Attachment) -> None:
    record.forwards[path] = forward
    block.forward = forward


def experts_modules(coupling: Coupling) -> list[str]:
    """The paths of the modules whose parameters are the coupling's experts; none if it is not about experts."""
    paths = (projection.path.rpartition(".")[0] for projection in coupling.projections if projection.expert is not None)
    return list(dict.fromkeys(paths))


def restore_forwards(model: nn.Module, record: Attachment) -> None:
    """Remove the recorded forwards, except where someone else has replaced them since."""
    for path, forward in record.forwards.items():
        block = model.get_submodule(path)
        if block.__dict__.get("forward") is forward:
            block.__dict__.pop("forward", None)


# ---- attributes of the model that others have set, which host hooks replace while layers are mounted ---------------


def keep_attributes(model: nn.Module, record: Attachment, names: Sequence[str]) -> None:
    """Record the model's own attributes of these names, before they are replaced."""
    record.replaced_attributes = {name: model.__dict__[name] for name in names if name in model.__dict__}


def restore_attributes(model: nn.Module, record: Attachment, names: Sequence[str]) -> None:
    """Give the model back what :func:`keep_attributes` has recorded. Without a call of it, nothing happens."""
    if record.replaced_attributes is None:
        return
    for name in names:
        if name in record.replaced_attributes:
            model.__dict__[name] = record.replaced_attributes[name]
        else:
            model.__dict__.pop(name, None)
