"""Ops write to weights, so they refuse memory that is read-only or shared with other processes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from support.inside import LOCK, check_private

ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


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
