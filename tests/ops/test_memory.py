"""Ops write to weights, so they refuse memory that is read-only or shared with other processes."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import s2ft
from s2ft import S2ColumnLinear, S2RowLinear
from s2ft.ops import _linear, permute_, scatter_add_, sliced_linear, swap_
from s2ft.ops._lock import LOCK
from s2ft.ops._memory import check_private

ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def read_only(tmp_path):
    np.random.default_rng(0).random((8, 8), np.float32).tofile(tmp_path / "weight")
    return torch.from_numpy(np.memmap(tmp_path / "weight", np.float32, "r", shape=(8, 8)))


@ON_LINUX
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize(
    "op",
    [
        lambda w: sliced_linear(torch.ones(2, 8), w, torch.ones(8, 2), 0, 1),
        lambda w: _linear.reference(torch.ones(2, 8), w, torch.ones(8, 2), 0, 1, None, None),
        lambda w: permute_(w, torch.arange(8).flip(0), 0),
        lambda w: swap_(w, torch.arange(2), torch.ones(8, 2), 1),
        lambda w: scatter_add_(w, torch.arange(2), torch.ones(8, 2), 1),
    ],
    ids=("sliced_linear", "reference", "permute_", "swap_", "scatter_add_"),
)
def test_a_read_only_weight_raises_instead_of_crashing(op, read_only):
    with pytest.raises(ValueError, match="read-only memory"):
        op(read_only)


@ON_LINUX
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_layer_refuses_read_only_memory(read_only):
    linear = torch.nn.Linear(8, 8, bias=False)
    linear.weight = torch.nn.Parameter(read_only, requires_grad=False)
    with pytest.raises(ValueError, match="weight is in read-only memory"):
        S2RowLinear.from_module(linear, 0, 2)


@pytest.mark.parametrize("kind", (S2RowLinear, S2ColumnLinear))
def test_a_layer_in_shared_memory_is_refused_before_it_writes(kind):
    layer = kind(8, 8, start=0, end=2)
    layer.s2.data.normal_()
    layer(torch.ones(1, 8))
    base = layer.weight.detach().clone()
    layer.share_memory()
    with pytest.raises(ValueError, match="shared with other processes"):
        layer(torch.ones(1, 8))
    assert torch.equal(layer.weight, base)


@ON_LINUX
def test_a_file_mapped_for_writing_is_shared(tmp_path):
    np.zeros((8, 8), np.float32).tofile(tmp_path / "weight")
    for mode, is_private in (("r+", False), ("c", True)):
        weight = torch.from_numpy(np.memmap(tmp_path / "weight", np.float32, mode, shape=(8, 8)))
        if is_private:
            check_private("weight", weight)
        else:
            with pytest.raises(ValueError, match=f"shared with other processes .*{tmp_path.name}"):
                check_private("weight", weight)


def test_ops_of_other_threads_wait_for_the_end_of_stable_weights():
    layer, x = S2RowLinear(64, 64, start=0, end=8), torch.ones(2, 64)
    layer.s2.data.normal_()
    base, done = layer.weight.detach().clone(), threading.Event()

    def run():
        layer(x)
        done.set()

    with s2ft.stable_weights():
        thread = threading.Thread(target=run)
        thread.start()
        assert not done.wait(0.05)
        with s2ft.stable_weights():
            layer(x)  # the thread that holds the lock does not wait for itself
        assert torch.equal(layer.weight, base)
        assert not done.is_set()
    thread.join(10)
    assert done.is_set()


def test_only_the_owner_can_release_the_lock():
    with pytest.raises(RuntimeError):
        LOCK.release()


INTERRUPTED = """
import sys
sys.modules["s2ft._C"] = None   # the references run
import warnings; warnings.simplefilter("ignore")
import torch
from s2ft.ops import _effective
from s2ft import S2RowLinear
layer, x = S2RowLinear(8, 8, start=0, end=2), torch.ones(1, 8)
layer.s2.data.normal_()
base, write = layer.weight.detach().clone(), _effective._write
for hits in ((1,), (2,), (1, 2), (2, 3)):   # which writes are interrupted, before or after they happen
    for after in (False, True):
        calls = 0
        def interrupted(*args):
            global calls
            calls += 1
            if after:
                write(*args)
            if calls in hits:
                raise KeyboardInterrupt
            if not after:
                write(*args)
        _effective._write = interrupted
        try:
            layer(x)
        except KeyboardInterrupt:
            pass
        _effective._write = write
        y = layer(x)   # the next operation finishes what was left
        assert torch.equal(layer.weight, base), (hits, after)
print("base back")
"""


def test_the_base_is_restored_after_an_interrupt_of_the_reference():
    ran = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120)
    assert ran.stdout == "base back\n", ran.stderr
