"""Layers of vLLM that hold slices: `S2FT_VLLM_SLICES=1`."""

import pytest
from support.vllm_models import PROMPTS
from support.vllm_offline import offline

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SLICES = {"S2FT_VLLM_SLICES": "1"}
NAMES = ("base", "down-o", "wide", "other")


def requests(served, names=NAMES):
    """All prompts to all names, and the answers that transformers gives."""
    pairs = [(name, number) for number in range(len(PROMPTS)) for name in names]
    asked = [(None if name == "base" else served.adapters / name, PROMPTS[number]) for name, number in pairs]
    return asked, [served.answers[name][number] for name, number in pairs]


def units_of(served, name):
    """The most units of an adapter in one projection."""
    from s2ft.adapter import read_adapter

    return max(delta.index.numel() for delta in read_adapter(served.adapters / name).deltas.values())


@pytest.mark.parametrize("ranks", (1, 2))
def test_three_adapters_and_the_base_in_one_batch(served, ranks):
    """Adapters of up to 138 units, on an engine whose LoRA would have rank 1."""
    asked, expected = requests(served)
    variables = {**SLICES, **({"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if ranks == 2 else {})}
    (answers,), printed = offline(served.base, [asked], {"tensor_parallel_size": ranks}, variables)
    assert answers == expected
    assert "s2ft: 16 layers hold the slices of 4 adapters" in printed
