"""Trainer of transformers on two ranks, with DDP and FSDP2, trains the adapter of one process, checkpoints only the
adapter and resumes exactly."""

import os
from unittest import mock

import pytest
import torch
from runs import attached, check_same_files, files
from support.fsdp_on_cpu import allow
from support.inside import S2FTTrainer
from support.pairs import in_turn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import s2ft

WAYS = ("ddp", "fsdp", "fsdp checkpointed", "fsdp sharded")
ROWS = [
    {"input_ids": ids, "labels": ids} for ids in torch.randint(67, (24, 7), generator=torch.Generator().manual_seed(0))
]


def reset(way):
    """Reset the states of accelerate, which are singletons, and remove the environment variables that they set."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[name]
    if way == "deepspeed":  # accelerate uses it only if no one asks for CPUs, and here are only CPUs
        PartialState(cpu=True)
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"


def trainer(way, model, folder, kind=S2FTTrainer, **changes):
    reset(way)
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
    return kind(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:8])


def train_at_once_and_resumed(rank, way, layout, folder, case="llama-grouped"):
    model = attached(case, layout)
    whole = trainer(way, model, folder / "whole")
    whole.train()
    assert isinstance(whole.model_wrapped, DistributedDataParallel if way == "ddp" else FSDPModule)
    whole.save_model(str(folder / "final"))
    again = trainer(way, attached(case, layout), folder / "again")
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    again.save_model(str(folder / "resumed"))
    return [line["loss"] for line in whole.state.log_history if "loss" in line]


def alone(layout, folder, case="llama-grouped"):
    """One process with twice the accumulation and the same rows in each step."""
    with mock.patch.dict(os.environ):
        made = trainer("ddp", attached(case, layout), folder, gradient_accumulation_steps=2)
        made.train()
        made.save_model(str(folder / "final"))
    return [line["loss"] for line in made.state.log_history if "loss" in line]


@pytest.mark.parametrize("way, layout", in_turn(WAYS, ("permuted", "indexed")))
def test_trains_checkpoints_and_resumes(ranks, way, layout, tmp_path):
    losses = ranks(train_at_once_and_resumed, way, layout, tmp_path)[0]
    check_same_files(tmp_path / "resumed", tmp_path / "final", exactly=True)
    expected = alone(layout, tmp_path / "alone")
    assert losses == pytest.approx(expected, rel=1e-4)
    check_same_files(tmp_path / "final", tmp_path / "alone" / "final")
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"s2ft_adapter.safetensors", "s2ft_config.json", "rng_state_0.pth", "rng_state_1.pth"} <= names
    assert not any("model" in name and name != "model.safetensors.index.json" for name in names), names
    check_same_files(checkpoint, tmp_path / "final", exactly=True)


def best(rank, way, folder):
    """The best checkpoint is loaded at the end. It is the first one here, because the learning rate is far too high."""
    made = trainer(
        way,
        attached("llama"),
        folder,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=3.0,
        load_best_model_at_end=True,
        save_strategy="steps",
        seed=3,
    )
    made.train()
    made.save_model(str(folder / "final"))
    return os.path.basename(made.state.best_model_checkpoint)


@pytest.mark.parametrize("way", (pytest.param("ddp", marks=pytest.mark.slow), "fsdp"))
def test_the_best_checkpoint_is_loaded_at_the_end(ranks, way, tmp_path):
    name = ranks(best, way, tmp_path)[0]
    check_same_files(tmp_path / "final", tmp_path / name, exactly=True)
    others = [path for path in tmp_path.glob("checkpoint-*") if path.name != name]
    assert any(
        not torch.equal(value, files(path)[0][key])
        for path in others
        for key, value in files(tmp_path / "final")[0].items()
    )


def resume_with_another_selection(rank, folder):
    made = trainer("fsdp", attached("llama", seed=5), folder / "other")
    with pytest.raises(ValueError) as error:
        made.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    return str(error.value)


def test_resuming_with_another_selection_is_refused_on_every_rank(ranks, tmp_path):
    ranks(train_at_once_and_resumed, "fsdp", "permuted", tmp_path, "llama")
    for message in ranks(resume_with_another_selection, tmp_path):
        assert "another selection" in message


# ---- the plain Trainer -------------------------------------------------------------------------------------------


def train_plain(rank, way, folder):
    for name, resumed in (("whole", None), ("again", str(folder / "whole" / "checkpoint-2"))):
        model = attached("llama-grouped")
        made = trainer(way, model, folder / name, kind=Trainer)
        made.train(resume_from_checkpoint=resumed)
        assert isinstance(made.model_wrapped, DistributedDataParallel if way == "ddp" else FSDPModule)
        s2ft.save_adapter(made.accelerator.unwrap_model(made.model), folder / f"{name} adapter")


@pytest.mark.parametrize("way", (pytest.param("ddp", marks=pytest.mark.slow), "fsdp"))
def test_plain_trainer_resumes_exactly(ranks, way, tmp_path):
    """Under FSDP2 its checkpoints contain the base too, which s2ft can't change."""
    ranks(train_plain, way, tmp_path)
    check_same_files(tmp_path / "again adapter", tmp_path / "whole adapter", exactly=True)
    check_same_files(tmp_path / "whole" / "checkpoint-4", tmp_path / "whole adapter", exactly=True)
