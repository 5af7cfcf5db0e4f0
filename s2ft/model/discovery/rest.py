"""What becomes of every weight: collects the couplings of the trials and covers the other layers one by one."""

from torch import nn

from s2ft.model.coupling import Coupling
from s2ft.model.discovery.ffn import may_be_coupled
from s2ft.model.discovery.proposal import Block
from s2ft.model.discovery.report import Discovery, WeightRow
from s2ft.model.discovery.settle import Outcome
from s2ft.model.discovery.stacks import stacked_weights
from s2ft.model.discovery.structure import NO_BLOCK_LAYER, PROJECTOR, Structure
from s2ft.model.discovery.trial import Trial

NO_GRADIENT = "gets no gradient from the model's output"
HEAD = "a head, a router or an embedding"


class Findings:
    """The couplings and rows found so far.

    Attributes:
        structure: The model. Its `taken` has the paths of the layers in a coupling.
    """

    def __init__(self, structure: Structure, trial: Trial) -> None:
        self.structure = structure
        self._alive = Alive(structure, trial)
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
        paths = {projection.path for one in found for projection in one.projections}
        past = next(filter(self.structure.is_read_past, sorted(paths)), None)
        if past is not None:
            outcome = Outcome(None, None, f"of its block, {past.rpartition('.')[2]} may be used without its layer")
        used = {projection.path for one in self._couplings for projection in one.projections}
        if not found or past is not None or paths & used:
            for projection in block.proposals[0].couplings[0].projections:
                self._why.setdefault(projection.path, outcome.reason)
            return
        if not any(self._alive.has_gradient(path) for path in paths):
            for path in sorted(paths):
                self._rows[path] = WeightRow(path, "untouched", NO_GRADIENT)
            return
        self._couplings.extend(found)
        self.structure.taken |= paths
        for path in sorted(paths):
            self._rows[path] = WeightRow(path, outcome.status, outcome.reason, found[0])

    def add_one_sided(self) -> None:
        """Cover every layer of the blocks that is in no coupling, or say why it is not trained."""
        for path, other in self.structure.shared.items():
            if self._is_in_block(path):
                self._rows[path] = WeightRow(path, "untouched", f"one weight with that of {other}")
        for path in self.structure.layers:
            if path not in self._rows and self._is_in_block(path):
                self._rows[path] = self._lone(path)
        for path in stacked_weights(self.structure):
            if path not in self._rows:
                self._rows[path] = WeightRow(path, "untouched", self._why.get(path, "a layout of experts not known"))
        for path, module in self.structure.modules.items():
            if isinstance(module, nn.Linear) and path not in self._rows and self._is_in_block(path):
                why = f"its class, {type(module).__name__}, is derived from nn.Linear"
                self._rows[path] = WeightRow(path, "untouched", why)

    def _is_in_block(self, path: str) -> bool:
        structure = self.structure
        return bool(structure.block_of(path)) or bool(PROJECTOR.search(path)) or may_be_coupled(structure, path)

    def _lone(self, path: str) -> WeightRow:
        structure = self.structure
        if NO_BLOCK_LAYER.search(path):
            return WeightRow(path, "untouched", HEAD)
        if structure.is_bypassed(path):
            return WeightRow(path, "untouched", "its block runs without it, so only its weight may be used")
        if structure.is_read_past(path):
            return WeightRow(path, "untouched", "its block's code may use its weight without its layer")
        if not self._alive.has_gradient(path):
            return WeightRow(path, "untouched", NO_GRADIENT)
        coupling = Coupling.one_sided(structure.layer_number(path), path=path, count=structure.inputs(path))
        self._couplings.append(coupling)
        default = "it shares its units with no layer" if structure.is_called(path) else "not reached by the example"
        return WeightRow(path, "one-sided", self._why.get(path, default), coupling)


class Alive:
    """Which of a model's layers get a gradient, as those of the twin do.

    The twin may have fewer layers. Layers without a gradient are the first or the last ones of a stack, for instance
    the last of a vision tower whose second last output is used.
    """

    def __init__(self, structure: Structure, trial: Trial) -> None:
        self._structure = structure
        with_gradient = trial.gradients()
        self._dead_ends: dict[str, tuple[int, int]] = {}
        by_pattern: dict[str, dict[int, bool]] = {}
        twin = trial.structure
        for path in (*twin.layers, *stacked_weights(twin)):
            layers = by_pattern.setdefault(twin.pattern(path), {})
            gets = path in with_gradient or f"{path}.weight" in with_gradient or not twin.is_called(_module(twin, path))
            layers[twin.layer_number(path)] = layers.get(twin.layer_number(path), False) or gets
        for pattern, layers in by_pattern.items():
            flags = [layers[number] for number in sorted(layers)]
            first = next((i for i, flag in enumerate(flags) if flag), len(flags))
            last = next((i for i, flag in enumerate(reversed(flags)) if flag), len(flags))
            self._dead_ends[pattern] = (first, last) if first < len(flags) else (-1, -1)
        self._numbers: dict[str, list[int]] = {}
        for path in (*structure.layers, *stacked_weights(structure)):
            self._numbers.setdefault(structure.pattern(path), []).append(structure.layer_number(path))
        self._numbers = {pattern: sorted(set(numbers)) for pattern, numbers in self._numbers.items()}

    def has_gradient(self, path: str) -> bool:
        """Whether a layer, or a parameter of experts, gets a gradient. Layers that did not run count as if they did."""
        pattern = self._structure.pattern(path)
        first, last = self._dead_ends.get(pattern, (0, 0))
        if first < 0:
            return False
        numbers = self._numbers[pattern]
        return first <= numbers.index(self._structure.layer_number(path)) < len(numbers) - last


def _module(structure: Structure, path: str) -> str:
    return path if path in structure.modules else path.rpartition(".")[0]
