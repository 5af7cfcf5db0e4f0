"""Tries couplings on a twin: with units in another order, it must compute the same; with one side moved alone, not.

The twin is in float64, so rounding changes its outputs by a few units of 1e-16 of the largest. A change that is wrong
changes them by many orders of magnitude more. The first proposal of a block that holds, for all blocks of a pattern, is
right.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from s2ft.files.tables import by_key
from s2ft.model.coupling import Coupling, Projection
from s2ft.model.discovery.examples import run_example
from s2ft.model.discovery.proposals import Block, Proposal
from s2ft.model.discovery.structure import LayerMap, parent_of
from s2ft.model.modes import evaluation_mode
from s2ft.model.outputs import tensors_in
from s2ft.model.permutation import Move
from s2ft.model.weights import find

TOLERANCE = 1e-10  # by how much outputs in float64 may change, relative to the largest

Outputs = dict[str, list[Tensor]]


class Trial:
    """A twin with an input, and what it computes for it.

    Attributes:
        twin: The twin, in float64.
        example: The input.
        called: Call numbers of the modules by path and by pattern.
    """

    def __init__(self, twin: nn.Module, example: Any) -> None:
        """Run the twin.

        Raises:
            ValueError: The outputs are not floating point, not finite, or random.
            Exception: Whatever the twin raises on this input.
        """
        self.twin, self.example = twin, example
        self.called: dict[str, int] = {}
        self.structure = LayerMap(twin, self.called)
        self.before = self._run(count=True)
        if not self.before[""]:
            raise ValueError("the model returns no floating-point tensor")
        if any(bool(torch.isnan(tensor).any()) for tensor in self.before[""]):
            raise ValueError("the model's output has NaN")
        if self._differs(self._run(seed=1), [""]):
            raise ValueError("the model's output is random in evaluation mode: two runs differ")

    # ---- trials --------------------------------------------------------------------------------------

    def holds(self, shuffles: Sequence["Shuffle"]) -> bool:
        """Whether the twin computes the same with the units of these couplings in another order, all at once."""
        places = self._places(shuffles)
        return not any(self._differs(self._run_moved(shuffles, order), places) for order in ("next", "swapped"))

    def idle_side(self, shuffles: Sequence["Shuffle"]) -> str | None:
        """The key of a projection that can be moved alone without any change, so that :meth:`holds` proves nothing."""
        sides = by_key(
            ((projection.key, self.structure.pattern(projection.path)), alone)
            for shuffle in shuffles
            for projection, alone in shuffle.sides()
        )
        for (key, _), alone in sides.items():
            if not self._differs(self._run_moved(alone, "next"), self._places(shuffles)):
                return key
        return None

    def _run_moved(self, shuffles: Sequence["Shuffle"], order: str) -> Outputs:
        moves = [Move(shuffle.coupling, shuffle.order(order)) for shuffle in shuffles]
        try:
            for move in moves:
                move.do(self.twin)
            return self._run()
        finally:
            for move in reversed(moves):
                move.undo(self.twin)

    def _places(self, shuffles: Iterable["Shuffle"]) -> list[str]:
        """The modules whose outputs are compared: the consumers, where an error is largest, and the model."""
        return [*dict.fromkeys(place_of(shuffle.coupling) for shuffle in shuffles), ""]

    def _differs(self, after: Outputs, places: Iterable[str]) -> bool:
        return any(
            _different(now, then)
            for place in places
            for now, then in zip(after.get(place, ()), self.before.get(place, ()))
        )

    # ---- runs ----------------------------------------------------------------------------------------

    def gradients(self) -> set[str]:
        """The names of the twin's parameters that a loss on its outputs gives a gradient other than zero."""
        parameters = {name: one for name, one in self.twin.named_parameters() if one.is_floating_point()}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        try:
            with evaluation_mode(self.twin), torch.random.fork_rng([]), torch.enable_grad():
                torch.manual_seed(0)
                output = run_example(self.twin, self.example)
                named = output.items() if isinstance(output, dict) else ()
                logits = [tensor for name, value in named if "logits" in name for tensor in tensors_in(value)]
                tensors = [tensor for tensor in logits or tensors_in(output) if tensor.requires_grad]
                if not tensors:
                    return set()
                loss = sum(
                    (tensor.masked_fill(~tensor.isfinite(), 0.0) * torch.randn_like(tensor)).sum() for tensor in tensors
                )
                found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        except Exception as error:  # the model's own backward refuses
            raise ValueError(
                f"{type(self.twin).__name__} computes no gradients in evaluation mode, in which s2ft tries couplings "
                f"out, so describe them in couplings=: {type(error).__name__}: {error}"
            ) from error
        finally:
            self.twin.requires_grad_(False)
        return {name for name, gradient in zip(parameters, found) if gradient is not None and bool(gradient.any())}

    def _run(self, seed: int = 0, count: bool = False) -> Outputs:
        found: Outputs = {}

        def record(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
            if count:
                number = len(self.called)
                self.called.setdefault(path, number)
                self.called.setdefault(self.structure.pattern(path), number)
            found.setdefault(path, []).extend(tensors_in(output))

        modules = self.structure.modules
        stacks = {path for path, module in modules.items() if any(p.dim() == 3 for p in module.parameters(False))}
        watched = filter(None, modules if count else {*self.structure.layers, *stacks})
        handles = [modules[path].register_forward_hook(partial(record, path)) for path in watched]
        try:
            with torch.no_grad(), evaluation_mode(self.twin), torch.random.fork_rng([]):
                torch.manual_seed(seed)
                output = run_example(self.twin, self.example)
        finally:
            for handle in handles:
                handle.remove()
        return {**found, "": list(tensors_in(output))}


def place_of(coupling: Coupling) -> str:
    """The path of the module whose output a coupling's consumer computes."""
    path = coupling.consumer.path
    return path if coupling.consumer.expert is None else parent_of(path)


def _different(now: Tensor, then: Tensor) -> bool:
    if now.shape != then.shape:
        return True
    finite = torch.isfinite(then)  # classes that can't be chosen may have minus infinity
    if not finite.any():
        return False
    now, then = now[finite], then[finite]
    return not float((now - then).abs().max()) <= TOLERANCE * float(then.abs().max())


# ---- what is moved -----------------------------------------------------------------------------------------------


class Shuffle(NamedTuple):
    """Units that are reordered, within each of a number of groups of the same size."""

    coupling: Coupling
    groups: int = 1

    def order(self, word: str) -> Tensor:
        """An order [count] int64: each unit in the place of the next ("next"), or the first two "swapped".

        Every order of units is made of these two. So if both keep the output, every order does.
        """
        size = self.coupling.count // self.groups
        within = torch.arange(size)
        if word == "next":
            within = within.roll(1)
        elif size > 1:
            within[:2] = torch.tensor([1, 0])
        return torch.cat([group * size + within for group in range(self.groups)])

    def sides(self) -> Iterator[tuple[Projection, "Shuffle"]]:
        """Each projection, and the same for it alone, without anything else that goes with it."""
        for projection in self.coupling.projections:
            alone = replace(self.coupling, producers=(), consumer=projection, vectors=())
            yield projection, Shuffle(alone, self.groups)


def whole_units(twin: nn.Module, coupling: Coupling) -> Shuffle | None:
    """All units; with grouped queries, whole groups of heads. None if there is one unit only."""
    least = min(projection.count for projection in coupling.projections)
    if least == 1:
        return None
    if all(projection.count == least for projection in coupling.projections):
        return Shuffle(coupling)

    def grown(projection: Projection) -> Projection:
        times = projection.count // least
        return replace(projection, count=least, unit=projection.unit * times, stride=None) if times > 1 else projection

    vectors = (replace(one, unit=find(twin, one.path).shape[0] // least) for one in coupling.vectors)
    producers = tuple(map(grown, coupling.producers))
    return Shuffle(replace(coupling, producers=producers, consumer=grown(coupling.consumer), vectors=tuple(vectors)))


def within_groups(twin: nn.Module, coupling: Coupling) -> Shuffle | None:
    """Query heads and what goes with them, reordered within each group; None if a group has one head.

    Heads of a group have the same keys and values, so they may change place. This tells where one head ends.
    """
    least = min(projection.count for projection in coupling.projections)
    many = coupling.consumer.count
    if many == least:
        return None
    producers = tuple(projection for projection in coupling.producers if projection.count == many)
    vectors = tuple(vector for vector in coupling.vectors if find(twin, vector.path).shape[0] == many * vector.unit)
    return Shuffle(replace(coupling, producers=producers, vectors=vectors), least)


def within_heads(coupling: Coupling) -> Shuffle | None:
    """The elements of every head's values: they may change place even where heads can't. None if that can't be said."""
    v = next((projection for projection in coupling.producers if projection.key == "v"), None)
    o = coupling.consumer
    if v is None or v.unit == 1 or v.unit * v.count * (o.count // v.count) != o.extent or o.count % v.count:
        return None
    first, *others = _each_head(o)
    return Shuffle(replace(coupling, producers=(*_each_head(v), *others), consumer=first, vectors=(), fixed=False))


def _each_head(projection: Projection) -> list[Projection]:
    stride = projection.unit if projection.stride is None else projection.stride
    starts = (projection.start + i * stride for i in range(projection.count))
    return [
        replace(projection, count=projection.unit, unit=1, start=start, stride=None, size=projection.extent)
        for start in starts
    ]


# ---- which proposal of a block is right ------------------------------------------------------------------------

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
        proposal = block.of(self.label) if self.status else None
        return tuple(replace(one, fixed=self.status == "in place") for one in (proposal.couplings if proposal else ()))


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
    # Attention whose heads can't move is trained in place if the elements of every head's values can move.
    for proposal in sorted(first.proposals, key=lambda one: one.couplings[0].consumer.count):
        bare = proposal.couplings[0]
        if bare.consumer.key != "o" or bare.vectors or len(bare.producers) != 3:
            continue
        shuffles = [within_heads(one) for one in _all_couplings(blocks, proposal)]
        if shuffles and None not in shuffles and trial.holds(shuffles) and trial.idle_side(shuffles) is None:
            return Outcome("in place", proposal.label, f"{why}; the elements within each head can")
    return Outcome(None, None, why)


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
    whole = [whole_units(trial.twin, coupling) for coupling in couplings]
    grouped = [within_groups(trial.twin, coupling) for coupling in couplings]
    single = [within_heads(one) for one, shuffle in zip(couplings, whole) if shuffle is None]  # all of them must hold
    trials = [[shuffle for shuffle in some if shuffle is not None] for some in (whole, grouped)] + [single]
    trials = [shuffles for shuffles in trials if shuffles]
    if None in single or not trials or not all(map(trial.holds, trials)):
        return Verdict(False)
    idle = next(filter(None, map(trial.idle_side, trials)), None)
    return Verdict(idle is None, idle)


def _not_reached(block: Block) -> Outcome:
    """Blocks that the example does not run are trained in place, if names and sizes leave no doubt."""
    proposal = block.proposals[0]
    projections = [projection for one in proposal.couplings for projection in one.producers]
    sure = all(projection.size is None for projection in projections) and "divisor" not in proposal.label
    if sure and (projections[0].key == "q" or FFN.search(projections[0].path)):
        return Outcome("in place", proposal.label, "not reached by the example; by its names and sizes")
    return Outcome(None, None, "not reached by the example")


def _all_couplings(blocks: Sequence[Block], proposal: Proposal) -> tuple[Coupling, ...]:
    """The couplings of all blocks, read in the same way; none if one of them can't be."""
    same = [block.of(proposal.label) for block in blocks]
    return () if None in same else tuple(one for read in same for one in read.couplings)


def _moved_words(coupling: Coupling, blocks: int) -> str:
    least = min(projection.count for projection in coupling.projections)
    what = "units" if coupling.consumer.count == least else "groups of heads" if least > 1 else "heads"
    times = f", in {blocks} blocks at once" if blocks > 1 else ""
    return f"on the twin, its {what} in another order give the same output{times}"
