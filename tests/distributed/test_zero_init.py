"""Models whose weights deepspeed.zero.Init has partitioned before attach, on two ranks."""

import os
import signal

import pytest
import torch
from runs import attached, batches, check_same_files, files, logits, train
from support.inside import full_tensors
from support.models import ALL_RATIOS, model_of, ratios_for
from support.ranks import Ranks
from test_deepspeed import engine_for, run

import s2ft

pytestmark = pytest.mark.deepspeed
os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
pytest.importorskip("deepspeed")


def partitioned(case, dtype=torch.float32):
    """The model of a case after deepspeed.zero.Init: every rank has a part of each parameter."""
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    model = model_of(case, dtype)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "memory_efficient_linear": False},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    return model


def config_of(case, **changes):
    return s2ft.S2FTConfig(**{**ratios_for(case, ALL_RATIOS), **changes})


def values(model):
    """Every parameter in full, by name. Every rank calls this."""
    return {name: value.clone() for name, value in full_tensors(dict(model.named_parameters())).items()}


def check_same_values(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert not [name for name, value in ours.items() if not torch.equal(value, theirs[name])]


# ---- attach ----------------------------------------------------------------------------------------------------


def attach_both(rank, case, selection, layout):
    """attach changes a partitioned model as it changes a whole one, and detach takes it back."""
    whole, model = model_of(case), partitioned(case)
    base = values(whole)
    config = config_of(case, selection=selection, layout=layout)
    data = batches(whole, 2) if selection in ("activation", "product", "gradient") else None
    expected = s2ft.attach(whole, config, calibration=data)
    report = s2ft.attach(model, config, calibration=data)
    assert str(report) == f"{expected}\n{report.unproved}" and "in evaluation mode only" in report.unproved
    check_same_values(values(model), values(whole))
    assert all(is_partitioned_or_new(name, parameter) for name, parameter in model.named_parameters())
    s2ft.detach(model)
    check_same_values(values(model), base)
    assert all(parameter.numel() == 0 and parameter.grad is None for parameter in model.parameters())


def is_partitioned_or_new(name, parameter):
    return name.endswith(".s2") or (hasattr(parameter, "ds_id") and parameter.numel() == 0)


@pytest.mark.parametrize(
    "case, selection, layout",
    [
        ("llama-grouped", "random", "permuted"),
        ("llama-grouped", "weight", "indexed"),
        ("llama-grouped", "gradient", "permuted"),
        ("gpt2", "activation", "permuted"),
        ("mixtral", "product", "permuted"),
        ("mixtral", "gradient", "indexed"),
        ("qwen2-grouped-tied", "gradient", "permuted"),
    ],
)
def test_attach_and_detach_change_a_partitioned_model_as_a_whole_one(ranks, case, selection, layout):
    ranks(attach_both, case, selection, layout)


# ---- training --------------------------------------------------------------------------------------------------


def train_partitioned(rank, case, layout, directory):
    model = partitioned(case)
    s2ft.attach(model, config_of(case, layout=layout))
    run(engine_for(model, 3), rank)
    s2ft.save_adapter(model, directory)


@pytest.mark.parametrize("case, layout", [("llama-grouped", "permuted"), ("mixtral", "indexed"), ("gpt2", "permuted")])
def test_two_ranks_train_and_save_the_adapter_of_one_process(ranks, case, layout, tmp_path):
    ranks(train_partitioned, case, layout, tmp_path / "two")
    model = attached(case, layout)
    train(model)
    s2ft.save_adapter(model, tmp_path / "one")
    check_same_files(tmp_path / "two", tmp_path / "one", rtol=1e-4, atol=1e-4)


def train_on_four(rank, directory):
    model = partitioned("llama-grouped")
    s2ft.attach(model, config_of("llama-grouped", selection="gradient"), calibration=batches(model, 2))
    engine = engine_for(model, 3)
    engine.train()
    for batch in batches(model):
        row = batch[rank : rank + 1]
        engine.backward(engine(input_ids=row, labels=row).loss)
        engine.step()
    s2ft.save_adapter(model, directory)


@pytest.mark.slow
def test_four_ranks_train_and_save_the_adapter_of_one_process(four_ranks, tmp_path):
    four_ranks(train_on_four, tmp_path / "four")
    model = model_of("llama-grouped")
    s2ft.attach(model, config_of("llama-grouped", selection="gradient"), calibration=batches(model, 2))
    train(model)
    s2ft.save_adapter(model, tmp_path / "one")
    check_same_files(tmp_path / "four", tmp_path / "one", rtol=1e-4, atol=1e-4)


def train_in_half_precision(rank, directory):
    """Trained values are the optimizer's float32 ones, and the frozen weights keep every bit."""
    model = partitioned("llama", torch.bfloat16)
    s2ft.attach(model, config_of("llama"))
    before = {name: value for name, value in values(model).items() if not name.endswith(".s2")}
    engine = engine_for(model, 3, half=True)
    run(engine, rank)
    s2ft.save_adapter(model, directory)
    check_same_values({name: value for name, value in values(model).items() if not name.endswith(".s2")}, before)


def test_in_bfloat16_the_saved_values_are_those_of_the_optimizer(ranks, tmp_path):
    ranks(train_in_half_precision, tmp_path)
    deltas = [value for key, value in files(tmp_path)[0].items() if key.endswith(".delta")]
    assert deltas and all(value.dtype == torch.float32 for value in deltas)
    assert not any(torch.equal(value, value.bfloat16().float()) for value in deltas)


# ---- failures --------------------------------------------------------------------------------------------------


def fail_in_calibration(rank, selection):
    """Afterwards every parameter is at its place and partitioned, and attach works."""
    model, whole = partitioned("llama-grouped"), model_of("llama-grouped")
    before = [id(parameter) for parameter in model.parameters()]
    good = batches(whole, 2)
    config = config_of("llama-grouped", selection=selection)
    for bad in ([good[0], good[1] + 1000], good[: 1 + rank]):  # unknown tokens; more batches on one rank
        with pytest.raises(Exception) as error:
            s2ft.attach(model, config, calibration=bad)
        assert [id(parameter) for parameter in model.parameters()] == before
        assert all(parameter.numel() == 0 and parameter.grad is None for parameter in model.parameters())
    for one in (model, whole):
        s2ft.attach(one, config, calibration=good)
    check_same_values(values(model), values(whole))
    return str(error.value)


@pytest.mark.parametrize("selection", ("activation", "gradient"))
def test_a_failure_in_calibration_leaves_the_model_as_it_was(ranks, selection):
    for message in ranks(fail_in_calibration, selection):
        assert "differ in their calibration" in message


def kill_in_training(rank):
    model = partitioned("llama-grouped")
    s2ft.attach(model, config_of("llama-grouped"))
    engine = engine_for(model, 3)
    run(engine, rank, steps=1)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    run(engine, rank, steps=1)


def test_a_rank_that_is_killed_in_training_ends_the_others_with_an_error():
    mortals = Ranks()
    try:
        survivor, killed = mortals.outcomes(kill_in_training)  # fails if a rank does not end
    finally:
        mortals.close()
    assert killed.died and survivor.error and not survivor.died


# ---- adapters before and after deepspeed.initialize --------------------------------------------------------------


def saved_adapters(case, folder):
    """Two trained adapters of one base, and the logits of a whole model with each of their settings."""
    for seed, name in enumerate(("first", "second")):
        model = attached(case, seed=seed)
        train(model, steps=2)
        s2ft.save_adapter(model, folder / name)


def settings_of(model, run_model, folder):
    s2ft.load_adapter(model, folder / "second", "other", active=False)
    seen = []
    for setting in ("other", None, {"other": 0.5, "first": 1.0}, {"first": 0.5}, "first"):
        s2ft.set_adapter(model, setting)
        seen.append(logits(model, run_model))
    return seen


def load_and_switch(rank, case, folder):
    """A trainable adapter is loaded before the engine, another one after it; both are switched."""
    model = partitioned(case)
    s2ft.load_adapter(model, folder / "first", "first", trainable=True)
    s2ft.save_adapter(model, folder / "before the engine", "first")
    return settings_of(model, engine_for(model, 3), folder)


@pytest.mark.parametrize("case", ("llama-grouped", "mixtral"))
def test_adapters_are_loaded_and_switched_on_partitioned_weights(ranks, case, tmp_path):
    saved_adapters(case, tmp_path)
    model = model_of(case)
    s2ft.load_adapter(model, tmp_path / "first", "first", trainable=True)
    expected = settings_of(model, model, tmp_path)
    for seen in ranks(load_and_switch, case, tmp_path):
        for one, other in zip(seen, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        *(
            torch.cat([v.flatten() for k, v in sorted(files(tmp_path / name)[0].items())])
            for name in ("first", "before the engine")
        )
    )


def write_and_take_off(rank, folder):
    """An adapter that is not trainable is written into the parts, and taken off bit for bit, before the engine."""
    model, whole = partitioned("llama-grouped"), model_of("llama-grouped")
    base = values(whole)
    for one in (model, whole):
        s2ft.load_adapter(one, folder / "first")
    check_same_values(values(model), values(whole))
    s2ft.set_adapter(model, None)
    check_same_values(values(model), base)
    s2ft.set_adapter(model, "default")
    for one in (model, whole):
        s2ft.merge(one)
    check_same_values(values(model), values(whole))


def test_an_adapter_is_written_into_partitioned_weights_and_merged(ranks, tmp_path):
    saved_adapters("llama-grouped", tmp_path)
    ranks(write_and_take_off, tmp_path)


def merge_trainable(rank, folder):
    """Merged weights are those of a whole model, and a trainable adapter can be restored before."""
    model, whole = partitioned("llama-grouped"), model_of("llama-grouped")
    for one in (model, whole):
        s2ft.attach(one, config_of("llama-grouped"))
        s2ft.adapter.restore_adapter(one, folder / "first")
        s2ft.merge(one)
    check_same_values(values(model), values(whole))


def test_a_trained_adapter_is_merged_into_partitioned_weights(ranks, tmp_path):
    saved_adapters("llama-grouped", tmp_path)
    ranks(merge_trainable, tmp_path)


def attach_in_an_engine(rank, stage):
    model = partitioned("llama") if stage == 3 else model_of("llama")
    engine = engine_for(model, stage)
    with pytest.raises(ValueError) as error:
        s2ft.attach(engine.module, s2ft.S2FTConfig(d_ratio=0.2))
    assert s2ft.list_adapters(engine.module) == []
    return str(error.value)


@pytest.mark.parametrize("stage", (1, 3))
def test_attaching_to_a_model_in_an_engine_is_refused(ranks, stage):
    for message in ranks(attach_in_an_engine, stage):
        assert "DeepSpeed's engine holds" in message and "before deepspeed.initialize" in message


def take_out_of_an_engine(rank, stage, directory):
    """ZeRO-1 leaves the weights whole, and the trained adapter is merged there. ZeRO-3 would gather layers of before."""
    model = partitioned("llama") if stage == 3 else model_of("llama")
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.2))
    run(engine_for(model, stage), rank)
    s2ft.save_adapter(model, directory)
    if stage == 1:
        return s2ft.merge(model).state_dict()
    for act in (s2ft.detach, s2ft.merge):
        with pytest.raises(ValueError, match="DeepSpeed's engine holds"):
            act(model)


@pytest.mark.parametrize("stage", (1, 3))
def test_a_model_is_taken_out_of_an_engine_whose_weights_are_whole(ranks, stage, tmp_path):
    states = ranks(take_out_of_an_engine, stage, tmp_path)
    model = model_of("llama")
    s2ft.load_adapter(model, tmp_path)
    expected = s2ft.merge(model).state_dict()
    for state in states if stage == 1 else ():
        check_same_values(state, expected)


def switch_weights_trained_in_full(rank, folder):
    """An adapter with a norm that it has trained in full is switched on and off in an engine where the norm is frozen."""
    model = partitioned("llama")
    s2ft.attach(model, config_of("llama"))
    engine_for(model, 3)
    base = values(model)["model.norm.weight"]
    s2ft.load_adapter(model, folder, "other")
    written = values(model)["model.norm.weight"]
    s2ft.set_adapter(model, None)
    assert torch.equal(values(model)["model.norm.weight"], base)
    return written


def test_a_frozen_weight_in_an_engine_takes_the_values_of_an_adapter(ranks, tmp_path):
    model = attached("llama", modules_to_save=["model.norm"])
    train(model)
    s2ft.save_adapter(model, tmp_path)
    for written in ranks(switch_weights_trained_in_full, tmp_path):
        assert torch.equal(written, model.model.norm.weight)


# ---- models of transformers ----------------------------------------------------------------------------------------


def from_pretrained(folder, config):
    """The model as TrainingArguments(deepspeed=...) and accelerate load it: rank 0 reads, every rank keeps its part."""
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    live = HfDeepSpeedConfig(config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    return model, live


ZERO3 = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def attach_loaded(rank, folder, unknown):
    whole = model_of("llama-grouped")  # before a config of ZeRO-3 lives
    model, live = from_pretrained(folder, ZERO3)
    if unknown:  # couplings are found by trials on a small model, which must not be partitioned
        for one in (model, whole):
            one.config.model_type = "unknown"
    config = config_of("llama-grouped", selection="weight")
    for one in (whole, model):
        s2ft.attach(one, config, verify=True)
    check_same_values(values(model), values(whole))
    del live


@pytest.mark.parametrize("unknown", (False, True))
def test_a_model_that_from_pretrained_has_partitioned(ranks, unknown, tmp_path):
    model_of("llama-grouped").save_pretrained(tmp_path)
    ranks(attach_loaded, tmp_path, unknown)


# ---- Trainer ---------------------------------------------------------------------------------------------------------

TRAINER = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def arguments_for(folder, **changes):
    from transformers import TrainingArguments

    options = dict(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        save_steps=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.5,
        logging_steps=1,
        dataloader_pin_memory=False,
        gradient_checkpointing=True,
    )
    return TrainingArguments(**{**options, **changes})


def train_loaded(rank, base, folder, kind, zero):
    """The model is loaded when the arguments exist: ZeRO-3 partitions it at once. Returns the losses."""
    from support.inside import S2FTTrainer
    from test_trainer import ROWS, reset
    from transformers import AutoModelForCausalLM, Trainer
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    losses = []
    for name, checkpoint in (("whole", None), ("again", folder / "whole" / "checkpoint-2")):
        reset("deepspeed")
        config = {**TRAINER, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero}}
        arguments = arguments_for(folder / name, deepspeed=config)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        s2ft.attach(model, config_of("llama-grouped", selection="weight"))
        made = (S2FTTrainer if kind == "s2ft" else Trainer)(model=model, args=arguments, train_dataset=ROWS)
        made.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        s2ft.save_adapter(made.accelerator.unwrap_model(made.model), folder / f"{name} adapter")
        losses.append([line["loss"] for line in made.state.log_history if "loss" in line])
        unset_hf_deepspeed_config()
    return losses


def train_alone(base, folder):
    from unittest import mock

    from support.inside import S2FTTrainer
    from test_trainer import ROWS, reset
    from transformers import AutoModelForCausalLM

    with mock.patch.dict(os.environ):
        reset("ddp")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        s2ft.attach(model, config_of("llama-grouped", selection="weight"))
        arguments = arguments_for(folder, gradient_accumulation_steps=4)
        made = S2FTTrainer(model=model, args=arguments, train_dataset=ROWS)
        made.train()
    s2ft.save_adapter(model, folder / "adapter")
    return [line["loss"] for line in made.state.log_history if "loss" in line]


GATHERED = {"stage3_gather_16bit_weights_on_model_save": True}
OFFLOADED = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    "kind, zero",
    [("s2ft", {}), ("plain", {}), ("plain", GATHERED), ("s2ft", OFFLOADED)],
    ids=("s2ft", "plain", "plain gathered", "s2ft offloaded"),
)
def test_trainer_trains_and_resumes_a_partitioned_model(ranks, kind, zero, tmp_path):
    """The plain Trainer saves the adapter only if DeepSpeed is told to gather; DeepSpeed's own files resume it."""
    model_of("llama-grouped").save_pretrained(tmp_path / "base")
    losses, again = ranks(train_loaded, tmp_path / "base", tmp_path, kind, zero)[0]
    assert losses == pytest.approx(train_alone(tmp_path / "base", tmp_path / "alone"), rel=1e-4)
    assert again[-1] == losses[-1]
    check_same_files(tmp_path / "whole adapter", tmp_path / "alone" / "adapter", rtol=1e-4, atol=1e-4)
    check_same_files(tmp_path / "again adapter", tmp_path / "whole adapter", exactly=True)
    saved = (tmp_path / "whole" / "checkpoint-3" / "s2ft_adapter.safetensors").exists()
    assert saved == (kind == "s2ft" or zero == GATHERED)
