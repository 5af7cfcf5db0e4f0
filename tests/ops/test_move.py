"""permute_, swap_ and scatter_add_, which change a weight in place. test_every_op.py has the common hazards."""

import subprocess
import sys

import pytest
import torch
from ops.cases import MOVES
from support.inside import check_distinct
from torch.utils._python_dispatch import TorchDispatchMode

from s2ft import build_info
from s2ft.ops import scatter_add_


def test_scatter_add_without_a_place_for_the_old_values():
    weight, other, index, delta = torch.zeros(4, 2), torch.zeros(4, 2), torch.tensor([1, 3]), torch.randn(2, 2)
    scatter_add_(weight, index, delta, 0, 0.5)
    scatter_add_(other, [index], [delta], 0, [0.5], [torch.zeros(2, 2)])
    assert weight.any() and torch.equal(weight, other)


def test_scatter_add_accepts_deltas_of_several_dtypes():
    weight = torch.zeros(4, 2)
    scatter_add_(
        weight,
        [torch.tensor([1]), torch.tensor([1, 3])],
        [torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(2, 2, dtype=torch.float64)],
        0,
        (1, 2),
    )
    assert weight.tolist() == [[0, 0], [3, 3], [0, 0], [2, 2]]


GROWTH = """
import resource, torch
from s2ft.ops import permute_
weight = torch.zeros(4096, 8192, dtype=torch.bfloat16)   # 64 MiB
order = torch.randperm(8192)
permute_(weight[:2], order, 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for dim in (0, 1):
    permute_(weight, order[: weight.shape[dim]].argsort(), dim)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(not build_info()["ops"]["permute_"], reason="the reference copies the units that move")
def test_permute_makes_no_second_matrix():
    run = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert float(run.stdout.splitlines()[-1]) < 4  # MiB


@pytest.mark.parametrize("name", MOVES)
def test_backward_raises_if_the_weight_was_changed(name):
    case, x = MOVES[name](), torch.randn(3, requires_grad=True)
    y = case.tensors[0][:3, :3] @ x
    case.run(*case.tensors)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class NoSingleNumbers(TorchDispatchMode):
    """Fails if code reads a single number of a tensor. On a GPU each such read waits for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ != "_local_scalar_dense"
        return function(*args, **(kwargs or {}))


def test_checking_an_index_does_not_read_its_numbers_one_by_one():
    with NoSingleNumbers():
        check_distinct("op", torch.randperm(9), 9)
