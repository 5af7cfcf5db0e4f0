"""What discovery reads from a model before it proposes couplings: its layers, their order, their numbers and patterns.

Nothing here reads a weight, so a model on the meta device will do.
"""

import inspect
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, cached_property

from torch import nn

from s2ft.files.tables import by_key
from s2ft.layers import kind_of
from s2ft.model.towers import tower_of

# Layers that read the model's outputs or choose experts: training some of their units is not what S²FT is for.
NO_BLOCK_LAYER = re.compile(
    r"(^|[._])(lm_head|score|classifier|classification_head|qa_outputs|embed_out|router|cls|pooler|predictions|"
    r"indexer|shared_expert_gate|output_embeddings|proj_out_head|modality_router|logit)(\.|$)|(^|\.)gate$|router"
)
PROJECTOR = re.compile(r"projector|merger|connector|aligner|resampler|adapter|qformer|multi_modal|feature_projection")
NOT_IN_FORWARD = ("__init__", "reset_parameters", "_init_weights", "init_weights", "extra_repr")
# What only describes a weight: reading it past the layer does no harm.
DESCRIPTIONS = "dtype|device|shape|size|ndim|dim|numel|is_|requires_grad|element_size"
READS = re.compile(rf"(?<!isinstance\()\bself\.(\w+)\.(?:weight|bias)\b(?!\.(?:{DESCRIPTIONS}))")
NESTED_STACKS = ("blocks", "layers", "layer", "block")


def parent_of(path: str) -> str:
    """The path of the module that contains this one; "" for the model."""
    return path.rpartition(".")[0]


@cache
def name_and_owner(path: str) -> tuple[str, str]:
    """A layer's own name and the path of the block that has it.

    Wrappers are left out: of ``attn.q_proj.linear`` and ``attn.to_out.0`` the name is that of the wrapper, and of
    ``attention.output.dense`` it is ``output``.
    """
    bare = re.sub(r"\.(linear|0|dense|conv|projection)$", "", path)
    if bare.rpartition(".")[2].isdigit():
        bare = path
    return bare.rpartition(".")[2], parent_of(bare)


def _shared_weights(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Paths of the weights that more than one of the modules holds, each with another path of the same weight."""
    holders = by_key(
        (id(parameter), path if name == "weight" else f"{path}.{name}")
        for path, module in modules.items()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1
    )
    return {path: paths[path == paths[0]] for paths in holders.values() if len(paths) > 1 for path in paths}


class LayerMap:
    """The layers of a model, with the order in which a run calls them.

    Attributes:
        model: The model, or its twin.
        layers: Every layer that S²FT can train, by path, in the model's order.
        shared: Weights that several modules hold, by the path of a layer or of a stack of experts, with another of
            their paths. They are not in `layers`: what is trained in one place would be merged into the other too.
        outputs: The number of each layer's outputs, by path.
        inputs: The number of each layer's inputs, by path.
        called: Call numbers of modules by pattern and by path, from a run of the twin; empty before a run.
        taken: Paths of the layers that are in a coupling already.
        refused: Keys of proposed blocks that are no coupling, so that their layers are free for others.
    """

    def __init__(self, model: nn.Module, called: Mapping[str, int] | None = None) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.shared = _shared_weights(self.modules)
        self.layers = {
            path: module
            for path, module in self.modules.items()
            if kind_of(module).layers is not None and path not in self.shared
        }
        self.called = {} if called is None else called
        self.taken: set[str] = set()
        self.refused: set[str] = set()
        self._found_digits: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        shapes = {path: kind_of(module).shape(module) for path, module in self.layers.items()}
        self.outputs = {path: shape[0] for path, shape in shapes.items()}
        self.inputs = {path: shape[1] for path, shape in shapes.items()}

    def inside(self, root: str) -> list[str]:
        """The paths of the layers inside a module, in the model's order."""
        return self._inside.get(root, [])

    @cached_property
    def _inside(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in self.layers:
            around = path
            while around:
                around = parent_of(around)
                found.setdefault(around, []).append(path)
        return found

    # ---- order ---------------------------------------------------------------------------------------

    def call(self, path: str) -> int | None:
        """The call number of a module or of the modules of its pattern; None if the run did not call it."""
        found = self.called.get(path)
        return self.called.get(self.pattern(path)) if found is None else found

    @cached_property
    def place(self) -> dict[str, tuple[int, int]]:
        """A sort key by path: layers in the order of their calls, after those that the run did not call."""
        numbers = {path: self.call(path) for path in self.layers}
        return {path: (-1 if numbers[path] is None else numbers[path], i) for i, path in enumerate(self.layers)}

    def is_called(self, path: str) -> bool:
        """Whether the run called a module of this pattern."""
        return self.call(path) is not None

    def is_bypassed(self, path: str) -> bool:
        """Whether the run called the module around a layer and not the layer, so that only its weight may be used."""
        around = parent_of(path)
        while around and isinstance(self.modules[around], (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            around = parent_of(around)
        return bool(self.called) and not self.is_called(path) and (not around or self.is_called(around))

    def is_read_past(self, path: str) -> bool:
        """Whether the block around a layer, or a parameter of experts, may use the weight without running the layer."""
        around, _, name = path.rpartition(".")
        return path in self.layers and name in _read_past(type(self.modules[around]))

    # ---- numbers -------------------------------------------------------------------------------------

    def pattern(self, path: str) -> str:
        """The path with "*" for the numbers of layers and experts. Blocks with the same pattern are alike."""
        stacks, experts = self._digits(path)
        return ".".join("*" if i in (*stacks, *experts) else part for i, part in enumerate(path.split(".")))

    def block_of(self, path: str) -> str:
        """The path of the numbered block that has a layer, "" if none has."""
        stacks, _ = self._digits(path)
        return ".".join(path.split(".")[: stacks[-1] + 1]) if stacks else ""

    def _digits(self, path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Positions of the components that number layers of a stack, at most two (stage and block), and of experts."""
        if path in self._found_digits:
            return self._found_digits[path]
        parts, stacks, experts = path.split("."), [], []
        for i, part in enumerate(parts):
            around = self.modules.get(".".join(parts[:i]))
            if not part.isdigit() or not isinstance(around, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                continue
            if "expert" in parts[i - 1]:
                experts.append(i)
            elif self._is_stack(around, parts[i - 1], nested=bool(stacks)) and len(stacks) < 2 and not experts:
                stacks.append(i)
        self._found_digits[path] = tuple(stacks), tuple(experts)
        return self._found_digits[path]

    @staticmethod
    def _is_stack(modules: nn.Module, name: str, nested: bool) -> bool:
        """Whether the modules of a list are the blocks of a stack."""
        blocks = [module for module in modules.children() if any(True for _ in module.children())]
        alike = len({type(module) for module in blocks}) == 1 and len(blocks) == len(list(modules.children()))
        return bool(blocks) and (not nested or name in NESTED_STACKS and alike)

    @cached_property
    def _first_numbers(self) -> dict[str, int]:
        """The number of the first block of each stack: encoder before decoder, language before other towers."""
        blocks = filter(None, map(self.block_of, self.modules))
        stacks = by_key((self._stack_of(block), block) for block in dict.fromkeys(blocks))
        ordered = list(stacks)
        if not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            ordered.sort(key=lambda stack: tower_of(self.model, min(stacks[stack])) != "language")
        first, numbers = 0, {}
        for stack in ordered:
            numbers[stack] = first
            first += max(self._number_within(block) for block in stacks[stack]) + 1
        return numbers

    def _stack_of(self, block: str) -> str:
        """A name for the stack of a block: lists of one module (attentions, ffns) are one stack, but not two coders."""
        around = block.split(".")[: self._digits(block)[0][0]]  # empty if the model is a list of blocks itself
        return ".".join(around if around and "coder" in around[-1] else around[:-1])

    def _number_within(self, block: str) -> int:
        parts, (digits, _) = block.split("."), self._digits(block)
        if len(digits) == 1:
            return int(parts[digits[0]])
        inner = parts[digits[0] + 1 : digits[1]]
        before = (
            self.modules.get(".".join([*parts[: digits[0]], str(i), *inner])) for i in range(int(parts[digits[0]]))
        )
        return sum(len(list(one.children())) for one in before if one is not None) + int(parts[digits[1]])

    def layer_number(self, path: str) -> int:
        """The number of the layer that a path is in, counted through the stacks; 0 outside of all."""
        block = self.block_of(path)
        return self._first_numbers[self._stack_of(block)] + self._number_within(block) if block else 0


@cache
def _read_past(owner: type) -> frozenset[str]:
    """The names of the layers whose weights a method of the class reads itself.

    A trainable layer adds its delta in its forward. A block that multiplies by the weight itself, often only where a
    fused kernel is installed, would train or compute without the delta.
    """
    found = set()
    for base in owner.__mro__:
        if base.__module__.startswith("torch.nn."):
            continue
        for method, function in vars(base).items():
            if method not in NOT_IN_FORWARD and inspect.isfunction(function):
                with suppress(OSError, TypeError):  # made without a file
                    found.update(READS.findall(inspect.getsource(inspect.unwrap(function))))
    return frozenset(found)
