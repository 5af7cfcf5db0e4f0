"""Estimated memory of one of several devices is compared with ranks that train the same model."""

from functools import partial

import pytest
import torch
from support.models import ALL_RATIOS, model_of, ratios_for
from support.rank_memory import measure

import s2ft
from s2ft import Strategy

KEPT, STATES, PEAK = 0.05, 0.05, 0.1  # largest relative errors
EXPERTS = 0.2  # of a mixture's peak: the router gives the experts other numbers of tokens
SMALL = dict(reduce_bucket_size=3000, prefetch_bucket_size=2000, max_reuse_distance=0, persistence_threshold=0)


def batch_of(model):
    model.config.use_cache = False
    tokens = torch.randint(model.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens}


def config_for(case, layout):
    return s2ft.S2FTConfig(**ratios_for(case, ALL_RATIOS), layout=layout)


def run(rank, case, layout, strategy, options):
    return measure(partial(model_of, case), config_for(case, layout), strategy, batch_of, **options)


def check_against(measured, case, layout, strategy, accumulation=1, checkpointing=False):
    model = model_of(case)
    found = s2ft.estimate(
        model,
        config_for(case, layout),
        example=batch_of(model),
        strategy=strategy,
        devices=len(measured),
        accumulation=accumulation,
        gradient_checkpointing=checkpointing,
    )
    most = {what: max(rank[what] for rank in measured) for what in measured[0]}
    assert found.parameters + found.buffers == pytest.approx(most["weights"], rel=STATES)
    assert found.gradients + found.optimizer == pytest.approx(most["states"], rel=STATES)
    assert found.kept == pytest.approx(most["kept"], rel=EXPERTS if case == "mixtral" else KEPT)
    assert found.peak == pytest.approx(most["peak"], rel=EXPERTS if case == "mixtral" else PEAK)


CASES = [
    ("gpt2", "indexed", Strategy("ddp", gradient_as_bucket_view=True), {"accumulation": 2}),
    ("llama-grouped", "permuted", Strategy("fsdp2"), {"checkpointing": True}),
    ("llama", "permuted", Strategy("tp"), {}),
]
MORE = [
    ("llama-grouped", "permuted", Strategy("ddp"), {}),
    ("qwen2-grouped-tied", "indexed", Strategy("fsdp2"), {"accumulation": 2}),
    ("mixtral", "permuted", Strategy("fsdp2", reshard_after_forward=False), {}),
    ("gpt2", "permuted", Strategy("fsdp2", wrap="blocks"), {}),
    ("gemma2", "permuted", Strategy("fsdp2"), {}),
    ("phi3", "indexed", Strategy("fsdp2"), {}),
    ("llama-grouped", "permuted", Strategy("fsdp2", wrap="blocks", reshard_after_forward=False), {"accumulation": 2}),
    ("llama", "indexed", Strategy("tp"), {"checkpointing": True}),
]


@pytest.mark.parametrize(
    "case, layout, strategy, options", [*CASES, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE)]
)
def test_estimate_of_a_rank(ranks, case, layout, strategy, options):
    check_against(ranks(run, case, layout, strategy, options), case, layout, strategy, **options)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", (Strategy("ddp"), Strategy("fsdp2"), Strategy("tp")), ids=lambda s: s.name)
def test_estimate_of_a_rank_of_four(four_ranks, strategy):
    check_against(four_ranks(run, "llama", "permuted", strategy, {}), "llama", "permuted", strategy)


@pytest.mark.deepspeed
@pytest.mark.parametrize("accumulation", (1, 2))
@pytest.mark.parametrize(
    "strategy", (Strategy("zero1", **SMALL), Strategy("zero2", **SMALL), Strategy("zero3", **SMALL))
)
def test_estimate_of_a_rank_of_deepspeed(ranks, strategy, accumulation):
    pytest.importorskip("deepspeed")
    options = {"accumulation": accumulation}
    check_against(
        ranks(run, "llama-grouped", "permuted", strategy, options), "llama-grouped", "permuted", strategy, **options
    )
