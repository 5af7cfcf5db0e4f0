"""Proposes couplings of experts whose weights are parameters [experts, outputs, inputs]."""

from collections.abc import Iterator

from torch import nn

from s2ft.layers import forward_of
from s2ft.model.coupling import Coupling
from s2ft.model.discovery.proposal import Block, Proposal
from s2ft.model.discovery.structure import Structure


def stack_blocks(structure: Structure) -> Iterator[Block]:
    """Propose couplings for every module with the stacked weights of experts."""
    for path, module in structure.modules.items():
        up, down = (getattr(module, f"{name}_proj", None) for name in ("gate_up", "down"))
        if not all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in (up, down)):
            continue
        try:
            forward_of(module)
        except ValueError:
            continue
        experts, _, channels = down.shape
        if up.shape[1] != 2 * channels:
            continue
        paths = {"gate_up": f"{path}.gate_up_proj", "down": f"{path}.down_proj"}
        number = structure.layer_number(path)
        couplings = Coupling.experts(number, **paths, channels=channels, experts=experts)
        yield Block(f"experts of {structure.pattern(path)}", (Proposal("gate, then up", tuple(couplings)),))


def stacked_weights(structure: Structure) -> Iterator[str]:
    """Iterate over the paths of the parameters that are stacked weights of experts."""
    for path, module in structure.modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and "expert" in f"{path}.{name}":
                yield f"{path}.{name}"
