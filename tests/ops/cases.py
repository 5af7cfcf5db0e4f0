"""One table of calls of the ops, on which the tests of every op run."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from support.inside import ACTIVATIONS
from torch import Tensor

from s2ft import ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REGISTERED = torch.ops.s2ft


def same(value):
    return value


class Case:
    """An op with its arguments.

    Attributes:
        run: Calls the op with the tensors.
        definition: Does the same with operators of PyTorch.
        tensors: The arguments that are tensors.
        changed: How many of the first tensors the op changes in place.
        is_exact: Whether the op has the bits of the definition.
        registered: The ops that PyTorch sees behind the call, with their arguments.
    """

    def __init__(self, run, definition, tensors, registered, changed=0, is_exact=True):
        self.run, self.definition, self.tensors, self.registered = run, definition, tensors, registered
        self.changed, self.is_exact = changed, is_exact

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self.tensors if tensor.requires_grad]

    def call(self, *leaves: Tensor) -> Tensor:
        """Call the op with other leaves."""
        given = iter(leaves)
        return self.run(*(next(given) if tensor.requires_grad else tensor for tensor in self.tensors))

    def results(
        self, run: Callable | None = None, device: str = "cpu", lay: Callable = same, within=None
    ) -> list[Tensor]:
        """Call the op, or another function, on copies: its results, the changed tensors and the gradients of the leaves.

        No other tensor may have changed. `within` is a context for forward and backward.
        """
        inputs = [lay(tensor.detach().to(device, copy=True)) for tensor in self.tensors]
        wanted = [tensor.requires_grad_() for tensor, own in zip(inputs, self.tensors) if own.requires_grad]
        with within or nullcontext():
            out = (run or self.run)(*inputs)
            grads = torch.autograd.grad(out, wanted, upstream_of(out)) if wanted else ()
        for tensor, own in zip(inputs[self.changed :], self.tensors[self.changed :]):
            assert torch.equal(tensor.cpu(), own)
        return [tensor.detach() for tensor in (*([] if out is None else [out]), *inputs[: self.changed], *grads)]


def upstream_of(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)


def trained(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def effective(weight: Tensor, delta: Tensor, index: Tensor, dim: int) -> Tensor:
    """The weight with the delta added to its units, differentiable in the delta."""
    base = weight.index_select(dim, index)
    return weight.index_copy(dim, index, (base + delta.view_as(base)).to(weight.dtype))


def linear(
    op, dim, shape=(7, 11, 2, 3), leading=(4, 3), bias=True, units=None, dtype=torch.float32, delta_dtype=None
) -> Case:
    """`shape` is outputs, inputs, first unit and number of units; `units` are other ones, by number."""
    outputs, inputs, start, count = shape
    start = min(start, (outputs, inputs)[dim] - count)
    index = torch.arange(start, start + count) if op is ops.sliced_linear else torch.tensor(units or ())
    if op is ops.indexed_linear and units is None:
        index = torch.randperm((outputs, inputs)[dim])[:count]
    count = len(index)
    x, weight = trained(*leading, inputs, dtype=dtype), torch.randn(outputs, inputs).to(dtype)
    delta = trained(*((count, inputs) if dim == 0 else (outputs, count)), dtype=delta_dtype or dtype)
    tensors = (x, weight, delta, index, *([trained(outputs, dtype=dtype)] if bias else ()))

    def run(x, weight, delta, index, bias=None):
        return op(x, weight, delta, start if op is ops.sliced_linear else index, dim, bias)

    def definition(x, weight, delta, index, bias=None):
        return F.linear(x, effective(weight, delta, index, dim), bias)

    units = (None, start) if op is ops.sliced_linear else (index, 0)
    kept, grad = trained(*leading, count, dtype=dtype), trained(*leading, outputs, dtype=dtype)
    registered = (
        ("sliced_linear", (x, weight, delta, *units, dim, tensors[4] if bias else None, kept if dim == 1 else None)),
        ("sliced_linear", (grad, weight.t(), delta.t(), *units, 1 - dim, None, kept if dim == 0 else None)),
    )
    return Case(run, definition, tensors, registered)


def bank(dim, leading=(4, 2), sizes=(3, 0, 1, 8), shape=(14, 10), names=(2, -1, 0, 3), dtype=torch.float32) -> Case:
    """`sizes` are the units of each adapter, `names` the adapter of each sequence; -1 is none."""
    outputs, inputs = shape
    index = [torch.randperm(shape[dim])[:count] for count in sizes]
    deltas = [torch.randn((len(i), inputs) if dim == 0 else (outputs, len(i))).to(dtype) for i in index]
    packed = ops.pack_adapters(list(zip(index, deltas)), dim)
    x, y = trained(*leading, inputs, dtype=dtype), trained(*leading, outputs, dtype=dtype)
    tensors = (x, y, *packed, torch.tensor(names, dtype=torch.int64))

    def definition(x, y, values, index, offsets, adapter):
        """One sequence at a time, with the full matrix."""
        ends, rows = offsets.tolist(), []
        for one, base, name in zip(x, y, adapter.tolist()):
            units = slice(ends[name], ends[name + 1]) if name >= 0 else slice(0)
            part = values[units] if dim == 0 else values[units].t()
            rows.append(base + F.linear(one, x.new_zeros(outputs, inputs).index_copy(dim, index[units], part)))
        return torch.stack(rows) if rows else y + x.sum()

    registered = (("multi_adapter_linear", (*tensors, dim)),)
    return Case(then_dim(ops.multi_adapter_linear, dim), definition, tensors, registered, is_exact=False)


def then_dim(op, dim):
    return lambda *tensors: op(*tensors, dim)


def activated(activation, shape=(7, 9), dtype=torch.float32) -> Case:
    gate, up, grad = (trained(*shape, dtype=dtype) for _ in range(3))
    registered = (
        ("act_mul", (gate, up, activation)),
        ("act_mul_backward", (grad.detach(), gate.detach(), up.detach(), activation)),
    )
    return Case(
        lambda gate, up: ops.act_mul(gate, up, activation),
        lambda gate, up: ACTIVATIONS[activation].function(gate) * up,
        (gate, up),
        registered,
        is_exact=False,
    )


def shape_of(shape, dim, count):
    return [*shape[:dim], count, *shape[dim + 1 :]]


def scattered(dim, shape=(10, 10), counts=(3, 2), alphas=(0.5, 2.0), dtype=torch.float32, delta_dtype=None) -> Case:
    """Deltas that share units. Each has its own place for the values that are replaced."""
    parts, delta_dtype = len(counts), delta_dtype or dtype
    index = [torch.randperm(shape[dim])[:count] for count in counts]
    deltas = [torch.randn(shape_of(shape, dim, len(i))).to(delta_dtype) for i in index]
    tensors = (torch.randn(shape).to(dtype), *(torch.zeros_like(d, dtype=dtype) for d in deltas), *index, *deltas)

    def split(tensors):
        return [list(tensors[i * parts : (i + 1) * parts]) for i in range(3)]

    def run(weight, *rest):
        replaced, index, deltas = split(rest)
        if parts == 1:  # one delta needs no lists
            ops.scatter_add_(weight, index[0], deltas[0], dim, alphas[0], replaced[0])
        else:
            ops.scatter_add_(weight, index, deltas, dim, alphas, replaced)

    def definition(weight, *rest):
        """All deltas are added in the wider type, and the sum is rounded once."""
        wide = torch.promote_types(torch.promote_types(dtype, delta_dtype), torch.float32)
        total, base = weight.to(wide), weight.clone()
        for old, i, delta, alpha in zip(*split(rest), alphas):
            total = total.index_copy(dim, i, total.index_select(dim, i) + alpha * delta.to(wide))
            old.copy_(base.index_select(dim, i))
        weight.copy_(total)

    replaced, *_ = split(tensors[1:])
    registered = (("scatter_add_", (tensors[0], index, deltas, dim, list(alphas), replaced)),)
    return Case(run, definition, tensors, registered, changed=1 + parts)


def swapped(dim, shape=(10, 10), count=3, dtype=torch.float32) -> Case:
    index = torch.randperm(shape[dim])[:count]
    weight, values = torch.randn(shape).to(dtype), torch.randn(shape_of(shape, dim, count)).to(dtype)

    def definition(weight, values, index):
        old = weight.index_select(dim, index)
        weight.index_copy_(dim, index, values)
        values.copy_(old)

    return Case(
        lambda weight, values, index: ops.swap_(weight, index, values, dim),
        definition,
        (weight, values, index),
        (("swap_", (weight, index, values, dim)),),
        changed=2,
    )


def written(dim, shape=(10, 10), count=3, dtype=torch.float32, delta_dtype=None) -> Case:
    """A slice of one weight and scattered units of another."""
    index, start = torch.randperm(shape[dim])[:count], shape[dim] - count
    weights = [torch.randn(shape).to(dtype) for _ in range(2)]
    bases = [torch.randn(shape_of(shape, dim, count)).to(dtype) for _ in range(2)]
    deltas = [torch.randn(base.shape).to(delta_dtype or dtype) for base in bases]

    def run(*tensors):
        both = zip(tensors[:2], tensors[2:4], tensors[4:6], (start, tensors[6]))
        ops.write_slices_([ops.Slice(*one, dim) for one in both])

    def definition(*tensors):
        for weight, base, delta, units in zip(
            tensors, tensors[2:4], tensors[4:6], (torch.arange(start, start + count), tensors[6])
        ):
            weight.index_copy_(dim, units, (base + delta).to(dtype))

    registered = (("write_slices_", (weights, bases, deltas, [None, index], [start, 0], [dim, dim])),)
    return Case(run, definition, (*weights, *bases, *deltas, index), registered, changed=2)


def permuted(dim, shape=(9, 7), share=1.0, dtype=torch.float32) -> Case:
    """`share` of the units move."""
    weight, order = torch.randn(shape).to(dtype), torch.arange(shape[dim])
    moved = torch.randperm(shape[dim])[: int(share * shape[dim])]
    order[moved] = moved.roll(1)

    def definition(weight, order):
        weight.copy_(weight.index_select(dim, order))

    registered = (("permute_", (weight, order, dim)),)
    return Case(then_dim(ops.permute_, dim), definition, (weight, order), registered, changed=1)


LINEAR = {
    f"{op.__name__} {dim}": partial(linear, op, dim) for op in (ops.sliced_linear, ops.indexed_linear) for dim in (0, 1)
}
MOVES = {
    **{f"scatter_add_ {dim}": partial(scattered, dim) for dim in (0, 1)},
    **{f"swap_ {dim}": partial(swapped, dim) for dim in (0, 1)},
    **{f"permute_ {dim}": partial(permuted, dim) for dim in (0, 1)},
}
TRAINED = LINEAR  # ops with a delta
SUMS = {
    **{f"multi_adapter_linear {dim}": partial(bank, dim) for dim in (0, 1)},
    **{f"act_mul {name}": partial(activated, name) for name in ACTIVATIONS},
}
DIFFERENTIABLE = {**TRAINED, **SUMS}
WRITES = {f"write_slices_ {dim}": partial(written, dim) for dim in (0, 1)}  # change no version of the weights
SMALL = {**DIFFERENTIABLE, **MOVES, **WRITES}  # every op, once for each dim

MOVED_DIMS = [
    (shape, dim)
    for shape in ((7,), (1, 1), (13, 9), (3, 5, 4), (0, 3), (70, 130), (3, 5000))
    for dim in range(len(shape))
]
OTHER = {
    # odd sizes, one unit, all units, the last unit; every number of leading dimensions
    **{
        f"{name} {shape} {leading} {bias}": partial(make, shape=shape, leading=leading, bias=bias)
        for name, make in LINEAR.items()
        for shape in ((7, 11, 2, 3), (16, 32, 0, 1), (8, 8, 0, 8), (33, 17, 16, 1))
        for leading, bias in (((), True), ((1,), False), ((5,), True), ((2, 1, 3), False), ((0,), True), ((2, 0), False))
    },
    # heads are runs of neighbouring units: long and short, adjacent and apart, in any order
    **{
        f"indexed_linear {dim} runs": partial(
            linear,
            ops.indexed_linear,
            dim,
            (120, 120, 0, 91),
            units=[*range(80, 112), *range(16), *range(16, 48), *range(50, 59), 49, 113],
        )
        for dim in (0, 1)
    },
    # the last is divided among threads
    **{f"act_mul {name} {shape}": partial(activated, name, shape) for name in ACTIVATIONS for shape in ((), (0,), (17,), (129, 257))},
    # decode, packed tokens, one adapter for many tokens, empty; widths are vectors, remainders and blocks
    **{
        f"multi_adapter_linear {dim} {leading} {width}": partial(
            bank, dim, leading, (150, 2, 5), (200, width) if dim == 0 else (width, 200), names[: leading[0]]
        )
        for dim in (0, 1)
        for names in ((0, 0, 0, 0, 0, 1, 1, 1, 2, 2, -1),)
        for leading, width in (
            *(((11,), width) for width in (1, 15, 16, 64, 65, 130, 4097)),
            *((leading, 37) for leading in ((7, 1), (2, 70), (3, 2, 2), (0, 4), (4, 0))),
        )
    },
    # so many units that each sequence gathers its own
    **{f"multi_adapter_linear {dim} {leading} 40": partial(bank, dim, leading, (30,) * 40, (53, 37), (39, 7, -1)[: leading[0]])
       for dim in (0, 1) for leading in ((3,), (2, 300))},
    **{
        f"scatter_add_ {shape} {dim} {len(alphas)}": partial(
            scattered, dim, shape, (shape[dim], shape[dim] // 2, 0, shape[dim])[: len(alphas)], alphas
        )
        for shape, dim in MOVED_DIMS
        for alphas in ((-0.3,), (0.7, -1.1, 5.0, 1 / 3))
    },
    **{
        f"swap_ {shape} {dim} {count}": partial(swapped, dim, shape, count)
        for shape, dim in MOVED_DIMS
        for count in sorted({0, (shape[dim] + 1) // 2, shape[dim]})
    },
    # one unit, all of them, so many that threads share them; runs of neighbouring columns are in the CUDA kernel's tests
    **{
        f"write_slices_ {shape} {dim} {count}": partial(written, dim, shape, count)
        for shape in ((1, 1), (13, 9), (70, 130), (3, 5000), (900, 700))
        for dim in (0, 1)
        for count in sorted({0, 1, (shape[dim] + 1) // 2, shape[dim]})
    },
    # kernels use different code if few, some or nearly all units move
    **{f"permute_ {shape} {dim} {share}": partial(permuted, dim, shape, share)
       for shape, dim in (*MOVED_DIMS, ((3, 200, 5), 1), ((2, 66_000), 1)) for share in (0.03, 0.06, 0.3, 0.9, 1)},
}  # fmt: skip
ALL = {**SMALL, **OTHER}


# ---- the activations in float64: a value and its slope, without cancellation ------------------------------------------


def silu(g):
    return g * torch.sigmoid(g), torch.sigmoid(g) * (1 + g * torch.sigmoid(-g))


def gelu(g):
    cdf = 0.5 * torch.erfc(-g / math.sqrt(2))
    return g * cdf, cdf + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)


def gelu_tanh(g):
    u = 2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
    slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * g * g)
    return g * torch.sigmoid(u), torch.sigmoid(u) * (1 + g * torch.sigmoid(-u) * slope)


def relu(g):
    return torch.where(g > 0, g, 0.0), torch.where(g > 0, 1.0, 0.0).double()


TRUTH = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}
