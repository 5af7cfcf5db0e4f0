"""Shared by all tests: no network, few threads, fixed seeds.

S2FT_TEST_THREADS is the number of threads of PyTorch, one by default. S2FT_TEST_ROUNDING is any number: it makes every
product round differently by the layout of its operands and by this number (support/rounding.py).
"""

import gc
import os
import signal
import threading
from importlib.util import find_spec
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from support.rounding import set_up_kernels

set_up_kernels()
if threading.current_thread() is threading.main_thread():  # a shell lets its background processes ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    freeze()


def freeze():
    """Exclude present objects from garbage collection, because trainers and torch.compile collect often."""
    gc.collect()
    gc.freeze()


PACKAGES = {"vllm": "make test-vllm", "lm_eval": "make test-lm-eval", "deepspeed": "make test-deepspeed"}


def pytest_collection_modifyitems(items):
    for item in items:  # by marker: the names of folders are keywords too, also of one around the checkout
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))
        for package, remedy in PACKAGES.items():
            if item.get_closest_marker(package) and find_spec(package) is None:
                item.add_marker(pytest.mark.skip(reason=f"no {package}: {remedy}"))


@pytest.fixture(autouse=True, scope="module")
def modules_that_a_test_imported():
    """A test of many model types imports so much that each collection would take longer than a step of training."""
    yield
    freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def empty_plots():
    """Runs draw an empty loss.png, because a picture takes as long as a tiny run. train/test_plot.py draws real ones."""

    def empty(lines, title=""):
        from matplotlib.figure import Figure

        return Figure(figsize=(1, 1))

    with mock.patch("s2ft.train.output.loss_figure", empty):
        yield
