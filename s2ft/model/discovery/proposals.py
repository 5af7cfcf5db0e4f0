"""Reads the layers of a model and proposes couplings by their names and sizes.

Nothing here reads a weight, so a model on the meta device will do.

A block may be read in several ways: number of heads, layout of a weight, vectors that move too. Trials decide.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain, combinations, product
from typing import Any

from torch import Tensor, nn

from s2ft.distributed import full_shape
from s2ft.layers import forward_of, kind_of
from s2ft.model.coupling import Coupling, Projection, Vector, by_key, in_one_weight
from s2ft.model.parts import tower_of
from s2ft.model.weights import get

# ---- the layers of a model, their order, numbers and patterns -------------------------------------------------------

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
        holders = by_key(
            (id(parameter), path if name == "weight" else f"{path}.{name}")
            for path, module in self.modules.items()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() > 1
        ).values()
        self.shared = {path: paths[path == paths[0]] for paths in holders if len(paths) > 1 for path in paths}
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

    @cached_property
    def inside(self) -> dict[str, list[str]]:
        """The paths of the layers inside each module that has any, in the model's order."""
        names = {path: path.split(".") for path in self.layers}
        return by_key((".".join(names[path][:depth]), path) for path in names for depth in range(len(names[path])))

    # ---- order ---------------------------------------------------------------------------------------

    def call(self, path: str) -> int | None:
        """The call number of a module or of the modules of its pattern; None if the run did not call it."""
        found = self.called.get(path)
        return self.called.get(self.pattern(path)) if found is None else found

    @cached_property
    def place(self) -> dict[str, tuple[int, int]]:
        """A sort key by path: layers in the order of their calls, after those that the run did not call."""
        numbers = {path: self.call(path) for path in self.layers}
        return {path: (-1 if number is None else number, i) for i, (path, number) in enumerate(numbers.items())}

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
        # mypy does not count every class as hashable.
        return path in self.layers and name in _read_past(type(self.modules[around]))  # type: ignore[arg-type]

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
        parts, experts = path.split("."), []
        stacks: list[int] = []
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
    def _numbers(self) -> dict[tuple[str, tuple[int, ...]], int]:
        """The number of every block: encoder before decoder, language before other towers."""
        blocks = {self._stack_and_place(block): block for block in filter(None, map(self.block_of, self.modules))}
        stacks = by_key((stack, place) for stack, place in blocks)
        ordered = list(stacks)
        if not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            ordered.sort(key=lambda stack: tower_of(self.model, blocks[stack, stacks[stack][0]]) != "language")
        numbers: dict[tuple[str, tuple[int, ...]], int] = {}
        for stack in ordered:
            first = 1 + max(numbers.values(), default=-1)
            for places in by_key((len(place), place) for place in stacks[stack]).values():  # stages, and blocks in them
                numbers.update({(stack, place): first + i for i, place in enumerate(sorted(places))})
        return numbers

    def _stack_and_place(self, block: str) -> tuple[str, tuple[int, ...]]:
        """A name for the stack of a block, and the numbers of the block in it.

        Lists of one module (attentions, ffns) are one stack, but not two coders.
        """
        parts, (digits, _) = block.split("."), self._digits(block)
        around = parts[: digits[0]]  # empty if the model is a list of blocks itself
        name = ".".join(around if around and "coder" in around[-1] else around[:-1])
        return name, tuple(int(parts[i]) for i in digits)

    def layer_number(self, path: str) -> int:
        """The number of the layer that a path is in, counted through the stacks; 0 outside of all."""
        block = self.block_of(path)
        return self._numbers[self._stack_and_place(block)] if block else 0


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


# ---- proposals ------------------------------------------------------------------------------------------------------


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

    def of(self, label: str | None) -> tuple[Coupling, ...]:
        """The couplings of the proposal with a label; none if no proposal has it."""
        return next((proposal.couplings for proposal in self.proposals if proposal.label == label), ())


def vector_choices(
    structure: LayerMap, roots: tuple[str, ...], coupling: Coupling
) -> Iterator[tuple[str, tuple[Vector, ...]]]:
    """List sets of vectors that may move with a coupling's units, the smallest sets first, each with words for it.

    Args:
        structure: The model.
        roots: Paths of the modules whose vectors may move.
        coupling: The coupling without vectors.
    """
    by_owner = by_key((parent_of(vector.path), vector) for vector in _vector_candidates(structure, roots, coupling))
    owners = list(by_owner)
    sizes = range(len(owners) + 1) if len(owners) <= MOST else (0, len(owners))
    for chosen in chain.from_iterable(combinations(owners, size) for size in sizes):
        vectors = tuple(vector for owner in chosen for vector in by_owner[owner])
        names = ", ".join(structure.pattern(vector.path) for vector in vectors)
        yield (f", moving {names}" if names else ""), vectors


def _vector_candidates(structure: LayerMap, roots: tuple[str, ...], coupling: Coupling) -> Iterator[Vector]:
    q = coupling.producers[0]
    keys = next((projection for projection in coupling.producers if projection.key == "k"), q)
    lengths = {
        f"{root}.{name}" if root else name: full_shape(tensor)[0]
        for root in roots
        for name, tensor in chain(structure.modules[root].named_parameters(), structure.modules[root].named_buffers())
        if name.count(".") <= 2 and tensor.is_floating_point() and full_shape(tensor)  # at most two modules deep
    }
    for path, length in lengths.items():
        sides = (keys, q) if OF_KEYS.search(path) else (q, keys)
        side = next((side for side in sides if length in (side.count, side.count * side.unit)), None)
        if side is not None and side.count > 1 and parent_of(path) not in structure.layers:
            yield Vector(path, length // side.count)


# ---- attention: by the names of its layers and the number of its heads -----------------------------------------

# in this order: "q" is also the first letter of other words
KEY_AND_VALUE = {"query": ("key", "value"), "queries": ("keys", "values"), "q": ("k", "v")}
ONE_Q = re.compile(r"^w?q(_b|uery)?(_(proj|attn|linear|lin))?$|^query$", re.I)
ONE_KV = re.compile(r"^w?_?kv(_b)?(_(proj|linear))?$|^wkv_b$|^c_attn$|^key_value$", re.I)
ONE_QKV = re.compile(
    r"^w?_?(in_proj_?)?qkv(_(proj|linear|attn|layer))?$|^attn_qkv$|^c_attn$|^query_key_value$|^w_?pack$|^att_proj$",
    re.I,
)
OUT = re.compile(
    r"^(w?o|out|output|dense|proj|projection|to_out|fc_out|proj_out|linear_out|final_linear|c_proj|dense_output|"
    r"(o|out|output|attn|attention)_(b_)?(proj|projection|linear|lin|dense|layer)|attn_out(put)?|attention_out(put)?|"
    r"(attn_|attention_)(out|output)(_(proj|linear|dense|layer))?|projection_layer)$",
    re.I,
)
OUTPUT_GATE = re.compile(r"(^|_)(gate|g|z)(_b)?(_proj)?$", re.I)
CROSS = re.compile(r"cross|encoder_?attn|enc_?dec", re.I)
HEADS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "heads",
    "attention_heads",
    "num_query_heads",
    "nhead",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "h",
)
HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "d_head", "dim_head", "key_value_proj_dim")


def attention_blocks(structure: LayerMap) -> Iterator[Block]:
    """Propose couplings for every attention block that has layers with known names."""
    by_owner: dict[str, dict[str, str]] = {}
    for path in structure.layers:
        name, owner = name_and_owner(path)
        by_owner.setdefault(owner, {}).setdefault(name, path)
    for root, paths in ((owner, paths) for owner, here in by_owner.items() for paths in _inputs_of(here)):
        if structure.taken.intersection(paths):
            continue
        for around in dict.fromkeys((root, parent_of(root))):
            free = [path for path in structure.inside[around] if path not in structure.taken and path not in paths]
            outs = [path for path in free if OUT.search(name_and_owner(path)[0]) or OUT.search(path.rpartition(".")[2])]
            outs.sort(key=structure.place.__getitem__)
            proposals = [one for out in outs for one in _attention_proposals(structure, paths, root, out, around)]
            if proposals:
                kinds = type(structure.modules[root]).__name__, type(structure.modules[around]).__name__
                own = (name for name, _ in structure.modules[root].named_parameters(recurse=False))
                names = ", ".join([*map(structure.pattern, paths), *own])  # some blocks of a stack have sinks
                # Many heads first: halves of heads can't move, but pairs of heads can where single heads can.
                proposals.sort(key=lambda proposal: -proposal.couplings[0].main.count)
                yield Block(f"attention of {names} ({', '.join(kinds)})", tuple(proposals))
                break


def _inputs_of(here: dict[str, str]) -> list[tuple[str, ...]]:
    """The paths of q, k and v among the layers of one module, by name: three, or q and one for both, or one for all."""
    three: list[tuple[str, ...]] = []
    for name, (query, words) in product(here, KEY_AND_VALUE.items()):
        # q_proj becomes k_proj and v_proj, wq becomes wk, in_proj_q becomes in_proj_k
        word = rf"(^|(?<=[_.])|(?<=^w)|(?<=^W)){query}(?![a-z])"
        key, value = (re.sub(word, to, name, flags=re.I) for to in words)
        if key != name and key in here and value in here:
            three.append((here[name], here[key], here[value]))
    queries = [name for name in here if ONE_Q.search(name)]
    both = {name: [here[other] for other in here if other != name and ONE_KV.search(other)] for name in queries}
    two: list[tuple[str, ...]] = [(here[name], others[0]) for name, others in both.items() if others]
    return three or two or [(here[name],) for name in here if ONE_QKV.search(name) and not queries]


def _attention_proposals(
    structure: LayerMap, paths: tuple[str, ...], root: str, out: str, around: str
) -> Iterator[Proposal]:
    """Readings of layers that compute queries, keys and values: three, or q and kv, or one for all, in this order."""
    kind = "cross-attention" if CROSS.search(paths[0]) else "attention"
    number, name, width = structure.layer_number(out), structure.pattern(out), structure.inputs[out]
    sizes = [structure.outputs[path] for path in paths]
    for source, heads in _head_counts(structure, root, around, width):
        if heads < 1 or width % heads:
            continue
        for layout, producers, count in LAYOUTS[len(paths)](paths, sizes, heads, width // heads):
            bare = Coupling(kind, number, producers, Projection("o", out, count, width // count, 1))
            for gate, gated in _with_gates(structure, paths, root, bare, around):
                for moving, vectors in vector_choices(structure, (root, around), gated):
                    label = f"{name}, heads from {source}, {layout}{gate}{moving}"
                    yield Proposal(label, (replace(gated, vectors=vectors),))


def _head_counts(structure: LayerMap, root: str, around: str, width: int) -> Iterator[tuple[str, int]]:
    """Numbers of heads with where they come from: attributes of the modules, else the config, else every divisor."""
    for places in ({"block": root, "block around": around}, {"model": ""}):
        found = []
        for word, path in places.items():
            module = structure.modules[path]
            config = getattr(module, "config", None)
            owners = {word: module, f"{word}.config": config, f"{word}.text": getattr(config, "text_config", None)}
            for source, owner in owners.items():
                found += [(f"{source}.{name}", n) for name in HEADS if (n := _count(owner, name)) is not None]
                sizes = [(f"{source}.{name}", n) for name in HEAD_SIZES if (n := _count(owner, name)) is not None]
                found += [(word, width // size) for word, size in sizes if width % size == 0]
        if found:
            yield from found
            return
    divisors = [size for size in range(1, width) if width % size == 0]
    widest = max(structure.inputs.values())  # with it in the name, a small twin's reading isn't taken for the model's
    yield from ((f"divisor {i} below width {widest}", width // size) for i, size in enumerate(divisors))


def _count(owner: Any, name: str) -> int | None:
    try:
        value = getattr(owner, name, None)
    except Exception:  # configs whose layers differ refuse to name one number for all
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


# Ways in which layers with these sizes may hold q, k and v, with `unit` elements of a head's values: a word, the
# projections, the number of units of o.


def _separate(paths: tuple[str, ...], sizes: list[int], heads: int, unit: int) -> Iterator[tuple]:
    q, k, v = sizes
    kv = v // unit
    if q % heads or v % unit or not kv or heads % kv or k % kv:
        return
    counts = (heads, kv, kv)
    projections = (Projection(key, path, n, size // n, 0) for key, path, n, size in zip("qkv", paths, counts, sizes))
    yield "separate", tuple(projections), heads


def _two_layers(paths: tuple[str, ...], sizes: list[int], heads: int, unit: int) -> Iterator[tuple]:
    """A layer for q and one for k and v: all of k and then all of v, or k and v of each head in turn."""
    (q_path, path), (q_size, size) = paths, sizes
    if q_size % heads:
        return
    q = Projection("q", q_path, heads, q_size // heads, 0)
    kv = size // 2 // unit
    if kv and size == 2 * kv * unit and heads % kv == 0:
        yield "k, then v", (q, *in_one_weight(path, [("k", kv, unit), ("v", kv, unit)])), heads
    key = size // heads - unit
    if size % heads == 0 and key > 0:
        both = in_one_weight(path, [("k", heads, key), ("v", heads, unit)], in_turn=True)
        yield "k and v of each head", (q, *both), heads


def _packed(paths: tuple[str, ...], sizes: list[int], heads: int, unit: int) -> Iterator[tuple]:
    """One layer: all of q, k and v one after the other; or in turn for each head, or for each group of heads."""
    (path,), (size,) = paths, sizes
    rest = size // unit - heads
    if size % unit or rest <= 0 or rest % 2 or heads % (rest // 2):
        return
    kv, group = rest // 2, heads // (rest // 2)
    yield "q, k, v", in_one_weight(path, [("q", heads, unit), ("k", kv, unit), ("v", kv, unit)]), heads
    if heads == kv:
        for order, in_turn in (*product(("qkv", "qvk", "kqv"), [True]), *product(("qvk", "kqv"), [False])):
            parts = in_one_weight(path, [(key, heads, unit) for key in order], in_turn)
            in_order = tuple(sorted(parts, key=lambda part: "qkv".index(part.key)))
            yield f"{', '.join(order)}{' of each head' if in_turn else ''}", in_order, heads
    elif kv > 1:
        groups = [("q", kv, group * unit), ("k", kv, unit), ("v", kv, unit)]
        yield "q, k, v of each group", in_one_weight(path, groups, in_turn=True), kv


LAYOUTS = {1: _packed, 2: _two_layers, 3: _separate}  # by the number of layers


def _with_gates(
    structure: LayerMap, paths: tuple[str, ...], root: str, bare: Coupling, around: str
) -> Iterator[tuple[str, Coupling]]:
    """The coupling, and the coupling with a layer that gates the heads' outputs. It counts to the queries."""
    yield "", bare
    count, width = bare.main.count, bare.main.extent
    for path in structure.inside[around]:
        name, owner = name_and_owner(path)
        near = owner in (root, around) and path not in paths and path != bare.main.path
        if near and OUTPUT_GATE.search(name) and structure.outputs[path] in (count, width):
            gate = Projection("q", path, count, structure.outputs[path] // count, 0)
            yield f", gate {structure.pattern(path)}", replace(bare, producers=(*bare.producers, gate))


# ---- experts whose weights are one parameter with three dimensions for all of them -----------------------------

# Parameters of a module: the one whose outputs are the channels, and the one whose inputs are.
PAIRS = (("gate_up_proj", "down_proj"), ("up_proj", "down_proj"), ("input_linear.weight", "output_linear.weight"))


def stack_blocks(structure: LayerMap) -> Iterator[Block]:
    """Propose couplings for every module with the stacked weights of experts that S²FT can run."""
    for path, module in structure.modules.items():
        for up, down in PAIRS:
            first, last = _stack(module, up), _stack(module, down)
            if first is None or last is None or not _runs(module, up) or f"{path}.{up}" in structure.shared:
                continue
            proposals = tuple(_stack_proposals(structure, path, up, down, first, last))
            if proposals:
                yield Block(f"experts of {structure.pattern(path)} ({type(module).__name__})", proposals)
            break


def _stack(module: nn.Module, name: str) -> Tensor | None:
    """A parameter with three dimensions by its name in a module, or None."""
    found = get(module, name)
    return found if isinstance(found, nn.Parameter) and len(full_shape(found)) == 3 else None


def _runs(module: nn.Module, up: str) -> bool:
    """Whether S²FT has a forward for the module of the experts."""
    try:
        forward_of(module if "." not in up else module.get_submodule(up.partition(".")[0]))
    except ValueError:
        return False
    return True


def _stack_proposals(
    structure: LayerMap, path: str, up: str, down: str, first: Tensor, last: Tensor
) -> Iterator[Proposal]:
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


def stacked_weights(structure: LayerMap) -> Iterator[str]:
    """Iterate over the paths of the parameters that are stacked weights of experts."""
    for path, module in structure.modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            if f"{path}.{name}" in structure.shared:
                continue
            if len(full_shape(parameter)) == 3 and (
                "expert" in f"{path}.{name}".lower() or "Expert" in type(module).__name__
            ):
                yield f"{path}.{name}"


# ---- feed-forward blocks: by the sizes of their layers and the order in which they run -------------------------

GATE = re.compile(r"gate|(^|[._])w1$|w_0$|wi_0$|linear_1$|fc1_g$|act_fn", re.I)
SHARED = re.compile(r"shared_?(expert|mlp)")
DEEP = 2  # modules between the block and its layers


def ffn_blocks(structure: LayerMap) -> Iterator[Block]:
    """Propose couplings for every pair or triple of layers whose sizes fit and that run one after the other.

    Layers of a block that is not refused are taken: no other block is proposed for them.
    """
    for down in sorted(structure.layers, key=structure.place.__getitem__, reverse=True):  # consumers run last
        if down in structure.taken or not may_be_coupled(structure, down):
            continue
        found = _find_ups(structure, down)
        if found is None:
            continue
        around, ups = found
        proposals = tuple(_ffn_proposals(structure, around, ups, down))
        names = ", ".join(dict.fromkeys(map(structure.pattern, (*ups, down))))
        block = Block(f"ffn of {names} ({type(structure.modules[around]).__name__})", proposals)
        if block.key not in structure.refused:
            structure.taken.update(projection.path for projection in proposals[0].couplings[0].projections)
        yield block


def may_be_coupled(structure: LayerMap, path: str) -> bool:
    """Whether a layer is one of a block or a projector, and no head or router. Models that are no transformers' own
    stacks, such as an nn.Sequential, count as one block.
    """
    if NO_BLOCK_LAYER.search(path):
        return False
    named = hasattr(structure.model, "config") and hasattr(structure.model, "main_input_name")
    return not named or bool(structure.block_of(path)) or bool(PROJECTOR.search(path))


def _find_ups(structure: LayerMap, down: str) -> tuple[str, list[str]] | None:
    """The path of the module around `down` and the layers in it whose outputs may be the inputs of `down`."""
    around = down
    for _ in range(DEEP):
        if not around:
            break
        around = parent_of(around)
        if isinstance(structure.modules[around], nn.ModuleList):
            continue
        near = [
            path
            for path in structure.inside[around]
            if path not in structure.taken
            and structure.block_of(path) == structure.block_of(down)
            and structure.place[path] < structure.place[down]
            and structure.is_called(path) == structure.is_called(down)
            and may_be_coupled(structure, path)
        ]
        channels, width = structure.inputs[down], structure.outputs[down]
        for count, fits in product(
            (channels, 2 * channels), (True, False)
        ):  # inputs of the size of down's outputs first
            ups = [p for p in near if structure.outputs[p] == count and (structure.inputs[p] == width or not fits)]
            if ups:  # those that run last with the same inputs: an up and a gate, or a single layer
                ups.sort(key=structure.place.__getitem__)
                return around, [p for p in ups if structure.inputs[p] == structure.inputs[ups[-1]]][-2:]
    return None


def _ffn_proposals(structure: LayerMap, around: str, ups: list[str], down: str) -> Iterator[Proposal]:
    channels = structure.inputs[down]
    kind = "shared-expert" if SHARED.search(down) else "experts" if ".experts." in down else "ffn"
    consumer = Projection("d", down, channels, 1, 1)
    for word, producers in _sides(structure, around, ups, channels):
        bare = Coupling(kind, structure.layer_number(down), producers, consumer)
        for moving, vectors in vector_choices(structure, (around,), bare):
            yield Proposal(f"{word}{moving}", (replace(bare, vectors=vectors),))


def _sides(
    structure: LayerMap, around: str, ups: list[str], channels: int
) -> Iterator[tuple[str, tuple[Projection, ...]]]:
    """The producers that the layers may be, with words for them: up and gate, one layer with both, or a single one."""
    if structure.outputs[ups[-1]] == 2 * channels:
        for path in reversed(ups):
            for words, in_turn in (("gate, then up in", False), ("gate and up in turn in", True)):
                sides = in_one_weight(path, [("g", channels, 1), ("u", channels, 1)], in_turn)[::-1]
                yield f"{words} {structure.pattern(path)}", sides
        return
    if len(ups) == 2:
        gated = next((path for path in ups if GATE.search(path[len(around) :])), ups[0])
        up = next(path for path in ups if path != gated)
        pair = Projection("u", up, channels, 1, 0), Projection("g", gated, channels, 1, 0)
        yield f"up {structure.pattern(up)}, gate {structure.pattern(gated)}", pair
    for path in reversed(ups):
        yield f"up {structure.pattern(path)}", (Projection("u", path, channels, 1, 0),)
