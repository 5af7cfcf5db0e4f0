"""Several devices in s2ft.estimate: against measured ranks, the smallest number of devices, and what is refused."""

import json
import sys
from pathlib import Path

import pytest
import torch
from support.models import ALL_RATIOS, model_of, ratios_for
from support.pairs import rest_slow
from transformers import AutoModelForCausalLM, LlamaConfig

import s2ft
from s2ft import S2FTConfig, Strategy
from s2ft.cli.main import main

CONFIG = S2FTConfig(d_ratio=0.25, o_ratio=0.25)
SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=256)


def estimate(strategy=None, devices=1, config=CONFIG, **options):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    return s2ft.estimate(model, config, 2, 16, strategy=strategy, devices=devices, device="cpu", **options)


# ---- against ranks that were measured --------------------------------------------------------------------

BENCH = Path(__file__).parents[1] / "bench"
MEASURED = json.loads((BENCH / "results" / "estimate_ranks.json").read_text())
MOST_DIFFERENT = ("gpt2, ddp, 2 ranks", "mixtral, fsdp2, 4 ranks", "llama, fsdp2-kept, 4 ranks", "llama, tp, 4 ranks",
                  "llama, zero2, 4 ranks", "llama, zero3-small, 4 ranks")  # fmt: skip
CLOSE = dict(weights=0.01, states=0.1, kept=0.05, peak=0.1)  # largest relative errors


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import estimate_ranks

    yield estimate_ranks
    for name in ("estimate_ranks", "harness"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("key", rest_slow(MEASURED["results"], MOST_DIFFERENT))
def test_formulas_agree_with_measured_ranks(key, bench):
    """bench/estimate_ranks.py measured them. DeepSpeed keeps inputs of frozen layers under ZeRO-3, up to 13 %."""
    name, strategy, ranks = key.split(", ")
    ranks_measured = MEASURED["results"][key]["measured"]
    found = bench.estimated(name, bench.STRATEGIES[strategy], int(ranks[0]), MEASURED["batch"], MEASURED["length"])
    for what, close in CLOSE.items():
        close = 0.15 if what == "kept" and strategy.startswith("zero3") else close
        assert found[what] == pytest.approx(max(rank[what] for rank in ranks_measured), rel=close), what


@pytest.mark.parametrize("name", ("zero1", "zero2", "zero3"))
def test_zero_updates_a_copy_in_float32(name):
    """With deltas in bfloat16, states and the copy are of float32."""
    config = S2FTConfig(d_ratio=0.25, delta_dtype="bfloat16")
    found = estimate(Strategy(name, reduce_bucket_size=1000), 4, config, dtype=torch.bfloat16)
    assert found.communication == 2000 and found.optimizer == pytest.approx(3 * 4 * found.trained / 4, rel=0.02)


@pytest.mark.parametrize(
    "name, offload", (("fsdp2", "all"), ("zero2", "optimizer"), ("zero3", "optimizer"), ("zero3", "all"))
)
def test_what_is_offloaded_is_on_the_host(name, offload):
    here, away = (estimate(Strategy(name, offload=where, reduce_bucket_size=1000), 2) for where in (None, offload))
    moved = here.gradients + here.optimizer + (here.parameters if offload == "all" else 0)
    assert (here.host, away.host) == (0, moved) and away.peak == here.peak - moved


def test_tensor_parallelism_with_shards():
    split, both = estimate("tp", 2), estimate(Strategy("tp+fsdp2", tp_size=2), 4)
    assert both.kept == split.kept and both.parameters == pytest.approx(split.parameters / 2, rel=0.01)
    assert both.optimizer == pytest.approx(split.optimizer / 2, rel=0.01)


# ---- the smallest number of devices --------------------------------------------------------------------


@pytest.mark.parametrize("strategy, few", (("fsdp2", 3), ("tp", 2), (Strategy("tp+fsdp2", tp_size=2), 4)), ids=str)
def test_the_smallest_number_of_devices_fits_and_one_fewer_does_not(strategy, few):
    room = estimate(strategy, few).peak
    found = estimate(strategy, None, memory=room)
    assert (found.devices, found.fits, found.free) == (few, True, room)
    assert estimate(strategy, few - (2 if few == 4 else 1), memory=room).fits is False


# ---- refused -------------------------------------------------------------------------------------------


def tensor_parallel(case, plan=None):
    """Estimate two tensor-parallel devices, with rules that are added to the plan of transformers."""
    config = S2FTConfig(**ratios_for(case, ALL_RATIOS))

    def estimated():
        model = model_of(case)
        if plan:
            model.tp_plan = {**model.tp_plan, **plan}
        return s2ft.estimate(model, config, 2, 9, strategy="tp", devices=2)

    return estimated


REFUSED = [
    (lambda: estimate("fsdp"), ValueError, "strategy must be one of ddp, fsdp2, .*got 'fsdp'"),
    (lambda: estimate(2), TypeError, "strategy must be a name, a Strategy or None, got int"),
    (lambda: estimate(devices=2), ValueError, "devices=2 needs a strategy"),
    (lambda: estimate("ddp", 0), ValueError, "devices must be a whole number of at least 1, got 0"),
    (lambda: estimate("ddp", True), ValueError, "devices must be a whole number"),
    (lambda: estimate("ddp", memory="much"), ValueError, "memory must be a size above 0, such as 24GB, got 'much'"),
    (lambda: estimate("ddp", memory=0), ValueError, "memory must be a size above 0"),
    (lambda: estimate("tp", 3), ValueError, "num_attention_heads=4, which 3 devices can't share"),
    (lambda: estimate(Strategy("tp+fsdp2", tp_size=2), 3), ValueError, "must be a multiple of tp_size, 2, got 3"),
    (lambda: Strategy("ddp", offload="all"), ValueError, "offload of ddp must be None: it has no offload, got 'all'"),
    (lambda: Strategy("fsdp2", offload="optimizer"), ValueError, "offload of fsdp2 must be 'all', got 'optimizer'"),
    (lambda: Strategy("fsdp2", tp_size=2), ValueError, "tp_size must be given for tp.fsdp2 and for no other strategy"),
    (lambda: Strategy("tp+fsdp2"), ValueError, "tp_size must be given for tp.fsdp2"),
    (lambda: Strategy("fsdp2", reshard_after_forward=1), TypeError, "reshard_after_forward must be True or False"),
    (lambda: Strategy("zero2", reduce_bucket_size=0), ValueError, "reduce_bucket_size must be a whole number of at"),
    (tensor_parallel("gpt2"), ValueError, "GPT2LMHeadModel has no plan for tensor parallelism"),
    (
        tensor_parallel("mixtral", {"model.layers.*.mlp.experts": "moe_tp_experts"}),
        ValueError,
        "mlp.experts is split by 'moe_tp_experts' in transformers' plan, which s2ft can't count",
    ),
    (
        tensor_parallel("mixtral", {"model.layers.*.mlp.experts.down_proj": "rowwise"}),
        ValueError,
        "mlp.experts.down_proj is split by 'rowwise' in transformers' plan, which s2ft can't count",
    ),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_is_refused(number):
    call, error, text = REFUSED[number]
    with pytest.raises(error, match=text):
        call()


# ---- the command ---------------------------------------------------------------------------------------


SHORT = ["--batch-size", "2", "--max-length", "16", "--d-ratio", "0.1", "--ratios", "0.3", "--device", "cpu"]


def test_the_command_finds_the_smallest_number(tmp_path, capsys):
    LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    words = ["estimate", str(tmp_path), *SHORT, "--strategy", "fsdp2", "--device-memory", "1MB"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    needed = estimate("fsdp2", None, S2FTConfig(d_ratio=0.3), memory="1MB", use_cache=False)
    assert (found["strategy"], found["devices"]) == ("fsdp2", needed.devices) and needed.fits
    assert max(row["peak"] for row in found["rows"]) == needed.peak and all(row["fits"] for row in found["rows"])
    assert main([*words, "--devices", "2"]) == 0 and "on each of 2 cpu devices with fsdp2" in capsys.readouterr().out
