"""Sampled tokens follow the distribution and the seed."""

import pytest
import torch

from s2ft.text.sampling import Sampler


def test_a_temperature_near_0_takes_the_likeliest_token():
    logits = torch.randn(100)
    assert all(Sampler(temperature).choose(logits) == int(logits.argmax()) for temperature in (0.0, 1e-9))


def test_a_seed_gives_the_same_tokens_again():
    logits = [torch.randn(50) for _ in range(20)]
    first, second, other = (
        [sampler.choose(row) for row in logits]
        for sampler in (Sampler(1.0, 0.9, 7), Sampler(1.0, 0.9, 7), Sampler(1.0, 0.9, 8))
    )
    assert first == second != other


def test_without_a_seed_samplers_differ():
    logits = torch.zeros(1 << 20)
    assert len({Sampler(1.0).choose(logits) for _ in range(8)}) > 1


def test_frequencies_match_the_probabilities():
    likely = torch.tensor([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(1.0, 1.0, 0)
    counts = torch.bincount(torch.tensor([sampler.choose(likely.log()) for _ in range(4000)]), minlength=4)
    assert torch.allclose(counts / 4000, likely, atol=0.03)


@pytest.mark.parametrize(
    "top_p, allowed", [(0.0, {2}), (0.5, {2}), (0.51, {2, 0}), (0.81, {2, 0, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_likeliest_tokens_up_to_that_probability(top_p, allowed):
    sampler = Sampler(1.0, top_p, 1)
    logits = torch.tensor([0.3, 0.05, 0.5, 0.15]).log()
    assert {sampler.choose(logits) for _ in range(400)} == allowed


def test_extreme_logits_give_a_valid_token():
    for logits in (torch.tensor([-3e38, 3e38]), torch.tensor([float("-inf"), 0.0]), torch.full((5,), 1e30)):
        assert 0 <= Sampler(2.0, 0.9, 0).choose(logits) < len(logits)
