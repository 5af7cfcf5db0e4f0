"""Ops write to weights, so they refuse memory that is read-only or shared with other processes."""

import sys

import numpy as np
import pytest
import torch
from support.inside import check_private


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_file_mapped_for_writing_is_shared(tmp_path):
    np.zeros((8, 8), np.float32).tofile(tmp_path / "weight")
    for mode, is_private in (("r+", False), ("c", True)):
        weight = torch.from_numpy(np.memmap(tmp_path / "weight", np.float32, mode, shape=(8, 8)))
        if is_private:
            check_private("weight", weight)
        else:
            with pytest.raises(ValueError, match=f"shared with other processes .*{tmp_path.name}"):
                check_private("weight", weight)
