"""Bad arguments of every op: an error with the words that help, from the kernel and from the reference, and no change."""

from contextlib import nullcontext

import pytest
import torch
from support.waits import References

from s2ft import ops


def ones(*shape, dtype=torch.float32, trains=False):
    return torch.ones(shape, dtype=dtype, requires_grad=trains)


def linear():
    return dict(x=ones(2, 6), weight=ones(4, 6), delta=ones(2, 6), dim=0)


def columns():
    """With dim 1 and a trained delta, the selected columns of x are copied before the op checks its arguments."""
    return dict(x=ones(2, 6), weight=ones(4, 6), delta=ones(4, 2, trains=True), dim=1)


def experts(trains):
    offsets = torch.tensor([1, 3], dtype=torch.int32)
    index = torch.tensor([0, 6])
    return dict(
        x=ones(3, 5), weight=ones(2, 6, 5), delta=ones(2, 5, trains=trains), index=index, offsets=offsets, dim=0
    )


def bank():
    sizes = (3, 0, 1, 8, 17)
    return dict(x=ones(2, 37), y=ones(2, 53), adapter=torch.tensor([0, 4]), dim=1) | dict(
        zip(("values", "index", "offsets"), ops.pack_adapters([(torch.arange(n), ones(53, n)) for n in sizes], 1))
    )


def write(**one):
    ops.write_slices_([ops.Slice(**one)])


def moved(**more):
    return dict(weight=torch.arange(24.0).view(4, 6), dim=0) | more


INDEX = torch.tensor([0, 1])
GOOD = {
    "sliced": (ops.sliced_linear, lambda: linear() | dict(start=0)),
    "indexed": (ops.indexed_linear, lambda: linear() | dict(index=INDEX)),
    "sliced columns": (ops.sliced_linear, lambda: columns() | dict(start=0)),
    "indexed columns": (ops.indexed_linear, lambda: columns() | dict(index=INDEX)),
    "bank": (ops.multi_adapter_linear, bank),
    "pack": (ops.pack_adapters, lambda: dict(deltas=[(torch.arange(4), ones(5, 4))], dim=1)),
    "swap": (ops.swap_, lambda: moved(index=INDEX, values=ones(2, 6))),
    "scatter": (ops.scatter_add_, lambda: moved(index=INDEX, delta=ones(2, 6))),
    "write": (write, lambda: moved(base=ones(2, 6), delta=ones(2, 6), units=1)),
    "write index": (write, lambda: moved(base=ones(2, 6), delta=ones(2, 6), units=INDEX)),
    "permute": (ops.permute_, lambda: moved(order=torch.arange(4))),
    "act_mul": (ops.act_mul, lambda: dict(gate=ones(2), up=ones(2), activation="silu")),
    "act_mul_backward": (
        torch.ops.s2ft.act_mul_backward,
        lambda: dict(grad=ones(2), gate=ones(2), up=ones(2), activation="silu"),
    ),
}
MIXED = (TypeError, "float32 bfloat16")
BAD = [
    ("sliced", dict(dim=2), "dim 0 2"),
    ("sliced", dict(start=-1), "slice -1:1"),
    ("sliced", dict(start=3), "slice 3:5 outside"),
    ("sliced", dict(x=ones(2, 5)), "x shape"),
    ("sliced", dict(delta=ones(2, 5)), "delta shape"),
    ("sliced", dict(bias=ones(6)), "bias (4,)"),
    ("sliced", dict(weight=ones(4, 6, dtype=torch.bfloat16)), *MIXED),
    ("indexed", dict(index=ones(2)), "index int64"),
    ("indexed", dict(index=torch.arange(3)), "index shape"),
    ("indexed", dict(index=torch.tensor([0, 4])), "index 4"),
    ("indexed", dict(index=torch.tensor([0, -1])), "index -1"),
    ("sliced columns", dict(start=-1), "slice -1:1 outside"),
    ("sliced columns", dict(start=5), "slice 5:7 outside"),
    ("sliced columns", dict(x=ones(2, 5)), "x shape"),
    ("sliced columns", dict(x=ones()), "x shape"),
    ("sliced columns", dict(delta=ones(2, trains=True)), "matri"),
    ("indexed columns", dict(index=ones(2)), "index int64"),
    ("indexed columns", dict(index=torch.arange(3)), "index shape"),
    ("indexed columns", dict(index=torch.tensor([0, 6])), "index 6"),
    ("indexed columns", dict(index=torch.tensor([0, -1])), "index -1"),
    ("bank", dict(adapter=torch.tensor([0, 5])), "adapter 5 -1..4"),
    ("bank", dict(adapter=torch.tensor([0, -2])), "adapter -2"),
    ("bank", dict(adapter=torch.tensor([0])), "adapter shape"),
    ("bank", dict(index=torch.full((29,), 99)), "index 99"),
    ("bank", dict(index=torch.full((29,), -1)), "index -1"),
    ("bank", dict(offsets=torch.tensor([0, 3, 3, 4, 12, 99])), "offsets 4 12 99"),
    ("bank", dict(offsets=torch.tensor([3, 0, 3, 4, 12, 29])), "offsets 0 3"),
    ("bank", dict(values=ones(29, 5)), "values shape"),
    ("bank", dict(y=ones(3, 53)), "shape"),
    ("bank", dict(dim=2), "dim 0 2"),
    ("bank", dict(values=ones(29, 53, trains=True)), "frozen"),
    ("bank", dict(x=ones(2, 37, dtype=torch.bfloat16)), *MIXED),
    ("pack", dict(deltas=[(torch.arange(3), ones(5, 4))]), "index (4,)"),
    ("swap", dict(dim=2), "dim"),
    ("swap", dict(index=torch.tensor([0, 4])), "index 4"),
    ("swap", dict(index=torch.tensor([-1, 0])), "index -1"),
    ("swap", dict(index=torch.tensor([1, 1])), "index 1 twice"),
    ("swap", dict(index=ones(2)), "index int64"),
    ("swap", dict(values=ones(6, 2)), "values"),
    ("swap", dict(values=ones(2, 6, dtype=torch.float64)), "values dtype"),
    ("write", dict(dim=2), "dim 2"),
    ("write", dict(weight=ones(4, 6, 2)), "matrix shape"),
    ("write", dict(units=3), "slice 3:5 outside"),
    ("write", dict(units=-1), "slice -1:1 outside"),
    ("write", dict(delta=ones(2, 5)), "delta shape"),
    ("write", dict(delta=ones(2)), "delta shape"),
    ("write", dict(base=ones(3, 6)), "base delta's shape"),
    ("write", dict(base=ones(2, 6, dtype=torch.float64)), "base dtype"),
    ("write index", dict(units=torch.tensor([0, 4])), "index 4"),
    ("write index", dict(units=torch.tensor([0, -1])), "index -1"),
    ("write index", dict(units=torch.arange(3)), "index shape"),
    ("scatter", dict(index=torch.tensor([0, 4])), "index 4"),
    ("scatter", dict(index=[INDEX[:1], torch.tensor([-1])], delta=[ones(1, 6), ones(1, 6)]), "index -1"),
    ("scatter", dict(index=torch.tensor([1, 1])), "index 1 twice"),
    ("scatter", dict(delta=ones(6, 2)), "delta"),
    ("scatter", dict(index=[INDEX], delta=[]), "number"),
    ("scatter", dict(alpha=[1, 2]), "number"),
    ("scatter", dict(replaced=ones(3, 6)), "replaced"),
    ("scatter", dict(replaced=ones(2, 6, dtype=torch.float64)), "replaced dtype"),
    ("permute", dict(order=torch.arange(3)), "order"),
    ("permute", dict(order=torch.tensor([0, 1, 1, 3])), "order 1 twice"),
    ("permute", dict(order=torch.tensor([0, 1, 2, 4])), "order 4"),
    ("permute", dict(dim=-1), "dim -1"),
    *(
        (op, change, words)
        for op in ("act_mul", "act_mul_backward")
        for change, words in (
            (dict(up=ones(3)), "up gate"),
            (dict(up=ones(2, dtype=torch.float64)), "up gate"),
            (dict(activation="tanh"), "activation silu gelu gelu_tanh relu 'tanh'"),
        )
    ),
    ("act_mul_backward", dict(grad=ones(3)), "grad gate"),
]


@pytest.mark.parametrize("by", (nullcontext, References))
@pytest.mark.parametrize("op, change, problem", [(op, change, problem) for op, change, *problem in BAD])
def test_bad_arguments(op, change, problem, by):
    function, good = GOOD[op]
    arguments = good() | change
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    before = [tensor.detach().clone() for tensor in tensors]
    error, words = problem if len(problem) == 2 else (ValueError, *problem)
    # from 2.15 on PyTorch makes a RuntimeError of a kernel's ValueError
    with by(), pytest.raises((error, *[RuntimeError] * (torch.__version__ >= "2.15"))) as caught:
        function(**arguments)
    assert all(word in str(caught.value) for word in words.split()), caught.value
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("op", GOOD)
def test_the_arguments_are_good_otherwise(op):
    function, good = GOOD[op]
    function(**good())
