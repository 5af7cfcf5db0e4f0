"""Decides which proposal of a block is right: the first one that holds on the twin, for all blocks of a pattern."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from s2ft.model.coupling import Coupling
from s2ft.model.discovery.proposal import Block, Proposal
from s2ft.model.discovery.trial import Shuffle, Trial, place_of, whole_units, within_groups, within_heads

FFN = re.compile(
    r"mlp|ffn?(\.|_|$)|feed_?forward|fc_?\d|intermediate|dense|gate|up_proj|wi|(^|[._])w\d|expert|lin(ear)?_?\d", re.I
)
NAMES = {
    "q": "queries",
    "k": "keys",
    "v": "values",
    "o": "outputs of the heads",
    "g": "gate",
    "u": "channels of up",
    "d": "down",
}


@dataclass(frozen=True)
class Outcome:
    """What the trials say about all blocks of a pattern.

    Attributes:
        status: "confirmed" or "in place"; None if the block's layers are no coupling.
        label: Label of the proposal that is right.
        reason: Why.
    """

    status: str | None
    label: str | None
    reason: str

    def couplings(self, block: Block) -> tuple[Coupling, ...]:
        """The couplings of a block with this outcome; none if the block can't be read in the same way."""
        proposal = block.of(self.label) if self.status and self.label else None
        if proposal is None:
            return ()
        return tuple(replace(one, fixed=self.status == "in place") for one in proposal.couplings)


def settle(trial: Trial, blocks: Sequence[Block]) -> Outcome:
    """Try the proposals for blocks with the same key."""
    first = blocks[0]
    if not any(trial.structure.is_called(place_of(one)) for one in first.proposals[0].couplings):
        return _not_reached(first)
    idle, tried = None, set()
    for proposal in sorted(first.proposals, key=lambda one: -one.couplings[0].consumer.count):
        couplings = _all_couplings(blocks, proposal)
        if not couplings or couplings in tried:
            continue
        tried.add(couplings)
        verdict = judge(trial, couplings)
        if verdict.confirmed:
            return Outcome("confirmed", proposal.label, _moved_words(couplings[0], len(blocks)))
        idle = idle or verdict.idle
    why = (
        f"to reorder the {NAMES.get(idle, idle)} alone changes nothing, so a trial proves nothing"
        if idle
        else f"with its units in another order the output changes, in each of {len(tried)} ways to read the block"
    )
    return _in_place(trial, blocks, why)


class Verdict(NamedTuple):
    """What a trial of couplings says.

    Attributes:
        confirmed: Whether their units can move, and the trial could have told otherwise.
        idle: The key of a side that can move alone, if the units can move.
    """

    confirmed: bool
    idle: str | None = None


def judge(trial: Trial, couplings: Sequence[Coupling]) -> Verdict:
    """Try couplings, all at once: alike ones of different blocks, or those of the experts of a layer."""
    shuffles = _shuffles(trial, couplings)
    if not shuffles or not all(trial.holds(one) for one in shuffles):
        return Verdict(False)
    idle = next((key for one in shuffles if (key := trial.idle_side(one))), None)
    return Verdict(idle is None, idle)


def _not_reached(block: Block) -> Outcome:
    """Blocks that the example does not run are trained in place, if names and sizes leave no doubt."""
    proposal = block.proposals[0]
    projections = [projection for one in proposal.couplings for projection in one.producers]
    sure = all(projection.size is None for projection in projections) and "divisor" not in proposal.label
    if sure and (projections[0].key == "q" or FFN.search(projections[0].path)):
        return Outcome("in place", proposal.label, "not reached by the example; by its names and sizes")
    return Outcome(None, None, "not reached by the example")


def _in_place(trial: Trial, blocks: Sequence[Block], why: str) -> Outcome:
    """Attention whose heads can't move: trained in place if the elements of every head's values can move."""
    plain = [one for one in blocks[0].proposals if _is_plain(one)]
    for proposal in sorted(plain, key=lambda one: one.couplings[0].consumer.count):
        shuffles = [within_heads(one) for one in _all_couplings(blocks, proposal)]
        if shuffles and None not in shuffles and trial.holds(shuffles) and trial.idle_side(shuffles) is None:
            return Outcome("in place", proposal.label, f"{why}; the elements within each head can")
    return Outcome(None, None, why)


def _is_plain(proposal: Proposal) -> bool:
    coupling = proposal.couplings[0]
    return coupling.consumer.key == "o" and not coupling.vectors and len(coupling.producers) == 3


def _all_couplings(blocks: Sequence[Block], proposal: Proposal) -> tuple[Coupling, ...]:
    """The couplings of all blocks, read in the same way; none if one of them can't be."""
    same = [block.of(proposal.label) for block in blocks]
    return () if None in same else tuple(one for read in same for one in read.couplings)


def _shuffles(trial: Trial, couplings: Sequence[Coupling]) -> list[list[Shuffle]]:
    """The trials that all must hold: of whole units, of heads within groups, of elements of a single head."""
    whole = [whole_units(trial.twin, coupling) for coupling in couplings]
    grouped = [within_groups(trial.twin, coupling) for coupling in couplings]
    single = [within_heads(one) for one, shuffle in zip(couplings, whole) if shuffle is None]
    found = [[shuffle for shuffle in shuffles if shuffle is not None] for shuffles in (whole, grouped, single)]
    return [shuffles for shuffles in found if shuffles] if len(found[2]) == len(single) else []


def _moved_words(coupling: Coupling, blocks: int) -> str:
    least = min(projection.count for projection in coupling.projections)
    what = "units" if coupling.consumer.count == least else "groups of heads" if least > 1 else "heads"
    times = f", in {blocks} blocks at once" if blocks > 1 else ""
    return f"on the twin, its {what} in another order give the same output{times}"
