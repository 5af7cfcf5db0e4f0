"""Two devices share each row by DeepSpeed's sequence parallelism (Ulysses) and train the adapter of one process."""

from contextlib import closing

import pytest
import torch
from runs import check_same_files, config_for, reset, unchanged_environment
from support.inside import S2FTTrainer
from support.models import model_of
from support.ranks import Ranks
from support.states import with_adapter
from test_trainer import CLOSE, losses_of, run_trainer
from transformers import AutoModelForCausalLM, Trainer

import s2ft

pytestmark = pytest.mark.deepspeed
LENGTH = 8  # DeepSpeed's loader wants the positions, and a length that the devices can divide
TOKENS = torch.randint(67, (24, LENGTH), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": ids, "labels": ids, "position_ids": torch.arange(LENGTH)} for ids in TOKENS]


def train(kind, base, folder, way, **changes):
    """Returns the losses, and the gradient norms."""
    made = run_trainer(
        way,
        lambda: with_adapter(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa"),
            config_for("llama-grouped", selection="weight"),
        ),
        folder,
        kind,
        rows=ROWS,
        max_steps=3,
        **changes,
    )
    s2ft.save_adapter(made.accelerator.unwrap_model(made.model), folder / "adapter")
    return losses_of(made), [line["grad_norm"] for line in made.state.log_history if "loss" in line]


def train_together(rank, kind, stage, base, folder):
    import deepspeed
    from accelerate import ParallelismConfig
    from accelerate.utils import DeepSpeedSequenceParallelConfig

    reset("deepspeed")
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
    parallelism = ParallelismConfig(sp_size=2, sp_backend="deepspeed", sp_handler=handler)
    return train(kind, base, folder, f"zero {stage}", parallelism_config=parallelism)


@pytest.mark.parametrize(
    "kind, stage",
    [(S2FTTrainer, 3), pytest.param(Trainer, 1, marks=pytest.mark.slow)],
    ids=("s2ft, ZeRO-3", "plain, ZeRO-1"),
)
def test_trainer_trains_the_adapter_of_one_process(kind, stage, tmp_path):
    model_of("llama-grouped").save_pretrained(tmp_path / "base")
    with closing(Ranks()) as made:  # a process can have one group of sequence parallelism only
        losses, norms = made(train_together, kind, stage, tmp_path / "base", tmp_path / "two")[0]
    with unchanged_environment():
        expected_losses, expected_norms = train(S2FTTrainer, tmp_path / "base", tmp_path / "one", "ddp")
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    if stage == 3:  # DeepSpeed multiplies the gradients by the number of devices in ZeRO-1 and 2
        assert norms == pytest.approx(expected_norms, rel=1e-4)
    check_same_files(tmp_path / "two" / "adapter", tmp_path / "one" / "adapter", **CLOSE)
