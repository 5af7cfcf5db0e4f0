"""What a proposal of couplings is, and which vectors it may move: entries for each unit or each element of a unit."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations

from s2ft.distributed import full_shape
from s2ft.model.coupling import Coupling, Vector
from s2ft.model.discovery.structure import Structure, is_inside, parent_of

MOST = 4  # modules with vectors whose subsets are tried; beyond it all or none
OF_KEYS = re.compile(r"(^|[._])k(ey)?s?[._]|[._]k_", re.I)


@dataclass(frozen=True)
class Proposal:
    """One way in which the layers of a block may be coupled.

    Attributes:
        label: How the layers were read: names, source of the number of heads, layout, vectors. The same label means the
            same reading in every block of a pattern, and in the twin and the model.
        couplings: The couplings: one, or one for each expert of a stack.
    """

    label: str
    couplings: tuple[Coupling, ...]


@dataclass(frozen=True)
class Block:
    """The ways in which the layers of one block may be coupled.

    Attributes:
        key: Blocks with the same key are alike: they are tried together, and the outcome is that of all of them.
        proposals: The ways, the preferred ones first.
    """

    key: str
    proposals: tuple[Proposal, ...]

    def of(self, label: str) -> Proposal | None:
        """The proposal with a label, if there is one."""
        return next((proposal for proposal in self.proposals if proposal.label == label), None)


def vector_choices(
    structure: Structure, roots: tuple[str, ...], coupling: Coupling
) -> Iterator[tuple[str, tuple[Vector, ...]]]:
    """List sets of vectors that may move with a coupling's units, the smallest sets first, each with words for it.

    Args:
        structure: The model.
        roots: Paths of the modules whose vectors may move.
        coupling: The coupling without vectors.
    """
    by_owner: dict[str, list[Vector]] = {}
    for vector in _candidates(structure, roots, coupling):
        by_owner.setdefault(parent_of(vector.path), []).append(vector)
    owners = list(by_owner)
    sizes = range(len(owners) + 1) if len(owners) <= MOST else (0, len(owners))
    for chosen in chain.from_iterable(combinations(owners, size) for size in sizes):
        vectors = tuple(vector for owner in chosen for vector in by_owner[owner])
        names = ", ".join(structure.pattern(vector.path) for vector in vectors)
        yield (f", moving {names}" if names else ""), vectors


def _candidates(structure: Structure, roots: tuple[str, ...], coupling: Coupling) -> Iterator[Vector]:
    q = coupling.producers[0]
    keys = next((projection for projection in coupling.producers if projection.key == "k"), q)
    seen = set()
    for root in dict.fromkeys(roots):
        for path, tensor in _tensors(structure, root):
            shape = full_shape(tensor)
            if path in seen or parent_of(path) in structure.layers or not shape:
                continue
            seen.add(path)
            sides = (keys, q) if OF_KEYS.search(path) else (q, keys)
            found = (side for side in sides if shape[0] in (side.count, side.count * side.unit))
            side = next(found, None)
            if side is not None and side.count > 1:
                yield Vector(path, shape[0] // side.count)


def _tensors(structure: Structure, root: str) -> Iterator[tuple]:
    """The parameters and buffers of a block, at most two modules deep."""
    module = structure.modules[root]
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        path = f"{root}.{name}" if root else name
        if name.count(".") <= 2 and is_inside(path, root) and tensor.is_floating_point():
            yield path, tensor
