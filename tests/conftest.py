"""What all tests share: no network, few threads, fixed seeds.

S2FT_TEST_THREADS is the number of PyTorch's threads, one by default. S2FT_TEST_ROUNDING, any number, makes every
product round differently for every layout of its operands, differently for every number: support/rounding.py.
"""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from support.rounding import set_up_kernels

set_up_kernels()


def pytest_collection_finish():
    """Trainers and torch.compile collect garbage often. Nothing that stands now is any: let them leave it out."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
