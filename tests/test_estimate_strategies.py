"""Several devices in s2ft.estimate: what each strategy counts, the smallest number of devices, and what is refused."""

import json

import pytest
import torch
from support.models import ALL_RATIOS, model_of, ratios_for
from transformers import AutoModelForCausalLM, LlamaConfig

import s2ft
from s2ft import S2FTConfig, Strategy
from s2ft.cli import estimate as command
from s2ft.cli.main import main
from s2ft.estimation import strategy as strategies

CONFIG = S2FTConfig(d_ratio=0.25, o_ratio=0.25)
SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=256)


def hollow(**changes):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**{**SHAPE, **changes}))


def estimate(strategy=None, devices=1, config=CONFIG, **options):
    return s2ft.estimate(hollow(), config, 2, 16, strategy=strategy, devices=devices, device="cpu", **options)


@pytest.fixture(scope="module")
def alone():
    return estimate()


def test_ddp_adds_buckets_of_the_gradients(alone):
    found = estimate("ddp", 4)
    assert found.parts == alone.parts
    assert found.communication == found.gradients
    assert found.peak == alone.peak + found.gradients


def test_buckets_of_which_gradients_are_views_are_no_further_memory(alone):
    found = estimate(Strategy("ddp", gradient_as_bucket_view=True), 4)
    assert (found.communication, found.gradients) == (0, alone.gradients)
    assert found.peak <= alone.peak + found.gradients


@pytest.mark.parametrize("name", ("fsdp2", "zero3"))
def test_sharded_weights_and_states_are_divided(alone, name):
    found = estimate(name, 4)
    assert found.trained == alone.trained
    assert found.parameters == pytest.approx(alone.parameters / 4, rel=0.01)
    assert found.gradients == pytest.approx(alone.gradients / 4, rel=0.01)
    assert found.optimizer == pytest.approx(alone.optimizer / 4, rel=0.01)


def test_shards_are_rounded_up_for_each_parameter():
    """The 64 rows of a weight become 22 on each of three devices, also on the last one, which uses 20."""
    found = {part.name: part.parameters for part in estimate("fsdp2", 3).parts}
    assert found["model.norm"] == 22 * 4
    assert found["model.embed_tokens"] == 86 * 64 * 4


@pytest.mark.parametrize("name", ("zero1", "zero2"))
def test_zero_divides_states_and_keeps_weights(alone, name):
    found = estimate(Strategy(name, reduce_bucket_size=1000), 4)
    assert found.parameters == alone.parameters
    assert found.communication == 4000
    assert found.optimizer == pytest.approx((alone.optimizer + 4 * alone.trained) / 4, rel=0.01)  # and a master copy


@pytest.mark.parametrize("name", ("fsdp2", "zero3", "tp"))
def test_gradient_checkpointing_keeps_less(name):
    """The block that runs again saves what its first run saved, or torch raises: ZeRO-3 replaces a function for both."""
    plain, *checkpointed = (estimate(name, 2, gradient_checkpointing=kind) for kind in (False, True, "reentrant"))
    assert all(found.kept < plain.kept / 2 and found.peak < plain.peak for found in checkpointed)
    assert abs(checkpointed[0].peak - checkpointed[1].peak) < 0.1 * plain.peak


def test_weights_that_stay_gathered_take_more():
    freed, kept = estimate("fsdp2", 4), estimate(Strategy("fsdp2", reshard_after_forward=False), 4)
    block = 3 * 64 * 128 * 4 + 4 * 64 * 64 * 4
    assert freed.kept == kept.kept and freed.parts == kept.parts
    assert kept.peak - freed.peak > block  # of three


@pytest.mark.parametrize(
    "name, offload", (("fsdp2", "all"), ("zero2", "optimizer"), pytest.param("zero3", "all", marks=pytest.mark.slow))
)
def test_what_is_offloaded_is_on_the_host(name, offload):
    size = dict(reduce_bucket_size=1000)
    here, away = (estimate(Strategy(name, offload=where, **size), 2) for where in (None, offload))
    weights = here.parameters if offload == "all" else 0
    assert away.parameters == here.parameters - weights
    assert here.host == 0
    assert away.host == pytest.approx(weights + here.gradients + here.optimizer, rel=0.05)
    assert away.peak < here.peak


def test_tensor_parallelism_divides_layers_and_what_they_keep(alone):
    found = estimate("tp", 2)
    assert found.gradients == alone.gradients and found.optimizer == alone.optimizer  # s2 is whole on each device
    assert found.parameters - found.gradients == pytest.approx((alone.parameters - alone.gradients) / 2, rel=0.02)
    assert alone.kept / 2 < found.kept < alone.kept


def test_tensor_parallelism_with_shards():
    split, both = estimate("tp", 2), estimate(Strategy("tp+fsdp2", tp_size=2), 4)
    assert both.kept == split.kept
    assert both.parameters == pytest.approx(split.parameters / 2, rel=0.01)
    assert both.optimizer == pytest.approx(split.optimizer / 2, rel=0.01)


# ---- the smallest number of devices --------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy, few",
    (
        ("fsdp2", 3),
        pytest.param("tp", 2, marks=pytest.mark.slow),
        pytest.param(Strategy("tp+fsdp2", tp_size=2), 4, marks=pytest.mark.slow),
    ),
    ids=("fsdp2", "tp", "tp+fsdp2"),
)
def test_the_smallest_number_of_devices_fits_and_one_fewer_does_not(strategy, few):
    room = estimate(strategy, few).peak
    found = estimate(strategy, None, memory=room)
    assert (found.devices, found.fits, found.free) == (few, True, room)
    unit = 2 if few == 4 else 1
    assert estimate(strategy, few - unit, memory=room).fits is False


@pytest.mark.parametrize("strategy", ("ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2", "tp"))))
def test_a_memory_that_is_too_small_for_any_number(strategy):
    found = estimate(strategy, None, memory="100KB")
    assert found.fits is False
    assert "no number of devices has enough memory" in found.notes[-1] and found.notes[-1] in str(found)


def test_the_memory_of_a_device_may_be_a_text():
    assert estimate(memory="1.5MB").free == 3 << 19


# ---- refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, text",
    [
        (dict(strategy="fsdp"), ValueError, "strategy must be one of ddp, fsdp2, .*got 'fsdp'"),
        (dict(strategy=2), TypeError, "strategy must be a name, a Strategy or None, got int"),
        (dict(devices=2), ValueError, "devices=2 needs a strategy"),
        (dict(strategy="ddp", devices=0), ValueError, "devices must be a whole number of at least 1, got 0"),
        (dict(strategy="ddp", devices=True), ValueError, "devices must be a whole number"),
        (dict(strategy="ddp", memory="much"), ValueError, "memory must be a size above 0, such as 24GB, got 'much'"),
        (dict(strategy="ddp", memory=0), ValueError, "memory must be a size above 0"),
        (dict(strategy="tp", devices=3), ValueError, "num_attention_heads=4, which 3 devices can't share"),
    ],
)
def test_arguments_that_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        estimate(**options)


@pytest.mark.parametrize(
    "options, error, text",
    [
        (dict(name="ddp", offload="all"), ValueError, "offload of ddp must be None: it has no offload, got 'all'"),
        (dict(name="fsdp2", offload="optimizer"), ValueError, "offload of fsdp2 must be 'all', got 'optimizer'"),
        (dict(name="fsdp2", wrap="root"), ValueError, "wrap must be one of accelerate, blocks, got 'root'"),
        (dict(name="fsdp2", tp_size=2), ValueError, "tp_size must be given for tp.fsdp2 and for no other strategy"),
        (dict(name="tp+fsdp2"), ValueError, "tp_size must be given for tp.fsdp2"),
        (dict(name="fsdp2", reshard_after_forward=1), TypeError, "reshard_after_forward must be True or False, got 1"),
        (dict(name="zero2", reduce_bucket_size=0), ValueError, "reduce_bucket_size must be a whole number of at least"),
    ],
)
def test_strategies_that_do_not_exist(options, error, text):
    with pytest.raises(error, match=text):
        Strategy(**options)


def test_devices_must_be_a_multiple_of_the_devices_that_share_a_weight():
    with pytest.raises(ValueError, match="devices must be a multiple of tp_size, 2, got 3"):
        estimate(Strategy("tp+fsdp2", tp_size=2), 3)


@pytest.mark.parametrize(
    "case, text",
    (
        ("gpt2", "GPT2LMHeadModel has no plan for tensor parallelism"),
        ("mixtral", "experts is split by .*, which s2ft can't count"),
    ),
)
def test_models_that_tensor_parallelism_can_not_split(case, text):
    with pytest.raises(ValueError, match=text):
        s2ft.estimate(model_of(case), S2FTConfig(**ratios_for(case, ALL_RATIOS)), 2, 9, strategy="tp", devices=2)


# ---- the command ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"]).save_pretrained(made)
    return str(made)


SHORT = ["--batch-size", "2", "--max-length", "16", "--d-ratio", "0.1", "--ratios", "0.3", "--device", "cpu"]


def test_the_command_finds_the_smallest_number(folder, capsys):
    words = ["estimate", folder, *SHORT, "--strategy", "fsdp2", "--device-memory", "1MB"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    largest = S2FTConfig(d_ratio=0.3)
    needed = estimate("fsdp2", None, largest, memory="1MB", use_cache=False)
    assert (found["strategy"], found["devices"]) == ("fsdp2", needed.devices) and needed.fits
    assert max(row["peak"] for row in found["rows"]) == needed.peak and all(row["fits"] for row in found["rows"])
    assert main([*words, "--devices", "2"]) == 0
    assert "on each of 2 cpu devices with fsdp2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    (
        (["--devices", "2"], "devices needs strategy: one of ddp"),
        (["--strategy", "fsdp2", "--measure"], "measure runs on one device"),
        (["--strategy", "ddp", "--offload", "all"], "offload of ddp must be None"),
        (["--strategy", "ddp", "--load-in-4bit"], "are counted for one device"),
    ),
)
def test_mistakes(folder, words, message, capsys):
    assert main(["estimate", folder, *words]) == 2
    assert message in capsys.readouterr().err


def test_the_command_has_all_strategies():
    assert command.STRATEGIES == strategies.STRATEGIES
