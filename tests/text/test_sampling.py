"""Sampled tokens follow the distribution and the seed."""

import pytest
import torch
from support.inside import Sampler


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


def test_extreme_logits_give_a_valid_token():
    for logits in (torch.tensor([-3e38, 3e38]), torch.tensor([float("-inf"), 0.0]), torch.full((5,), 1e30)):
        assert 0 <= Sampler(2.0, 0.9, 0).choose(logits) < len(logits)


# ---- against the logits processors of transformers -----------------------------------------------------

PROMPT, ANSWER = [3, 3, 7, 11], [5, 5, 5, 7]


def reference(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition=1.0):
    """The probabilities by transformers' processors."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    ids, logits = torch.tensor([PROMPT + ANSWER]), logits.double()[None]
    if repetition != 1:
        logits = RepetitionPenaltyLogitsProcessor(repetition)(ids, logits)
    steps = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [MinPLogitsWarper(min_p)] if min_p else []
    return torch.softmax(steps(ids, logits)[0], 0)


@pytest.mark.parametrize(
    "options",
    [
        dict(top_k=3),
        dict(min_p=0.2),
        dict(top_p=0.7),
        dict(top_k=6, top_p=0.6, min_p=0.1, temperature=1.3),
        dict(repetition=1.7),
        dict(repetition=0.6, temperature=0.8, top_k=9, min_p=0.05),
    ],
    ids=str,
)
def test_the_distribution_is_that_of_a_plain_implementation(options):
    chosen = {"repetition_penalty" if name == "repetition" else name: value for name, value in options.items()}
    for seed in range(20):
        logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(seed))
        sampler = Sampler(
            chosen.get("temperature", 1.0), seed=seed, **{k: v for k, v in chosen.items() if k != "temperature"}
        )
        adjusted = sampler._adjusted(logits.double(), ANSWER, PROMPT)
        found = sampler._kept(torch.softmax(adjusted / sampler.temperature, 0))
        assert torch.allclose(found / found.sum(), reference(logits, **options), atol=1e-12)
        # the token is where a number drawn with the same seed falls in the reference's distribution function
        drawn = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        expected = int(torch.searchsorted(reference(logits, **options).cumsum(0), drawn, right=True))
        assert sampler.choose(logits, ANSWER, PROMPT) == expected


def test_top_p_may_need_more_tokens_than_the_first_ones():
    logits = 0.01 * torch.randn(5000, generator=torch.Generator().manual_seed(0))
    found = Sampler(1.0, 0.8)._kept(torch.softmax(logits.double(), 0))
    assert torch.allclose(found / found.sum(), reference(logits, top_p=0.8), atol=1e-12) and (found > 0).sum() > 3000
