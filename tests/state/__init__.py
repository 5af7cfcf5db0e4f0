"""Tests that s2ft changes nothing silently: random sequences of operations, interrupts, and other readers.

The folder is a package so that ``python -m tests.state.machine`` and pytest run the same modules. With
``S2FT_TEST_KERNELS=reference`` the compiled kernels are hidden, so that the PyTorch reference serves every op.
"""

import importlib.abc
import os
import sys
import warnings
from pathlib import Path

TESTS = str(Path(__file__).parents[1])
if TESTS not in sys.path:  # pytest has added it already
    sys.path.insert(0, TESTS)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
REFERENCE = os.environ.get("S2FT_TEST_KERNELS") == "reference"


class _HideKernels(importlib.abc.MetaPathFinder):
    """Make ``import s2ft._C`` fail as if the file did not exist."""

    def find_spec(self, name, path=None, target=None):
        if name == "s2ft._C":
            raise ModuleNotFoundError("No module named 's2ft._C': hidden by the tests", name=name)
        return None


# By name: with `python -m tests.state.machine` this file runs as tests.state and again as state.
if REFERENCE and not any(type(finder).__name__ == "_HideKernels" for finder in sys.meta_path):
    if "s2ft" in sys.modules:
        raise RuntimeError("S2FT_TEST_KERNELS=reference must be seen before s2ft is imported: run these tests alone")
    sys.meta_path.insert(0, _HideKernels())
    warnings.filterwarnings("ignore", message="s2ft: the compiled kernels", category=RuntimeWarning)
