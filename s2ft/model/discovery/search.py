"""Discovery from end to end: trials of proposals on a twin, and what becomes of every weight.

Couplings are proposed from the names and sizes of the model's layers, and tried on a tiny twin. With units in another
order, it must compute the same; with one side moved alone, not. The twin is in float64, so rounding changes its outputs
by a few units of 1e-16 of the largest. A change that is wrong changes them by many orders of magnitude more. The first
proposal of a block that holds, for all blocks of a pattern, is right.

What the trials confirm can move; what they don't is trained in place, or one layer by itself.
"""

import gc
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from s2ft.config import refuse
from s2ft.distributed import full_shape
from s2ft.files.plain_text import table
from s2ft.model.coupling import Coupling, Projection, by_key, projections_of
from s2ft.model.discovery.examples import runnable_example
from s2ft.model.discovery.proposals import (
    NO_BLOCK_LAYER,
    PROJECTOR,
    Block,
    LayerMap,
    Proposal,
    attention_blocks,
    ffn_blocks,
    may_be_coupled,
    parent_of,
    stack_blocks,
    stacked_weights,
)
from s2ft.model.discovery.twin import copied, twins_of
from s2ft.model.running import check_example, evaluation_mode, largest_change, run_example, seeded, tensors_in
from s2ft.model.weights import Move, find

# ---- trials ---------------------------------------------------------------------------------------------------------

TOLERANCE = 1e-10  # by how much outputs in float64 may change, see :func:`largest_change`

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
        self.before = self._run()
        for number, path in enumerate(self.before):
            self.called.setdefault(path, number)
            self.called.setdefault(self.structure.pattern(path), number)
        refuse(
            (not self.before[""], "the model returns no floating-point tensor"),
            (any(bool(torch.isnan(tensor).any()) for tensor in self.before[""]), "the model's output has NaN"),
            (
                self._differs(self._run(seed=1), [""]),
                "the model's output is random in evaluation mode: two runs differ",
            ),
        )

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
        return [*dict.fromkeys(shuffle.coupling.place for shuffle in shuffles), ""]

    def _differs(self, after: Outputs, places: Iterable[str]) -> bool:
        return any(largest_change(after.get(place, ()), self.before.get(place, ())) > TOLERANCE for place in places)

    # ---- runs ----------------------------------------------------------------------------------------

    def gradients(self) -> set[str]:
        """The names of the twin's parameters that a loss on its outputs gives a gradient other than zero."""
        parameters = {name: one for name, one in self.twin.named_parameters() if one.is_floating_point()}
        try:
            with evaluation_mode(self.twin), seeded(self.twin, 0), torch.enable_grad():
                output = run_example(self.twin, self.example)
                named = output.items() if isinstance(output, dict) else ()
                logits = [tensor for name, value in named if "logits" in name for tensor in tensors_in(value)]
                tensors = [tensor for tensor in logits or tensors_in(output) if tensor.requires_grad]
                if not tensors:
                    return set()
                weights = [torch.randn_like(tensor).masked_fill(~tensor.isfinite(), 0.0) for tensor in tensors]
                found = torch.autograd.grad(tensors, list(parameters.values()), weights, allow_unused=True)
        except Exception as error:  # the model's own backward refuses
            raise ValueError(
                f"{type(self.twin).__name__} computes no gradients in evaluation mode, in which s2ft tries couplings "
                f"out, so describe them in couplings=: {type(error).__name__}: {error}"
            ) from error
        return {name for name, gradient in zip(parameters, found) if gradient is not None and bool(gradient.any())}

    def _run(self, seed: int = 0) -> Outputs:
        """The outputs of all modules in the order of their ends, and of the model as ""."""
        found: Outputs = {}

        def record(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
            found.setdefault(path, []).extend(tensors_in(output))

        modules = self.structure.modules.items()
        handles = [module.register_forward_hook(partial(record, path)) for path, module in modules if path]
        try:
            with torch.no_grad(), evaluation_mode(self.twin), seeded(self.twin, seed):
                output = run_example(self.twin, self.example)
        finally:
            for handle in handles:
                handle.remove()
        return {**found, "": list(tensors_in(output))}


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
            yield (
                projection,
                Shuffle(replace(self.coupling, producers=(), consumer=projection, vectors=()), self.groups),
            )


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
    return Shuffle(replace(coupling, producers=producers, consumer=grown(coupling.main), vectors=tuple(vectors)))


def within_groups(twin: nn.Module, coupling: Coupling) -> Shuffle | None:
    """Query heads and what goes with them, reordered within each group; None if a group has one head.

    Heads of a group have the same keys and values, so they may change place. This tells where one head ends.
    """
    least = min(projection.count for projection in coupling.projections)
    many = coupling.main.count
    if many == least:
        return None
    producers = tuple(projection for projection in coupling.producers if projection.count == many)
    vectors = tuple(vector for vector in coupling.vectors if find(twin, vector.path).shape[0] == many * vector.unit)
    return Shuffle(replace(coupling, producers=producers, vectors=vectors), least)


def within_heads(coupling: Coupling) -> Shuffle | None:
    """The elements of every head's values: they may change place even where heads can't. None if that can't be said."""
    v = next((projection for projection in coupling.producers if projection.key == "v"), None)
    o = coupling.main
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
        label: Label of the proposal that is right; None if none is.
        reason: Why.
    """

    status: str | None
    label: str | None
    reason: str

    def couplings(self, block: Block) -> tuple[Coupling, ...]:
        """The couplings of a block with this outcome; none if the block can't be read in the same way."""
        return tuple(replace(one, fixed=self.status == "in place") for one in block.of(self.label))


def settle(trial: Trial, blocks: Sequence[Block]) -> Outcome:
    """Try the proposals for blocks with the same key."""
    first = blocks[0]
    if not any(trial.structure.is_called(one.place) for one in first.proposals[0].couplings):
        return _not_reached(first)
    idle, tried = None, set()
    for proposal in first.proposals:
        couplings = _all_couplings(blocks, proposal)
        if not couplings or couplings in tried:
            continue
        tried.add(couplings)
        confirmed, free = judge(trial, couplings)
        if confirmed:
            return Outcome("confirmed", proposal.label, _moved_words(couplings[0], len(blocks)))
        idle = idle or free
    why = (
        f"to reorder the {NAMES.get(idle, idle)} alone changes nothing, so a trial proves nothing"
        if idle
        else f"with its units in another order the output changes, in each of {len(tried)} ways to read the block"
    )
    # Attention whose heads can't move is trained in place if the elements of every head's values can move.
    for proposal in sorted(first.proposals, key=lambda one: one.couplings[0].main.count):
        bare = proposal.couplings[0]
        if bare.main.key != "o" or bare.vectors or len(bare.producers) != 3:
            continue
        shuffles: list[Any] = [within_heads(one) for one in _all_couplings(blocks, proposal)]
        if shuffles and None not in shuffles and trial.holds(shuffles) and trial.idle_side(shuffles) is None:
            return Outcome("in place", proposal.label, f"{why}; the elements within each head can")
    return Outcome(None, None, why)


def judge(trial: Trial, couplings: Sequence[Coupling]) -> tuple[bool, str | None]:
    """Try couplings, all at once: alike ones of different blocks, or those of the experts of a layer.

    Returns:
        Whether their units can move, and the trial could have told otherwise; and the key of a side that can move
        alone, if the units can move.
    """
    whole = [whole_units(trial.twin, coupling) for coupling in couplings]
    grouped = [within_groups(trial.twin, coupling) for coupling in couplings]
    # All of the last ones must hold.
    single: list[Any] = [within_heads(one) for one, shuffle in zip(couplings, whole) if shuffle is None]
    trials = [[shuffle for shuffle in some if shuffle is not None] for some in (whole, grouped)] + [single]
    trials = [shuffles for shuffles in trials if shuffles]
    if None in single or not trials or not all(map(trial.holds, trials)):
        return False, None
    idle = next(filter(None, map(trial.idle_side, trials)), None)
    return idle is None, idle


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
    return tuple(one for read in same for one in read) if all(same) else ()


def _moved_words(coupling: Coupling, blocks: int) -> str:
    least = min(projection.count for projection in coupling.projections)
    what = "units" if coupling.main.count == least else "groups of heads" if least > 1 else "heads"
    times = f", in {blocks} blocks at once" if blocks > 1 else ""
    return f"on the twin, its {what} in another order give the same output{times}"


# ---- the result -----------------------------------------------------------------------------------------------------

STATUSES = ("confirmed", "movable", "in place", "one-sided", "untouched")


@dataclass(frozen=True)
class WeightRow:
    """What discovery says of one weight of a block.

    Attributes:
        path: Path of the layer, or of the parameter with the weights of experts.
        status: "confirmed": a trial showed that its units can move together with those of other weights. "in place":
            it is part of an attention or FFN whose units stay where they are. "one-sided": it is trained by itself.
            "untouched": it is not trained. "movable": as confirmed, but a family of s2ft declares it, without a trial.
        reason: Why, in words.
        coupling: The coupling that it is in, the first one for experts; None if it is untouched.
    """

    path: str
    status: str
    reason: str
    coupling: Coupling | None = None


@dataclass(frozen=True)
class Discovery:
    """The couplings of a model, and where they are from. It prints as a table.

    Attributes:
        couplings: The couplings, those of the first layer first.
        weights: A row for every weight of the blocks, where trials have found the couplings.
        is_custom: Whether adapters must store the couplings, because the model type alone does not say them.
    """

    couplings: list[Coupling]
    weights: tuple[WeightRow, ...] = ()
    is_custom: bool = True

    def to_dict(self) -> dict:
        """Convert to a dict for JSON: the couplings, and the rows without them."""
        return {
            "couplings": [coupling.to_dict() for coupling in self.couplings],
            "weights": [{"path": row.path, "status": row.status, "reason": row.reason} for row in self.weights],
        }

    def __str__(self) -> str:
        """The summary, under the rows: weights that differ in numbers only, with the same status, are one row."""
        names = (".".join("*" if part.isdigit() else part for part in row.path.split(".")) for row in self.weights)
        alike = Counter((name, row.status, row.reason) for name, row in zip(names, self.weights))
        lines = [(name, str(count), status, why) for (name, status, why), count in alike.items()]
        return "\n".join([*table([("weight", "number", "status", "why"), *lines]).splitlines(), self.summary])

    @property
    def summary(self) -> str:
        """One line: how many couplings, and how many weights have each status."""
        counts = Counter(row.status for row in self.weights)
        words = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
        return f"{len(self.couplings)} couplings; weights of the blocks: {words or 'none'}"


# ---- the search ------------------------------------------------------------------------------------------------

COPIED_WITH_EXAMPLE = 20_000_000  # parameters up to which a transformers model is tried on the user's own example
_FOUND: dict[tuple, Discovery] = {}  # the last result, because plan, select and attach often follow each other
PROPOSERS = (attention_blocks, stack_blocks, ffn_blocks)


def discover(model: nn.Module, example: Any = None) -> Discovery:
    """Find the couplings of a model, by trials on a tiny twin of it. The model does not change.

    Args:
        model: Any model. Its weights are not read, so it may be on the meta device.
        example: Input for the model: a tensor, a tuple of arguments or a dict of them. A transformers model needs none.

    Returns:
        The couplings, and what becomes of every weight of the blocks. It prints as a table.

    Raises:
        ValueError: The model has no config and no example is given, no example runs, the output is random, or nothing
            in the model can be trained. The message says what was tried.
        TypeError: The example is of another type.
    """
    key = _key(model) if example is None else None
    found = _FOUND.get(key) if key is not None else None
    if found is None:
        with torch.device("cpu"):  # where twins are, whatever the default device is
            found = search(model, trial_of(model, example))
        gc.collect()  # twins, each of which is in a cycle with its forward
    if key is not None:
        _FOUND.clear()
        _FOUND[key] = found
    return replace(found, couplings=list(found.couplings))


def _key(model: nn.Module) -> tuple | None:
    """What decides the result of a search without an example: the classes and sizes of all modules, and the config."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return None
    modules = tuple((path, type(module)) for path, module in model.named_modules())
    sizes = tuple((path, tuple(full_shape(parameter))) for path, parameter in model.named_parameters())
    return modules, sizes, config.to_json_string()


def search(model: nn.Module, trial: Trial) -> Discovery:
    """Find the couplings of a model, by trials on a twin of it.

    Raises:
        ValueError: Nothing in the model can be trained.
    """
    structure = LayerMap(model, trial.called)
    findings = Findings(structure, trial)
    for propose in PROPOSERS:
        outcomes = _settled(trial, propose)
        structure.refused = trial.structure.refused
        for block in list(propose(structure)):
            findings.add(block, outcomes.get(block.key) or Outcome(None, None, "the twin has no block like it"))
    findings.add_one_sided()
    found = findings.discovery()
    if not found.couplings:
        raise ValueError(f"{type(model).__name__}: s2ft finds nothing that it can train.\n{found}")
    return found


def _settled(trial: Trial, propose: Callable[[LayerMap], Iterator[Block]]) -> dict[str, Outcome]:
    """The outcomes of the twin's blocks by key. Layers of couplings are not proposed again, and those of others are."""
    structure, taken = trial.structure, set(trial.structure.taken)
    outcomes: dict[str, Outcome] = {}
    while True:
        blocks = by_key((block.key, block) for block in propose(structure))
        found = {key: settle(trial, alike) for key, alike in blocks.items() if key not in outcomes}
        outcomes |= found
        refused = {key for key, outcome in found.items() if outcome.status is None}
        if not refused:
            break
        structure.refused |= refused
        structure.taken = set(taken)
    right = [one for key, alike in blocks.items() for block in alike for one in outcomes[key].couplings(block)]
    structure.taken.update(projection.path for projection in projections_of(right))
    return outcomes


# ---- the twin and its input ------------------------------------------------------------------------------------


def trial_of(model: nn.Module, example: Any = None) -> Trial:
    """Make a twin of a model and find an input that it runs on.

    Raises:
        ValueError: See :func:`discover`.
        TypeError: The example is of another type.
    """
    check_example(example)
    own = not hasattr(getattr(model, "config", None), "to_dict")
    if own and example is None:
        raise ValueError(
            f"{type(model).__name__} is not a model of transformers, so s2ft can't make an input for it: pass example= "
            "(a tensor, a tuple of arguments or a dict of them), so that s2ft finds the couplings by trials; or "
            "describe them in couplings=[s2ft.Coupling.ffn(...), ...]"
        )
    sizes = (full_shape(parameter).numel() for parameter in model.parameters())
    at_once = example is not None and (own or sum(sizes) <= COPIED_WITH_EXAMPLE)
    tried: list[str] = []
    for twin in () if at_once else twins_of(model, tried):
        try:
            return Trial(twin, runnable_example(twin))
        except Exception as error:  # models refuse inputs in many ways
            tried.append(f"{type(error).__name__}: {error}")
    if example is None:
        raise ValueError(
            f"s2ft finds no couplings of {type(model).__name__}: no small copy of it runs. Tried: {'; '.join(tried)}. "
            "Pass an input as example=, or describe the couplings in couplings=[s2ft.Coupling.ffn(...), ...]"
        )
    try:  # on a copy of the model in float64, because the input may not fit a smaller one
        example = tree_map_only(
            Tensor, lambda one: one.detach().to("cpu", torch.float64 if one.is_floating_point() else one.dtype), example
        )
        return Trial(copied(model), example)
    except Exception as error:  # models refuse inputs in many ways
        raise ValueError(
            f"example must be an input on which a float64 copy of {type(model).__name__} runs (by copy.deepcopy, so no "
            "attribute may hold a tensor with a graph): "
            f"{type(error).__name__}: {error}"
        ) from error


# ---- what becomes of every weight ------------------------------------------------------------------------------

NO_GRADIENT = "gets no gradient from the model's output"


class Findings:
    """The couplings and rows found so far.

    Attributes:
        structure: The model. Its `taken` has the paths of the layers in a coupling.
    """

    def __init__(self, structure: LayerMap, trial: Trial) -> None:
        self.structure = structure
        self._dead = without_gradient(structure, trial)
        self._couplings: list[Coupling] = []
        self._rows: dict[str, WeightRow] = {}
        self._why: dict[str, str] = {}  # of layers whose block is no coupling

    def discovery(self) -> Discovery:
        """The couplings in the order of their layers, and the rows in that of the model's weights."""
        places = {path: i for i, (path, _) in enumerate(self.structure.model.named_parameters())}
        rows = sorted(
            self._rows.values(), key=lambda row: places.get(row.path, places.get(f"{row.path}.weight", len(places)))
        )
        return Discovery(sorted(self._couplings, key=lambda coupling: coupling.layer), tuple(rows))

    def add(self, block: Block, outcome: Outcome) -> None:
        """Add the couplings of a block, or remember why its layers are in none."""
        found = outcome.couplings(block)
        paths = {projection.path for projection in projections_of(found)}
        past = next(filter(self.structure.is_read_past, sorted(paths)), None)
        if past is not None:
            found, name = (), past.rpartition(".")[2]
            outcome = Outcome(None, None, f"of its block, {name} may be used without its layer")
        if not found or paths & self._rows.keys():
            for projection in block.proposals[0].couplings[0].projections:
                self._why.setdefault(projection.path, outcome.reason)
            return
        status, reason, coupling = "untouched", NO_GRADIENT, None
        if paths - self._dead:
            self._couplings.extend(found)
            self.structure.taken |= paths
            status, reason, coupling = cast(str, outcome.status), outcome.reason, found[0]
        self._rows.update({path: WeightRow(path, status, reason, coupling) for path in sorted(paths)})

    def add_one_sided(self) -> None:
        """Cover every layer of the blocks that is in no coupling, or say why it is not trained."""
        structure = self.structure
        of_no_kind = {
            path: f"its class, {type(module).__name__}, is derived from nn.Linear"
            for path, module in structure.modules.items()
            if isinstance(module, nn.Linear) and path not in structure.layers
        }
        shared = {path: f"one weight with that of {other}" for path, other in structure.shared.items()}
        for path, obstacle in {**of_no_kind, **shared, **dict.fromkeys(structure.layers)}.items():
            in_block = structure.block_of(path) or PROJECTOR.search(path) or may_be_coupled(structure, path)
            if path not in self._rows and in_block:
                self._rows[path] = self._lone(path, obstacle)
        for path in stacked_weights(structure):
            self._rows.setdefault(
                path, WeightRow(path, "untouched", self._why.get(path, "a layout of experts not known"))
            )

    def _lone(self, path: str, obstacle: str | None) -> WeightRow:
        structure = self.structure
        obstacles = {
            obstacle: obstacle,
            "a head, a router or an embedding": NO_BLOCK_LAYER.search(path),
            "its block runs without it, so only its weight may be used": structure.is_bypassed(path),
            "its block's code may use its weight without its layer": structure.is_read_past(path),
            NO_GRADIENT: path in self._dead,
        }
        why = next((why for why, holds in obstacles.items() if holds), None)
        if why is not None:
            return WeightRow(path, "untouched", why)
        coupling = Coupling.one_sided(structure.layer_number(path), path=path, count=structure.inputs[path])
        self._couplings.append(coupling)
        default = "it shares its units with no layer" if structure.is_called(path) else "not reached by the example"
        return WeightRow(path, "one-sided", self._why.get(path, default), coupling)


def without_gradient(structure: LayerMap, trial: Trial) -> set[str]:
    """The layers and parameters of experts of a model that get no gradient, as those of the twin don't.

    The twin may have fewer layers. Layers without a gradient are the first or the last ones of a stack, for instance
    the last of a vision tower whose second last output is used. Layers that did not run count as if they got one.
    """
    twin, with_gradient, dead = trial.structure, trial.gradients(), set()
    reached: dict[str, dict[int, bool]] = {}  # by pattern and number of the layer
    for path in (*twin.layers, *stacked_weights(twin)):
        module = path if path in twin.modules else parent_of(path)
        gets = path in with_gradient or f"{path}.weight" in with_gradient or not twin.is_called(module)
        layers, number = reached.setdefault(twin.pattern(path), {}), twin.layer_number(path)
        layers[number] = layers.get(number, False) or gets
    paths: dict[str, dict[int, list[str]]] = {}
    for path in (*structure.layers, *stacked_weights(structure)):
        paths.setdefault(structure.pattern(path), {}).setdefault(structure.layer_number(path), []).append(path)
    for pattern, layers in reached.items():
        flags, numbers = [layers[number] for number in sorted(layers)], sorted(paths.get(pattern, ()))
        first, last = (flags.index(True), flags[::-1].index(True)) if any(flags) else (len(numbers), 0)
        for number in {*numbers[:first], *numbers[max(0, len(numbers) - last) :]}:
            dead.update(paths[pattern][number])
    return dead
