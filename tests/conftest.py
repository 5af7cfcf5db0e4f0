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
from support.rounding import divide_products

torch.set_num_threads(int(os.environ.get("S2FT_TEST_THREADS", 1)))   # the models are tiny, the runner uses the cores
DIVIDED = divide_products(os.environ["S2FT_TEST_ROUNDING"]) if "S2FT_TEST_ROUNDING" in os.environ else None


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
