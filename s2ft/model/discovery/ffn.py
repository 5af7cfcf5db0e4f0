"""Proposes couplings of feed-forward blocks, by the sizes of their layers and the order in which they run."""

import re
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from s2ft.model.coupling import Coupling, Projection
from s2ft.model.discovery.proposal import Block, Proposal, vector_choices
from s2ft.model.discovery.structure import NO_BLOCK_LAYER, PROJECTOR, Structure, parent_of

GATE = re.compile(r"gate|(^|[._])w1$|w_0$|wi_0$|linear_1$|fc1_g$|act_fn", re.I)
SHARED = re.compile(r"shared_?(expert|mlp)")
DEEP = 2  # modules between the block and its layers


def ffn_blocks(structure: Structure) -> Iterator[Block]:
    """Propose couplings for every pair or triple of layers whose sizes fit and that run one after the other.

    Layers of a block that is not refused are taken: no other block is proposed for them.
    """
    for down in sorted(structure.layers, key=structure.place.get, reverse=True):  # consumers run last
        if down in structure.taken or not may_be_coupled(structure, down):
            continue
        found = _find_ups(structure, down)
        if found is None:
            continue
        around, ups = found
        proposals = tuple(_proposals(structure, around, ups, down))
        names = ", ".join(dict.fromkeys(map(structure.pattern, (*ups, down))))
        block = Block(f"ffn of {names} ({type(structure.modules[around]).__name__})", proposals)
        if block.key not in structure.refused:
            structure.taken.update(projection.path for projection in proposals[0].couplings[0].projections)
        yield block


def may_be_coupled(structure: Structure, path: str) -> bool:
    """Whether a layer is one of a block or a projector, and no head or router. Models that are no transformers' own
    stacks, such as an nn.Sequential, count as one block.
    """
    if NO_BLOCK_LAYER.search(path):
        return False
    named = hasattr(structure.model, "config") and hasattr(structure.model, "main_input_name")
    return not named or bool(structure.block_of(path)) or bool(PROJECTOR.search(path))


def _find_ups(structure: Structure, down: str) -> tuple[str, list[str]] | None:
    """The path of the module around `down` and the layers in it whose outputs may be the inputs of `down`."""
    around = down
    for _ in range(DEEP):
        if not around:
            break
        around = parent_of(around)
        if isinstance(structure.modules[around], nn.ModuleList):
            continue
        near = [path for path in structure.inside(around) if _may_be_up(structure, path, down)]
        channels, width = structure.inputs(down), structure.outputs(down)
        for count in (channels, 2 * channels):
            for fits in (True, False):  # layers whose inputs have the size of down's outputs come first
                ups = [p for p in near if structure.outputs(p) == count and (structure.inputs(p) == width or not fits)]
                if ups:
                    return around, _last_together(structure, ups)
    return None


def _may_be_up(structure: Structure, path: str, down: str) -> bool:
    return (
        path not in structure.taken
        and structure.block_of(path) == structure.block_of(down)
        and structure.place[path] < structure.place[down]
        and structure.is_called(path) == structure.is_called(down)
        and may_be_coupled(structure, path)
    )


def _last_together(structure: Structure, ups: list[str]) -> list[str]:
    """The layers that run last, those with the same inputs at most: an up and a gate, or a single layer."""
    ups = sorted(ups, key=structure.place.get)
    alike = [path for path in ups if structure.inputs(path) == structure.inputs(ups[-1])]
    return alike[-2:]


def _proposals(structure: Structure, around: str, ups: list[str], down: str) -> Iterator[Proposal]:
    channels = structure.inputs(down)
    kind = "shared-expert" if SHARED.search(down) else "experts" if ".experts." in down else "ffn"
    consumer = Projection("d", down, channels, 1, 1)
    for word, producers in _sides(structure, around, ups, channels):
        bare = Coupling(kind, structure.layer_number(down), producers, consumer)
        for moving, vectors in vector_choices(structure, (around,), bare):
            yield Proposal(f"{word}{moving}", (replace(bare, vectors=vectors),))


def _sides(
    structure: Structure, around: str, ups: list[str], channels: int
) -> Iterator[tuple[str, tuple[Projection, ...]]]:
    """The producers that the layers may be, with words for them: up and gate, one layer with both, or a single one."""
    if structure.outputs(ups[-1]) == 2 * channels:
        for path in reversed(ups):
            yield from _packed_sides(path, channels, structure.pattern(path))
        return
    if len(ups) == 2:
        gate = next((path for path in ups if GATE.search(path[len(around) :])), ups[0])
        up = next(path for path in ups if path != gate)
        pair = Projection("u", up, channels, 1, 0), Projection("g", gate, channels, 1, 0)
        yield f"up {structure.pattern(up)}, gate {structure.pattern(gate)}", pair
    for path in reversed(ups):
        yield f"up {structure.pattern(path)}", (Projection("u", path, channels, 1, 0),)


def _packed_sides(path: str, channels: int, name: str) -> Iterator[tuple[str, tuple[Projection, ...]]]:
    gate = Projection("g", path, channels, 1, 0, size=2 * channels)
    yield f"gate, then up in {name}", (replace(gate, key="u", start=channels), gate)
    in_turn = replace(gate, stride=2)
    yield f"gate and up in turn in {name}", (replace(in_turn, key="u", start=1), in_turn)
