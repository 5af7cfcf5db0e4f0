"""DeepSpeed ZeRO on two ranks: whole models, and models whose weights deepspeed.zero.Init has partitioned before attach.

They train, save, restore and resume the adapter of one process.
"""

import pytest
import torch
from runs import (
    EXTRA,
    attach_to,
    attached,
    batches,
    check_same_files,
    config_for,
    engine_for,
    files,
    logits,
    partitioned,
    rows_of,
    train,
    unchanged_environment,
)
from support.inside import S2FTTrainer, full_tensors
from support.models import model_of
from support.states import same, with_adapter, with_loaded
from test_trainer import CLOSE, losses_of, run_trainer, trainer, zero_config
from transformers import AutoModelForCausalLM, Trainer

import s2ft

pytestmark = pytest.mark.deepspeed


def partitioned_of(case, dtype=torch.float32):
    return partitioned(model_of(case, dtype), dtype)


def values(model):
    """Every parameter in full, by name. Every rank calls this."""
    return {name: value.clone() for name, value in full_tensors(dict(model.named_parameters())).items()}


def run(engine, rank, steps=4):
    engine.train()
    for batch in batches(engine.module, steps):
        half = batch[rows_of(rank)]
        engine.backward(engine(input_ids=half, labels=half).loss)
        engine.step()
    engine.eval()


# ---- training --------------------------------------------------------------------------------------------------


def train_and_save(rank, case, layout, stage, directory, half=False, first=False):
    """With `first` the model is partitioned before the adapter is attached."""
    engine = engine_for(attach_to(partitioned_of(case) if first else model_of(case), case, layout), stage, half)
    run(engine, rank)
    s2ft.save_adapter(engine.module, directory)


@pytest.mark.parametrize(
    "case, layout, stage, first",
    [
        ("llama-grouped", "permuted", 1, False),
        ("llama-grouped", "indexed", 2, False),
        ("qwen2-grouped-tied", "permuted", 3, False),
        ("gpt2", "indexed", 3, False),
        ("llama-grouped", "permuted", 3, True),
        ("mixtral", "indexed", 3, True),
        ("gpt2", "permuted", 3, True),
    ],
)
def test_two_ranks_train_and_save_the_adapter_of_one_process(ranks, alone, case, layout, stage, first, tmp_path):
    ranks(train_and_save, case, layout, stage, tmp_path, False, first)
    check_same_files(tmp_path, alone(case, layout), **CLOSE)


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_in_bfloat16_the_saved_values_are_those_of_the_optimizer(ranks, stage, tmp_path):
    """DeepSpeed casts the model and s2 to bfloat16. The saved deltas are the optimizer's float32 values."""
    ranks(train_and_save, "llama", "permuted", stage, tmp_path, True)
    deltas = [value for key, value in files(tmp_path)[0].items() if key.endswith(".delta")]
    assert deltas and all(value.dtype == torch.float32 for value in deltas)
    assert not any(torch.equal(value, value.bfloat16().float()) for value in deltas)


# ---- attach to a partitioned model -----------------------------------------------------------------------------


def attach_both(rank, case, selection, layout):
    """attach changes a partitioned model as it changes a whole one, and detach takes it back."""
    whole, model = model_of(case), partitioned_of(case)
    base = values(whole)
    config = config_for(case, selection=selection, layout=layout)
    data = batches(whole, 2) if selection in ("activation", "product", "gradient") else None
    expected = s2ft.attach(whole, config, calibration=data)
    report = s2ft.attach(model, config, calibration=data)
    assert str(report) == f"{expected}\n{report.unproved}" and "in evaluation mode only" in report.unproved
    assert same(values(model), values(whole))
    assert all(
        (name.endswith(".s2") or (hasattr(parameter, "ds_id") and parameter.numel() == 0))
        for name, parameter in model.named_parameters()
    )
    s2ft.detach(model)
    assert same(values(model), base)
    assert all(parameter.numel() == 0 and parameter.grad is None for parameter in model.parameters())


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


def fail_in_calibration(rank, selection):
    """Afterwards every parameter is at its place and partitioned, and attach works."""
    model, whole = partitioned_of("llama-grouped"), model_of("llama-grouped")
    before = [id(parameter) for parameter in model.parameters()]
    good = batches(whole, 2)
    config = config_for("llama-grouped", selection=selection)
    for bad in ([good[0], good[1] + 1000], good[: 1 + rank]):  # unknown tokens; more batches on one rank
        with pytest.raises(Exception) as error:
            s2ft.attach(model, config, calibration=bad)
        assert [id(parameter) for parameter in model.parameters()] == before
        assert all(parameter.numel() == 0 and parameter.grad is None for parameter in model.parameters())
    for one in (model, whole):
        s2ft.attach(one, config, calibration=good)
    assert same(values(model), values(whole))
    return str(error.value)


@pytest.mark.parametrize("selection", ("activation", "gradient"))
def test_a_failure_in_calibration_leaves_the_model_as_it_was(ranks, selection):
    assert all("differ in their calibration" in message for message in ranks(fail_in_calibration, selection))


def write_and_merge(rank, folder, trainable):
    """An adapter is written into the parts, taken off bit for bit, and merged, as into a whole model."""
    model, whole = partitioned_of("llama-grouped"), model_of("llama-grouped")
    base = values(whole)
    for one in (model, whole):
        s2ft.load_adapter(one, folder, trainable=trainable)
    assert same(values(model), values(whole))
    s2ft.set_adapter(model, None)
    if not trainable:
        assert same(values(model), base)
    s2ft.set_adapter(model, "default")
    for one in (model, whole):
        s2ft.merge(one)
    assert same(values(model), values(whole))


@pytest.mark.parametrize("trainable", (False, True))
def test_an_adapter_is_written_into_partitioned_weights_and_merged(ranks, alone, trainable):
    ranks(write_and_merge, alone("llama-grouped", "permuted"), trainable)


def attach_loaded(rank, folder, unknown):
    """The model as TrainingArguments(deepspeed=...) and accelerate load it: rank 0 reads, every rank keeps its part."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    whole = model_of("llama-grouped")  # before a config of ZeRO-3 lives
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    live = HfDeepSpeedConfig(
        {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero_config(3)["zero_optimization"]}
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    for one in (whole, model):
        if unknown:  # couplings are found by trials on a small model, which must not be partitioned
            one.config.model_type = "unknown"
        s2ft.attach(one, config_for("llama-grouped", selection="weight"), verify=True)
    assert same(values(model), values(whole))
    del live


@pytest.mark.parametrize("unknown", (False, True))
def test_a_model_that_from_pretrained_has_partitioned(ranks, unknown, tmp_path):
    model_of("llama-grouped").save_pretrained(tmp_path)
    ranks(attach_loaded, tmp_path, unknown)


# ---- models in an engine ---------------------------------------------------------------------------------------


def attach_in_an_engine(rank, stage):
    engine = engine_for((partitioned_of("llama") if stage == 3 else model_of("llama")), stage)
    with pytest.raises(ValueError) as error:
        s2ft.attach(engine.module, s2ft.S2FTConfig(d_ratio=0.2))
    assert s2ft.list_adapters(engine.module) == []
    return str(error.value)


@pytest.mark.parametrize("stage", (1, 3))
def test_attaching_to_a_model_in_an_engine_is_refused(ranks, stage):
    found = ranks(attach_in_an_engine, stage)
    assert all("DeepSpeed's engine holds" in one and "before deepspeed.initialize" in one for one in found)


def take_out_of_an_engine(rank, stage, directory):
    """ZeRO-1 leaves the weights whole, and the trained adapter is merged there. ZeRO-3 would gather layers of before."""
    model = with_adapter(partitioned_of("llama") if stage == 3 else model_of("llama"), s2ft.S2FTConfig(d_ratio=0.2))
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
    expected = s2ft.merge(with_loaded(model_of("llama"), tmp_path)).state_dict()
    assert [state for state in (states if stage == 1 else ()) if not same(state, expected)] == []


def train_extra_weights(rank, stage, directory):
    """Whether switching restores the base and then the trained weights."""
    model = attached("llama-grouped", **EXTRA)
    base = model.lm_head.weight.detach().clone()
    run(engine_for(model, stage), rank)
    s2ft.save_adapter(model, directory)
    trained = s2ft.get_adapter(model, "default").extra_weights["lm_head.weight"]
    seen = []
    for setting, expected in ((None, base), ("default", trained)):
        s2ft.set_adapter(model, setting)
        seen.append(torch.equal(full_tensors({"head": model.lm_head.weight})["head"].to(base), expected.to(base)))
    return seen


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_extra_weights_are_trained_and_saved_as_by_one_process(ranks, alone, stage, tmp_path):
    assert all(all(seen) for seen in ranks(train_extra_weights, stage, tmp_path))
    check_same_files(tmp_path, alone("llama-grouped", "permuted", **EXTRA), **CLOSE)


def unfreeze_by_hand(rank, stage):
    model = attached("llama-grouped")
    model.lm_head.requires_grad_(True)
    with pytest.raises(RuntimeError, match="lm_head.weight was unfrozen by hand, and DeepSpeed already holds it"):
        run(engine_for(model, stage), rank, steps=1)


@pytest.mark.parametrize("stage", (1, 3))
def test_a_weight_unfrozen_by_hand_is_refused_before_it_is_trained(ranks, stage):
    ranks(unfreeze_by_hand, stage)


def restore_uneven_parts(rank, stage, saved, directory):
    """Whether a slice is restored whose number of values the ranks can't divide evenly."""
    model = uneven()
    assert model.down.s2.numel() % 2
    engine = engine_for(model, stage)
    s2ft.attached.loading.restore_adapter(engine.module, saved)
    s2ft.save_adapter(engine.module, directory)


def uneven():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(5, 9), torch.nn.Linear(9, 5)

        def forward(self, x):
            return self.down(self.up(x).relu())

    torch.manual_seed(3)
    model = Net()
    coupling = s2ft.Coupling.ffn(0, up="up", down="down", channels=9)
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.34), couplings=[coupling], example=torch.ones(2, 5))
    return model


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_a_slice_is_restored_that_the_ranks_cannot_divide(ranks, stage, tmp_path):
    model = uneven()
    torch.nn.init.normal_(model.down.s2)
    s2ft.save_adapter(model, tmp_path / "saved")
    ranks(restore_uneven_parts, stage, tmp_path / "saved", tmp_path / "restored")
    check_same_files(tmp_path / "restored", tmp_path / "saved", exactly=True)


def restore_and_train(rank, stage, saved, directory):
    """The optimizer holds the restored values too. Otherwise its next step would overwrite them."""
    engine = engine_for(attached("llama-grouped"), stage)
    run(engine, rank, steps=1)
    s2ft.attached.loading.restore_adapter(engine.module, saved)
    s2ft.save_adapter(engine.module, directory / "restored")
    seen = logits(engine.module, engine)
    for group in engine.optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    run(engine, rank, steps=1)
    s2ft.save_adapter(engine.module, directory / "after")
    return seen


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_a_restored_adapter_is_not_overwritten_by_the_optimizer(ranks, stage, tmp_path):
    model = train(attached("llama-grouped"), steps=2)
    s2ft.save_adapter(model, tmp_path / "saved")
    seen = ranks(restore_and_train, stage, tmp_path / "saved", tmp_path)
    torch.testing.assert_close(seen, [logits(model)] * 2, rtol=1e-5, atol=1e-5)
    check_same_files(tmp_path / "restored", tmp_path / "saved", exactly=True)
    check_same_files(tmp_path / "after", tmp_path / "saved", exactly=True)


# ---- Trainer ---------------------------------------------------------------------------------------------------


OPTIONS = dict(max_steps=3, gradient_accumulation_steps=2, gradient_checkpointing=True)


def load_and_attach(base):
    return with_adapter(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config_for("llama-grouped", selection="weight")
    )


def train_loaded(rank, base, folder, kind, more):
    """The model is loaded when the arguments exist: ZeRO-3 partitions it at once. Returns the losses."""
    losses = []
    for name, checkpoint in (("whole", None), ("again", folder / "whole" / "checkpoint-2")):
        config = zero_config(3, **more)
        made = trainer("zero 3", lambda: load_and_attach(base), folder / name, kind, deepspeed=config, **OPTIONS)
        assert all(parameter.numel() == 0 for parameter in made.model.parameters() if not parameter.requires_grad)
        made.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        s2ft.save_adapter(made.accelerator.unwrap_model(made.model), folder / f"{name} adapter")
        losses.append(losses_of(made))
    return losses


GATHERED = {"stage3_gather_16bit_weights_on_model_save": True}


@pytest.mark.parametrize(
    "kind, more",
    [
        (S2FTTrainer, {}),
        (Trainer, {}),
        (Trainer, GATHERED),
        (S2FTTrainer, {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}),
    ],
    ids=("s2ft", "plain", "plain gathered", "s2ft offloaded"),
)
def test_trainer_trains_and_resumes_a_partitioned_model(ranks, kind, more, tmp_path):
    """The plain Trainer saves the adapter only if DeepSpeed is told to gather; DeepSpeed's own files resume it."""
    base = tmp_path / "base"
    model_of("llama-grouped").save_pretrained(base)
    losses, again = ranks(train_loaded, base, tmp_path, kind, more)[0]
    with unchanged_environment():
        options = {**OPTIONS, "gradient_accumulation_steps": 4}
        made = run_trainer("ddp", load_and_attach(base), tmp_path / "alone", **options)
    s2ft.save_adapter(made.model, tmp_path / "alone" / "adapter")
    assert losses == pytest.approx(losses_of(made), rel=1e-4) and again[-1] == losses[-1]
    check_same_files(tmp_path / "whole adapter", tmp_path / "alone" / "adapter", **CLOSE)
    check_same_files(tmp_path / "again adapter", tmp_path / "whole adapter", exactly=True)
    saved = (tmp_path / "whole" / "checkpoint-3" / "s2ft_adapter.safetensors").exists()
    assert saved == (kind is S2FTTrainer or more == GATHERED)
