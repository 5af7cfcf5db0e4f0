"""Proposes couplings of attention blocks, by the names of their layers and the number of their heads."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from s2ft.model.coupling import Coupling, Projection
from s2ft.model.discovery.proposal import Block, Proposal, vector_choices
from s2ft.model.discovery.structure import Structure, name_and_owner, parent_of

QUERIES = ("query", "queries", "q")  # in this order: "q" is also the first letter of other words
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


@dataclass(frozen=True)
class Inputs:
    """The layers that compute queries, keys and values: three, or q and kv, or one for all.

    Attributes:
        paths: Their paths, in the order q, k, v.
        root: Path of the module that has them.
    """

    paths: tuple[str, ...]
    root: str


def attention_blocks(structure: Structure) -> Iterator[Block]:
    """Propose couplings for every attention block that has layers with known names."""
    for inputs in _all_inputs(structure):
        if structure.taken.intersection(inputs.paths):
            continue
        for around in dict.fromkeys((inputs.root, parent_of(inputs.root))):
            outs = [path for path in structure.inside(around) if _may_be_out(structure, inputs, path)]
            outs.sort(key=structure.place.get)
            proposals = [one for out in outs for one in _proposals(structure, inputs, out, around)]
            if proposals:
                kinds = type(structure.modules[inputs.root]).__name__, type(structure.modules[around]).__name__
                own = (name for name, _ in structure.modules[inputs.root].named_parameters(recurse=False))
                names = ", ".join([*map(structure.pattern, inputs.paths), *own])  # some blocks of a stack have sinks
                # Many heads first: halves of heads can't move, but pairs of heads can where single heads can.
                proposals.sort(key=lambda proposal: -proposal.couplings[0].consumer.count)
                yield Block(f"attention of {names} ({', '.join(kinds)})", tuple(proposals))
                break


# ---- which layers ------------------------------------------------------------------------------------------------


def _all_inputs(structure: Structure) -> Iterator[Inputs]:
    by_owner: dict[str, dict[str, str]] = {}
    for path in structure.layers:
        name, owner = name_and_owner(path)
        by_owner.setdefault(owner, {}).setdefault(name, path)
    for owner, here in by_owner.items():
        yield from (Inputs(paths, owner) for paths in _inputs_of(here))


def _inputs_of(here: dict[str, str]) -> Iterator[tuple[str, ...]]:
    """The paths of q, k and v among the layers of one module, by name."""
    found = False
    for name in here:
        for query in QUERIES:
            key, value = (_renamed(name, query, to) for to in KEY_AND_VALUE[query])
            if key != name and key in here and value in here:
                found = True
                yield here[name], here[key], here[value]
                break
    if found:
        return
    queries = [name for name in here if ONE_Q.search(name)]
    for name in queries:
        others = [other for other in here if other != name and ONE_KV.search(other)]
        yield from ((here[name], here[other]) for other in others[:1])
    if not queries:
        yield from ((here[name],) for name in here if ONE_QKV.search(name))


def _renamed(name: str, query: str, to: str) -> str:
    """The name with the word for the queries replaced: q_proj to k_proj, wq to wk, in_proj_q to in_proj_k."""
    return re.sub(rf"(^|(?<=[_.])|(?<=^w)|(?<=^W)){query}(?![a-z])", to, name, flags=re.I)


def _may_be_out(structure: Structure, inputs: Inputs, path: str) -> bool:
    names = name_and_owner(path)[0], path.rpartition(".")[2]
    free = path not in structure.taken and path not in inputs.paths
    return free and any(OUT.search(name) for name in names)


# ---- which units -------------------------------------------------------------------------------------------------


def _proposals(structure: Structure, inputs: Inputs, out: str, around: str) -> Iterator[Proposal]:
    kind = "cross-attention" if CROSS.search(inputs.paths[0]) else "attention"
    number = structure.layer_number(out)
    name = structure.pattern(out)
    for source, heads in _head_counts(structure, inputs, out, around):
        if heads < 1 or structure.inputs(out) % heads:
            continue
        for layout, producers, count in _layouts(structure, inputs, out, heads):
            bare = Coupling(kind, number, producers, Projection("o", out, count, structure.inputs(out) // count, 1))
            for gate, gated in _with_gates(structure, inputs, bare, around):
                for moving, vectors in vector_choices(structure, (inputs.root, around), gated):
                    label = f"{name}, heads from {source}, {layout}{gate}{moving}"
                    yield Proposal(label, (replace(gated, vectors=vectors),))


def _head_counts(structure: Structure, inputs: Inputs, out: str, around: str) -> Iterator[tuple[str, int]]:
    """Numbers of heads with where they come from: attributes of the modules, else the config, else every divisor."""
    width = structure.inputs(out)
    for places in ({"block": inputs.root, "block around": around}, {"model": ""}):
        found = []
        for word, path in places.items():
            module = structure.modules[path]
            config = getattr(module, "config", None)
            owners = {word: module, f"{word}.config": config, f"{word}.text": getattr(config, "text_config", None)}
            for source, owner in owners.items():
                found += _counts_of(owner, source, width)
        if found:
            yield from found
            return
    divisors = [size for size in range(1, width) if width % size == 0]
    yield from ((f"divisor {i}", width // size) for i, size in enumerate(divisors))


def _counts_of(owner: Any, source: str, width: int) -> Iterator[tuple[str, int]]:
    for name in HEADS:
        if (count := _count(owner, name)) is not None:
            yield f"{source}.{name}", count
    for name in HEAD_SIZES:
        if (size := _count(owner, name)) is not None and width % size == 0:
            yield f"{source}.{name}", width // size


def _count(owner: Any, name: str) -> int | None:
    try:
        value = getattr(owner, name, None)
    except Exception:  # configs whose layers differ refuse to name one number for all
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _layouts(
    structure: Structure, inputs: Inputs, out: str, heads: int
) -> Iterator[tuple[str, tuple[Projection, ...], int]]:
    """Ways in which layers with these sizes may hold q, k and v: a word, the projections, the number of units of o."""
    sizes = [structure.outputs(path) for path in inputs.paths]
    unit = structure.inputs(out) // heads  # of a head's values
    layouts = {1: _packed, 2: _two_layers, 3: _separate}[len(sizes)]
    yield from layouts(inputs.paths, sizes, heads, unit)


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
        k = Projection("k", path, kv, unit, 0, size=size)
        yield "k, then v", (q, k, replace(k, key="v", start=size // 2)), heads
    key = size // heads - unit
    if size % heads == 0 and key > 0:
        k = Projection("k", path, heads, key, 0, stride=key + unit, size=size)
        v = Projection("v", path, heads, unit, 0, start=key, stride=key + unit, size=size)
        yield "k and v of each head", (q, k, v), heads


def _packed(paths: tuple[str, ...], sizes: list[int], heads: int, unit: int) -> Iterator[tuple]:
    """One layer: all of q, k and v one after the other; or in turn for each head, or for each group of heads."""
    (path,), (size,) = paths, sizes
    rest = size // unit - heads
    if size % unit or rest <= 0 or rest % 2 or heads % (rest // 2):
        return
    kv, group = rest // 2, heads // (rest // 2)

    def part(key: str, count: int, width: int, start: int, stride: int | None = None) -> Projection:
        return Projection(key, path, count, width, 0, start=start, stride=stride, size=size)

    keys = part("k", kv, unit, heads * unit), part("v", kv, unit, (heads + kv) * unit)
    yield "q, k, v", (part("q", heads, unit, 0), *keys), heads
    if heads == kv:
        orders = {"q, k, v of each head": "qkv", "q, v, k of each head": "qvk", "k, q, v of each head": "kqv"}
        for word, order in orders.items():
            parts = {key: part(key, heads, unit, order.index(key) * unit, 3 * unit) for key in "qkv"}
            yield word, tuple(parts.values()), heads
        for word, order in {"q, v, k": "qvk", "k, q, v": "kqv"}.items():
            parts = {key: part(key, heads, unit, order.index(key) * heads * unit) for key in "qkv"}
            yield word, tuple(parts.values()), heads
    elif kv > 1:
        stride = (group + 2) * unit
        q = part("q", kv, group * unit, 0, stride)
        k, v = part("k", kv, unit, group * unit, stride), part("v", kv, unit, (group + 1) * unit, stride)
        yield "q, k, v of each group", (q, k, v), kv


def _with_gates(structure: Structure, inputs: Inputs, bare: Coupling, around: str) -> Iterator[tuple[str, Coupling]]:
    """The coupling, and the coupling with a layer that gates the heads' outputs. It counts to the queries."""
    yield "", bare
    count, width = bare.consumer.count, bare.consumer.extent
    for path in structure.inside(around):
        name, owner = name_and_owner(path)
        near = owner in (inputs.root, around) and path not in inputs.paths and path != bare.consumer.path
        if near and OUTPUT_GATE.search(name) and structure.outputs(path) in (count, width):
            gate = Projection("q", path, count, structure.outputs(path) // count, 0)
            yield f", gate {structure.pattern(path)}", replace(bare, producers=(*bare.producers, gate))
