"""Run the examples in docstrings. Each can use the names torch, s2ft, model and input_ids; see `names`."""

import doctest
import importlib
import inspect
import pkgutil

import public_api
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import s2ft

PROGRAMS = ("axolotl", "llamafactory", "lm_eval", "ms_swift")  # modules of s2ft.integrations that import these programs
SKIPPED = ("s2ft._C", "s2ft.__main__", "s2ft.vllm.transfer_engine",
           *(f"s2ft.integrations.{name}" for name in PROGRAMS))  # fmt: skip
MODULES = [found.name for found in pkgutil.walk_packages(s2ft.__path__, "s2ft.") if found.name not in SKIPPED]


def names():
    """Names for the examples. The model is a LLaMA of two layers, 4 heads, 2 key/value heads and 128 channels."""
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    return {"torch": torch, "s2ft": s2ft, "model": LlamaForCausalLM(config),
            "input_ids": torch.randint(96, (2, 8))}  # fmt: skip


class Finder(doctest.DocTestFinder):
    """Also find examples of decorated functions: doctest counts them to the module of the decorator."""

    def _from_module(self, module, object):
        return super()._from_module(module, inspect.unwrap(object) if inspect.isfunction(object) else object)


def examples():
    """All docstrings with an example, by name."""
    finder = Finder(exclude_empty=True)
    for name in MODULES:
        module = importlib.import_module(name)
        for found in finder.find(module, name, module=module):
            if found.examples:
                yield pytest.param(found, id=found.name)


EXAMPLES = list(examples())
NOT_RUN = {"s2ft.attached.saving.push_to_hub"}  # it needs a network


@pytest.mark.parametrize("found", EXAMPLES)
def test_example(found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found.globs = names()
    output = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(found, out=output.append)
    assert runner.failures == 0, "".join(output)


def test_every_example_of_a_public_name_is_found():
    names = [name for name in public_api.public_names() if ">>>" in public_api.text_of(public_api.target(name))]
    assert [name for name in names if public_api.target(name).path not in {each.id for each in EXAMPLES}] == []


def test_no_example_is_left_out():
    left_out = {
        parameter.id
        for parameter in EXAMPLES
        for example in parameter.values[0].examples
        if example.options.get(doctest.SKIP)
    }
    assert left_out <= NOT_RUN
