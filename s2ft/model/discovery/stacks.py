"""Proposes couplings of experts whose weights are one parameter with three dimensions for all of them."""

from collections.abc import Iterator
from itertools import product

from torch import Tensor, nn

from s2ft.distributed import full_shape
from s2ft.layers import forward_of
from s2ft.model.coupling import Coupling
from s2ft.model.discovery.proposal import Block, Proposal
from s2ft.model.discovery.structure import Structure

# Parameters of a module: the one whose outputs are the channels, and the one whose inputs are.
PAIRS = (("gate_up_proj", "down_proj"), ("up_proj", "down_proj"), ("input_linear.weight", "output_linear.weight"))


def stack_blocks(structure: Structure) -> Iterator[Block]:
    """Propose couplings for every module with the stacked weights of experts that S²FT can run."""
    for path, module in structure.modules.items():
        for up, down in PAIRS:
            found = _stack(module, up), _stack(module, down)
            if None in found or not _runs(module, up) or f"{path}.{up}" in structure.shared:
                continue
            proposals = tuple(_proposals(structure, path, up, down, *found))
            if proposals:
                yield Block(f"experts of {structure.pattern(path)} ({type(module).__name__})", proposals)
            break


def _stack(module: nn.Module, name: str) -> Tensor | None:
    """A parameter with three dimensions by its name in a module, or None."""
    owner, _, name = name.rpartition(".")
    owner = module if not owner else getattr(module, owner, None)
    found = getattr(owner, name, None)
    return found if isinstance(found, nn.Parameter) and len(full_shape(found)) == 3 else None


def _runs(module: nn.Module, up: str) -> bool:
    """Whether S²FT has a forward for the module of the experts."""
    try:
        forward_of(module if "." not in up else module.get_submodule(up.partition(".")[0]))
    except ValueError:
        return False
    return True


def _proposals(structure: Structure, path: str, up: str, down: str, first: Tensor, last: Tensor) -> Iterator[Proposal]:
    """The layouts that the shapes allow, with and without the bias of the first weight."""
    module, number = structure.modules[path], structure.layer_number(path)
    bias = f"{path}.{up}_bias" if isinstance(getattr(module, f"{up}_bias", None), Tensor) else None
    one, two = full_shape(first), full_shape(last)
    for transposed, moving in product((False, True), dict.fromkeys((None, bias))):
        outputs, inputs = (one[2], two[1]) if transposed else (one[1], two[2])
        more = {"down": f"{path}.{down}", "channels": inputs, "experts": one[0], "transposed": transposed}
        words = f"{'inputs × outputs' if transposed else 'outputs × inputs'}{', moving the bias' if moving else ''}"
        if outputs == inputs:
            couplings = Coupling.experts(number, up=f"{path}.{up}", bias=moving, **more)
            yield Proposal(f"up, {words}", tuple(couplings))
        elif outputs == 2 * inputs:
            for in_turn, order in ((False, "gate, then up"), (True, "gate and up in turn")):
                couplings = Coupling.experts(number, gate_up=f"{path}.{up}", bias=moving, interleaved=in_turn, **more)
                yield Proposal(f"{order}, {words}", tuple(couplings))


def stacked_weights(structure: Structure) -> Iterator[str]:
    """Iterate over the paths of the parameters that are stacked weights of experts."""
    for path, module in structure.modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            if f"{path}.{name}" in structure.shared:
                continue
            if len(full_shape(parameter)) == 3 and (
                "expert" in f"{path}.{name}".lower() or "Expert" in type(module).__name__
            ):
                yield f"{path}.{name}"
