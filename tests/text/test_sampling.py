"""Sampled tokens follow the distribution of transformers' processors, and the seed."""

import pytest
import torch
from support.inside import Sampler
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper


@pytest.mark.parametrize("temperature", (0.0, 1e-9))
def test_a_temperature_near_0_takes_the_likeliest_token(temperature):
    logits = torch.randn(100)
    assert Sampler(temperature).choose(logits) == int(logits.argmax())


def test_a_seed_gives_the_same_tokens_again_and_without_one_samplers_differ():
    logits = [torch.randn(50) for _ in range(20)]
    first, second, other = (
        [sampler.choose(row) for row in logits] for sampler in (Sampler(1.0, 0.9, n) for n in (7, 7, 8))
    )
    assert first == second != other
    assert len({Sampler(1.0).choose(torch.zeros(1 << 20)) for _ in range(8)}) > 1


def test_extreme_logits_give_a_valid_token():
    extreme = (torch.tensor([-3e38, 3e38]), torch.tensor([float("-inf"), 0.0]), torch.full((5,), 1e30))
    assert all(0 <= Sampler(2.0, 0.9, 0).choose(logits) < len(logits) for logits in extreme)


def test_a_token_is_where_the_drawn_number_falls_in_the_distribution():
    """The penalty comes before the temperature, and top_k before top_p before min_p."""
    for seed in range(40):
        logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(seed))
        ids = torch.tensor([[3, 3, 7, 11, 5, 5, 5, 7]])
        scores = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.double()[None]) / 1.3
        for processor in (TopKLogitsWarper(6), TopPLogitsWarper(0.6), MinPLogitsWarper(0.1)):
            scores = processor(ids, scores)
        drawn = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        expected = int(torch.searchsorted(scores[0].softmax(0).cumsum(0), drawn, right=True))
        sampler = Sampler(1.3, 0.6, seed, top_k=6, min_p=0.1, repetition_penalty=1.7)
        assert sampler.choose(logits, ids[0, 4:].tolist(), ids[0, :4].tolist()) == expected
