"""Models with images are trained whole: which towers, by which trainers, and that merged and reloaded models are equal."""

import copy

import pytest
import torch
from support.images import MODELS, batch, rows
from support.inside import couplings_of, projections_of
from support.states import same, with_loaded
from support.tolerances import LOGITS, relative_difference
from transformers import Trainer, TrainingArguments

import s2ft
from s2ft import S2FTConfig

pytest.importorskip("PIL", reason="pillow is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")

RATIOS = dict(q_ratio=0.5, k_ratio=0.5, v_ratio=0.5, o_ratio=0.5, u_ratio=0.25, g_ratio=0.25, d_ratio=0.25)
OPTIONS = dict(max_steps=4, per_device_train_batch_size=4, learning_rate=3e-2, logging_steps=1, use_cpu=True)
QUIET = dict(report_to=[], save_strategy="no", disable_tqdm=True)


def with_trl(model, processor, folder):
    """Train with TRL's SFTTrainer and return the losses of the steps."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(str(folder), **OPTIONS, **QUIET, bf16=False, max_length=None)
    return losses_of(SFTTrainer(model, config, train_dataset=Dataset.from_list(rows()), processing_class=processor))


def with_trainer(model, processor, folder):
    """Train on one prepared batch with the Trainer of transformers and return the losses of the steps."""
    prepared = batch(processor)
    config = TrainingArguments(str(folder), **OPTIONS, **QUIET, remove_unused_columns=False)
    return losses_of(Trainer(model, config, train_dataset=list(range(8)), data_collator=lambda _: dict(prepared)))


def losses_of(trainer):
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


# ---- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, train",
    [
        ("qwen2_5_vl", with_trl),
        ("gemma3", with_trl),
        ("llava", with_trainer),
        pytest.param("qwen2_5_vl", with_trainer, marks=pytest.mark.slow),
        pytest.param("gemma3", with_trainer, marks=pytest.mark.slow),
    ],
)
def test_a_model_with_images_is_trained_merged_and_reloaded(name, train, tmp_path):
    model, processor = MODELS[name]()
    base = copy.deepcopy(model)
    s2ft.attach(model, S2FTConfig(**RATIOS))
    losses = train(model, processor, tmp_path / "run")
    assert losses[-1] < losses[0]
    model.eval()
    inputs = batch(processor)
    trained = model(**inputs).logits
    s2ft.save_adapter(model, tmp_path / "adapter")
    merged = s2ft.merge(model)
    language = {f"{p.path}.weight" for p in projections_of(couplings_of(base)) if "language_model" in p.path}
    before, after = base.state_dict(), merged.state_dict()  # every slice has changed, and nothing else
    assert {name for name in before if not torch.equal(before[name], after[name])} == language

    assert same(s2ft.merge(with_loaded(copy.deepcopy(base), tmp_path / "adapter")), merged)

    merged.save_pretrained(tmp_path / "merged")
    reloaded = type(merged).from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert same(reloaded, merged) and relative_difference(reloaded(**inputs).logits, trained) <= LOGITS


# ---- the commands ------------------------------------------------------------------------------------------
