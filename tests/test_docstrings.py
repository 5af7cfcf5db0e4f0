"""The examples in docstrings run. Each starts with these names: torch, s2ft, model, input_ids; see `names`."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import s2ft

SKIPPED = ("s2ft._C", "s2ft.__main__", "s2ft.cli.__main__")
MODULES = [found.name for found in pkgutil.walk_packages(s2ft.__path__, "s2ft.") if found.name not in SKIPPED]


def names():
    """What an example can use: a LLaMA of two layers, with 4 heads, 2 key/value heads and 128 channels."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    return {"torch": torch, "s2ft": s2ft, "model": LlamaForCausalLM(config),
            "input_ids": torch.randint(96, (2, 8))}  # fmt: skip


def examples():
    """Every docstring with an example, by name."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in MODULES:
        module = importlib.import_module(name)
        for found in finder.find(module, name, module=module):
            if found.examples:
                yield pytest.param(found, id=found.name)


@pytest.mark.parametrize("found", examples())
def test_example(found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found.globs = names()
    output = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(found, out=output.append)
    assert runner.failures == 0, "".join(output)
