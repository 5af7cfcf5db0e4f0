"""DeepSpeed ZeRO on two ranks trains and saves the same adapter as one process, and Trainer resumes exactly."""

import os

import pytest
import torch
from runs import attached, batches, check_same_files, logits, rows_of, train

import s2ft

pytestmark = pytest.mark.deepspeed
os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
pytest.importorskip("deepspeed")


def engine_for(model, stage, half=False, **zero):
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
        "bf16": {"enabled": half},
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def run(engine, rank, steps=4):
    engine.train()
    for batch in batches(engine.module, steps):
        half = batch[rows_of(rank)]
        engine.backward(engine(input_ids=half, labels=half).loss)
        engine.step()
    engine.eval()


def train_and_save(rank, case, layout, stage, directory, half=False):
    model = attached(case, layout)
    engine = engine_for(model, stage, half)
    run(engine, rank)
    s2ft.save_adapter(engine.module, directory)


@pytest.mark.parametrize("layout", ("permuted", "indexed"))
@pytest.mark.parametrize(
    "case, stage",
    [
        ("llama-grouped", 1),
        ("llama-grouped", 2),
        ("llama-grouped", 3),
        ("gpt2", 3),
        ("mixtral", 3),
        ("qwen2-grouped-tied", 3),
    ],
)
def test_two_ranks_train_and_save_the_adapter_of_one_process(ranks, case, stage, layout, tmp_path):
    ranks(train_and_save, case, layout, stage, tmp_path / "two")
    model = attached(case, layout)
    train(model)
    s2ft.save_adapter(model, tmp_path / "one")
    check_same_files(
        tmp_path / "two", tmp_path / "one", rtol=1e-4, atol=1e-4
    )  # DeepSpeed sums the gradient norm in another order


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_in_bfloat16_the_saved_values_are_those_of_the_optimizer(ranks, stage, tmp_path):
    """DeepSpeed casts the model and s2 to bfloat16. The saved deltas are the optimizer's float32 values."""
    ranks(train_and_save, "llama", "permuted", stage, tmp_path, True)
    from safetensors.torch import load_file

    for key, value in load_file(tmp_path / "s2ft_adapter.safetensors").items():
        if key.endswith(".delta"):
            assert value.dtype == torch.float32 and not torch.equal(value, value.bfloat16().float()), key


# ---- weights that are trained in full ---------------------------------------------------------------------------

EXTRA = dict(modules_to_save=["model.norm", "lm_head"])


def train_extra_weights(rank, stage, directory):
    """Whether switching restores the base and then the trained weights."""
    model = attached("llama-grouped", **EXTRA)
    base = model.lm_head.weight.detach().clone()
    engine = engine_for(model, stage)
    run(engine, rank)
    s2ft.save_adapter(model, directory)
    trained = s2ft.get_adapter(model, "default").extra_weights["lm_head.weight"]
    seen = []
    for setting, expected in ((None, base), ("default", trained)):
        s2ft.set_adapter(model, setting)
        head = s2ft.distributed.full_tensors({"head": model.lm_head.weight})["head"]
        seen.append(torch.equal(head.to(base), expected.to(base)))
    return seen


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_extra_weights_are_trained_and_saved_as_by_one_process(ranks, stage, tmp_path):
    assert all(all(seen) for seen in ranks(train_extra_weights, stage, tmp_path / "two"))
    model = attached("llama-grouped", **EXTRA)
    train(model)
    s2ft.save_adapter(model, tmp_path / "one")
    check_same_files(tmp_path / "two", tmp_path / "one", rtol=1e-4, atol=1e-4)


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
    s2ft.adapter.restore_adapter(engine.module, saved)
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


# ---- adapters on a model inside DeepSpeed --------------------------------------------------------------------


def restore_and_train(rank, stage, saved, directory):
    """The optimizer holds the restored values too. Otherwise its next step would overwrite them."""
    engine = engine_for(attached("llama-grouped"), stage)
    run(engine, rank, steps=1)
    s2ft.adapter.restore_adapter(engine.module, saved)
    s2ft.save_adapter(engine.module, directory / "restored")
    seen = logits(engine.module, engine)
    for group in engine.optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    run(engine, rank, steps=1)
    s2ft.save_adapter(engine.module, directory / "after")
    return seen


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_a_restored_adapter_is_not_overwritten_by_the_optimizer(ranks, stage, tmp_path):
    model = attached("llama-grouped")
    train(model, steps=2)
    s2ft.save_adapter(model, tmp_path / "saved")
    for seen in ranks(restore_and_train, stage, tmp_path / "saved", tmp_path):
        torch.testing.assert_close(seen, logits(model), rtol=1e-5, atol=1e-5)
    check_same_files(tmp_path / "restored", tmp_path / "saved", exactly=True)
    check_same_files(tmp_path / "after", tmp_path / "saved", exactly=True)


def switch(model, saved, run_model):
    s2ft.load_adapter(model, saved, "other", active=False)
    seen = []
    for setting in ("other", None, {"other": 0.5, "default": 1.0}, {"default": 0.5}, None):
        s2ft.set_adapter(model, setting)
        seen.append(logits(model, run_model))
    return seen, str(s2ft.status(model))


def switch_sharded(rank, case, stage, saved):
    model = attached(case)
    s2ft.adapter.restore_adapter(model, saved[0])
    engine = engine_for(model, stage)
    refused = []
    for name, act in (("detach", s2ft.detach), ("merge", s2ft.merge), ("fuse", s2ft.fuse)):
        if stage == 3:
            with pytest.raises(ValueError, match="DeepSpeed's engine holds|this model is sharded"):
                act(model)
        refused.append(name)
    return switch(model, saved[1], engine)


@pytest.mark.parametrize("case", ("llama-grouped", "mixtral", "gpt2"))
@pytest.mark.parametrize("stage", (1, 3))
def test_switching_adapters(ranks, case, stage, tmp_path):
    saved = [tmp_path / "0", tmp_path / "1"]
    for seed, folder in enumerate(saved):
        model = attached(case, seed=seed)
        train(model, steps=2)
        s2ft.save_adapter(model, folder)
    model = attached(case)
    s2ft.adapter.restore_adapter(model, saved[0])
    expected, expected_status = switch(model, saved[1], model)
    for seen, status in ranks(switch_sharded, case, stage, saved):
        assert status == expected_status
        for one, other in zip(seen, expected):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not torch.equal(expected[0], expected[1])


# ---- Trainer ---------------------------------------------------------------------------------------------------


def train_at_once_and_resumed(rank, stage, folder):
    from test_trainer import trainer
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    def fresh(**changes):
        unset_hf_deepspeed_config()  # under a global ZeRO-3 config, a new model is partitioned at once
        return attached("llama-grouped", **changes)

    config = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }
    whole = trainer("deepspeed", fresh(), folder / "whole", deepspeed=config)
    whole.train()
    assert type(whole.model_wrapped).__name__ == "DeepSpeedEngine"
    whole.save_model(str(folder / "final"))
    again = trainer("deepspeed", fresh(), folder / "again", deepspeed=config)
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    again.save_model(str(folder / "resumed"))
    other = trainer("deepspeed", fresh(seed=5), folder / "other", deepspeed=config)
    with pytest.raises(ValueError, match="another selection"):
        other.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_trainer_checkpoints_only_the_adapter_and_resumes(ranks, stage, tmp_path):
    from test_trainer import alone

    ranks(train_at_once_and_resumed, stage, tmp_path)
    check_same_files(tmp_path / "resumed", tmp_path / "final", exactly=True)
    alone("permuted", tmp_path / "alone")
    check_same_files(tmp_path / "final", tmp_path / "alone" / "final", rtol=1e-4, atol=1e-4)
    names = {str(path.relative_to(tmp_path)) for path in (tmp_path / "whole" / "checkpoint-4").rglob("*")}
    assert not any("states" in name or "global_step" in name for name in names), (
        names
    )  # DeepSpeed's would have the base
    state = torch.load(tmp_path / "whole" / "checkpoint-4" / "optimizer.pt")
    assert all(name.endswith(".s2") for group in state["parameter_names"] for name in group)
