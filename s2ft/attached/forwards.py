"""Forwards that s2ft gives to modules around trainable layers: a gated FFN in one op, and experts.

They are partial objects: torch.load could not make a bound method of a module that it is still loading.
"""

from functools import partial

from torch import Tensor, nn

from s2ft.attached.record import Attachment
from s2ft.layers import experts_forward
from s2ft.model.coupling import Coupling
from s2ft.ops import act_mul


def gated_forward(block: nn.Module, x: Tensor, activation: str) -> Tensor:
    """The forward of a gated FFN, x [..., width] → [..., width].

    For the backward it keeps the outputs of gate and up, and of their product only what the down projection keeps.
    """
    return block.down_proj(act_mul(block.gate_proj(x), block.up_proj(x), activation))


def replace_forward(model: nn.Module, coupling: Coupling, record: Attachment) -> None:
    """Give the coupling's block the forward that its trainable layers need.

    Experts must have :func:`experts_forward`. A gated FFN gets :func:`gated_forward`, unless someone else has replaced
    its forward already.

    Raises:
        ValueError: Someone else has replaced the forward of experts.
    """
    if coupling.expert is not None:
        path, forward, options = coupling.main.path.rpartition(".")[0], experts_forward, {}
    elif coupling.activation is not None and record.config.ffn_kernel:
        path, forward, options = coupling.block, gated_forward, {"activation": coupling.activation}
    else:
        return
    block = model.get_submodule(path)
    if "forward" in block.__dict__:
        if forward is experts_forward and path not in record.forwards:
            raise ValueError(f"the forward of {path} has been replaced, and the new one can't run trainable experts")
        return
    record.forwards[path] = partial(forward, block, **options)
    block.forward = record.forwards[path]


def restore_forwards(model: nn.Module, record: Attachment) -> None:
    """Remove the recorded forwards, except where someone else has replaced them since."""
    for path, forward in record.forwards.items():
        block = model.get_submodule(path)
        if block.__dict__.get("forward") is forward:
            block.__dict__.pop("forward", None)


def put_forwards_back(model: nn.Module, record: Attachment) -> None:
    """Undo :func:`restore_forwards`."""
    for path, forward in record.forwards.items():
        model.get_submodule(path).__dict__.setdefault("forward", forward)
