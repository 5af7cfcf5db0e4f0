"""Trainer of transformers on two ranks, with DDP, FSDP2 and ZeRO, trains the adapter of one process, checkpoints only
the adapter and resumes exactly."""

import os
from itertools import product

import pytest
import torch
from runs import attached, check_same_files, files, reset, unchanged_environment
from support.fsdp_on_cpu import allow
from support.inside import S2FTTrainer
from support.pairs import in_turn
from torch.nn import Module
from transformers import Trainer, TrainingArguments

import s2ft

CASE = "llama-grouped"
CLOSE = dict(rtol=1e-4, atol=1e-4)  # DeepSpeed sums the gradient norm in another order
WAYS = ("ddp", "fsdp checkpointed", "fsdp plain")
SLOW = [
    pytest.param(*one, marks=pytest.mark.slow)
    for one in (("ddp plain", "permuted"), *product(("fsdp", "fsdp sharded"), ("permuted", "indexed")))
]
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp": "FSDP", "zero": "DeepSpeedEngine"}  # classes, or how they begin
ROWS = [
    {"input_ids": ids, "labels": ids} for ids in torch.randint(67, (24, 7), generator=torch.Generator().manual_seed(0))
]


def zero_config(stage, **more):
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **more},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def trainer(way, model, folder, kind=S2FTTrainer, rows=ROWS, **changes):
    """A Trainer. A function that makes the model is called when the arguments exist."""
    reset("deepspeed" if way.startswith("zero") else way)
    allow()
    options = dict(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.5,
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    if way.startswith("zero"):
        options["deepspeed"] = zero_config(int(way[-1]))
    if way.startswith("fsdp"):
        options.update(
            fsdp=True,
            fsdp_config={
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "activation_checkpointing": "checkp" in way,
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                "state_dict_type": "SHARDED_STATE_DICT" if "sharded" in way else "FULL_STATE_DICT",
            },
        )
    arguments = TrainingArguments(**{**options, **changes})
    model = model if isinstance(model, Module) else model()
    return kind(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:8])


def run_trainer(*args, resumed=None, **changes):
    """Make a trainer and train, from a checkpoint if one is given. Returns the trainer."""
    made = trainer(*args, **changes)
    made.train(resume_from_checkpoint=resumed)
    return made


def run_of(way, folder, layout="permuted", resumed=None, **changes):
    """Train and save a new model. Returns the losses."""
    reset()
    made = run_trainer(
        way, attached(CASE, layout, **changes), folder, Trainer if "plain" in way else S2FTTrainer, resumed=resumed
    )
    assert type(made.model_wrapped).__name__.startswith(WRAPPERS[way.split()[0]])
    s2ft.save_adapter(made.accelerator.unwrap_model(made.model), folder / "final")
    return losses_of(made)


def losses_of(made):
    return [line["loss"] for line in made.state.log_history if "loss" in line]


def train_at_once_and_resumed(rank, way, layout, folder):
    half = str(folder / "whole" / "checkpoint-2")
    losses = run_of(way, folder / "whole", layout)
    run_of(way, folder / "again", layout, half)
    if "plain" not in way:
        with pytest.raises(ValueError, match="another selection"):
            run_of(way, folder / "other", layout, half, seed=5)
    return losses


ZERO = [pytest.param(f"zero {stage}", "permuted", marks=pytest.mark.deepspeed) for stage in (1, 2, 3)]


@pytest.mark.parametrize("way, layout", [*in_turn(WAYS, ("permuted", "indexed")), *SLOW, *ZERO])
def test_trains_checkpoints_and_resumes(ranks, way, layout, tmp_path):
    """Under FSDP2 the checkpoints of the plain Trainer contain the base too, which s2ft can't change."""
    losses = ranks(train_at_once_and_resumed, way, layout, tmp_path)[0]
    checkpoint, final = tmp_path / "whole" / "checkpoint-4", tmp_path / "whole" / "final"
    check_same_files(tmp_path / "again" / "final", final, exactly=True)
    check_same_files(checkpoint, final, exactly=True)
    if "plain" in way:
        return
    with unchanged_environment():  # one process with twice the accumulation has the same rows in each step
        made = run_trainer("ddp", attached(CASE, layout), tmp_path / "alone", gradient_accumulation_steps=2)
    s2ft.save_adapter(made.model, tmp_path / "alone" / "final")
    assert losses == pytest.approx(losses_of(made), rel=1e-4)
    check_same_files(final, tmp_path / "alone" / "final", **(CLOSE if way.startswith("zero") else {}))
    names = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*")}
    assert {"s2ft_adapter.safetensors", "s2ft_config.json", "rng_state_0.pth", "rng_state_1.pth"} <= names
    base = [name for name in names if "model" in name or "states" in name or "global_step" in name]
    assert base == ["model.safetensors.index.json"]  # DeepSpeed's own files would have the base
    if way.startswith("zero"):
        state = torch.load(checkpoint / "optimizer.pt")
        assert all(name.endswith(".s2") for group in state["parameter_names"] for name in group)


def best(rank, way, folder):
    """The best checkpoint is loaded at the end. It is the first one here, because the learning rate is far too high."""
    options = dict(eval_strategy="steps", eval_steps=2, learning_rate=3.0, load_best_model_at_end=True, seed=3)
    made = run_trainer(way, attached("llama"), folder, **options)
    made.save_model(str(folder / "final"))
    return os.path.basename(made.state.best_model_checkpoint)


@pytest.mark.parametrize("way", (pytest.param("ddp", marks=pytest.mark.slow), "fsdp"))
def test_the_best_checkpoint_is_loaded_at_the_end(ranks, way, tmp_path):
    assert ranks(best, way, tmp_path)[0] == "checkpoint-2"
    check_same_files(tmp_path / "final", tmp_path / "checkpoint-2", exactly=True)
    last, final = (files(tmp_path / name)[0] for name in ("checkpoint-4", "final"))
    assert any(not torch.equal(value, last[key]) for key, value in final.items())
