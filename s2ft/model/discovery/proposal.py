"""What a proposal of couplings is."""

from dataclasses import dataclass

from s2ft.model.coupling import Coupling


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
