"""Discovery from end to end: a twin and an example, proposals, trials, and what becomes of every weight.

Couplings are proposed from the names and sizes of the model's layers, and tried on a tiny twin in float64. What the
trials confirm can move; what they don't is trained in place, or one layer by itself.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from s2ft.distributed import full_shape
from s2ft.files.tables import by_key, table
from s2ft.model.coupling import Coupling, projections_of
from s2ft.model.discovery.examples import check_example, example_of, runnable_example
from s2ft.model.discovery.proposals import (
    Block,
    attention_blocks,
    ffn_blocks,
    may_be_coupled,
    stack_blocks,
    stacked_weights,
)
from s2ft.model.discovery.structure import NO_BLOCK_LAYER, PROJECTOR, LayerMap, parent_of
from s2ft.model.discovery.trial import Outcome, Trial, settle
from s2ft.model.discovery.twin import copied, twins_of

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
    """The couplings that s2ft finds in a model. It prints as a table.

    Attributes:
        couplings: The couplings, those of the first layer first.
        weights: A row for every weight of the blocks.
    """

    couplings: list[Coupling]
    weights: list[WeightRow]

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
REMEMBERED = 8  # results that are kept, because plan, select and attach often follow each other
_FOUND: dict[tuple, Discovery] = {}
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
    found = _FOUND.get(key) or search(model, trial_of(model, example))
    if key is not None:
        _FOUND[key] = found
        for old in list(_FOUND)[:-REMEMBERED]:
            del _FOUND[old]
    return Discovery(list(found.couplings), list(found.weights))


def _key(model: nn.Module) -> tuple | None:
    """What decides the result of a search without an example: the classes and sizes of all modules, and the config."""
    config = getattr(model, "config", None)
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
    structure, taken, outcomes = trial.structure, set(trial.structure.taken), {}
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
        for make in (runnable_example, example_of):
            try:
                return Trial(twin, make(twin))
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
            f"example must be an input that {type(model).__name__} runs on. On a float64 copy of the model: "
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
        return Discovery(sorted(self._couplings, key=lambda coupling: coupling.layer), rows)

    def add(self, block: Block, outcome: Outcome) -> None:
        """Add the couplings of a block, or remember why its layers are in none."""
        found = outcome.couplings(block)
        paths = {projection.path for projection in projections_of(found)}
        past = next(filter(self.structure.is_read_past, sorted(paths)), None)
        if past is not None:
            outcome = Outcome(None, None, f"of its block, {past.rpartition('.')[2]} may be used without its layer")
        used = {projection.path for projection in projections_of(self._couplings)}
        if not found or past is not None or paths & used:
            for projection in block.proposals[0].couplings[0].projections:
                self._why.setdefault(projection.path, outcome.reason)
            return
        status, reason, coupling = "untouched", NO_GRADIENT, None
        if paths - self._dead:
            self._couplings.extend(found)
            self.structure.taken |= paths
            status, reason, coupling = outcome.status, outcome.reason, found[0]
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
            why = self._why.get(path, "a layout of experts not known")
            self._rows.setdefault(path, WeightRow(path, "untouched", why))

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
