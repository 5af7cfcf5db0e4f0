"""Checkpoints are written completely or not at all. A resume reports a corrupt one and takes the newest valid one."""

import os
import shutil
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from adapter.test_pretrained import StopAt, attached, trainer
from support.inside import (
    SEAL,
    STATE,
    UNFINISHED,
    S2FTTrainer,
    checkpoints,
    damage,
    move_into_place,
    newest_valid,
    seal,
)
from support.states import flip, same
from train.tiny import tiny_model


def checkpoint(folder, step, sealed=True):
    path = folder / f"checkpoint-{step}"
    (path / "sub").mkdir(parents=True)
    for name in ("optimizer.pt", "sub/part.bin"):
        (path / name).write_bytes(bytes(range(100)) + str(step).encode())
    (path / STATE).write_text("{}")
    if sealed:
        seal(path)
    return path


DAMAGES = {
    "a bit flipped": (lambda c: flip(c / "optimizer.pt", 50), "optimizer.pt was changed after it was written"),
    "a file cut": (lambda c: (c / "sub/part.bin").write_bytes(b""), "part.bin was changed after it was written"),
    "a file missing": (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "the state missing": (lambda c: (c / STATE).unlink(), f"{STATE} is missing"),
    "an empty seal": (lambda c: (c / SEAL).write_text(""), f"{SEAL} can't be read"),
    "a seal of nonsense": (lambda c: (c / SEAL).write_text('{"files": [1]}'), f"{SEAL} can't be read"),
    "no seal and a cut state": (lambda c: ((c / SEAL).unlink(), (c / STATE).write_text("{")), f"{STATE} can't be read"),
    "nothing": (lambda c: shutil.rmtree(c) or c.mkdir(), f"{STATE} is missing"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_corrupt_checkpoint_is_reported_and_the_newest_valid_one_taken(case, tmp_path, caplog):
    spoil, message = DAMAGES[case]
    for step in (9, 10, 20):
        checkpoint(tmp_path, step)
    assert newest_valid(tmp_path).name == "checkpoint-20" and not caplog.text
    spoil(tmp_path / "checkpoint-20")
    assert message in damage(tmp_path / "checkpoint-20") and newest_valid(tmp_path).name == "checkpoint-10"
    assert "checkpoint-20 is damaged and is skipped" in caplog.text and message in caplog.text


def test_finishing_seals_renames_and_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    written = checkpoint(tmp_path / UNFINISHED, 4, sealed=False)
    checkpoint(tmp_path, 4)  # left by an earlier run
    move_into_place(written, tmp_path, keep=2, best=tmp_path / "checkpoint-1")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-4"]
    assert not (tmp_path / UNFINISHED).exists() and not damage(tmp_path / "checkpoint-4")
    move_into_place(checkpoint(tmp_path / UNFINISHED, 5, sealed=False), tmp_path, keep=0)
    assert len(checkpoints(tmp_path)) == 3
    os.utime(checkpoint(tmp_path, 20), (0, 0))  # an earlier run in this folder had more steps
    move_into_place(checkpoint(tmp_path / UNFINISHED, 6, sealed=False), tmp_path, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-6"]


ours = partial(trainer, kind=S2FTTrainer)


def test_the_trainer_resumes_from_the_valid_checkpoint_and_equals_an_uninterrupted_run(tmp_path, caplog):
    whole, cut, again = attached(), attached(), attached()
    ours(whole, tmp_path / "whole", save_steps=2).train()
    ours(cut, tmp_path / "cut", save_steps=2, callbacks=[StopAt(6)]).train()
    flip(tmp_path / "cut/checkpoint-6/optimizer.pt", 50)
    with pytest.raises(ValueError, match="checkpoint-6 is damaged: optimizer.pt"):
        ours(again, tmp_path / "cut").train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-6"))
    ours(again, tmp_path / "cut", save_steps=2).train(resume_from_checkpoint=True)
    assert "checkpoint-6 is damaged" in caplog.text and same(again, whole)
    assert not damage(tmp_path / "cut/checkpoint-6")  # the resumed run wrote it again


def test_a_parameter_outside_of_the_model_is_resumed_too(tmp_path):
    """Such as the classifier of a loss of sentence-transformers."""

    def optimizers(model):
        made = torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.requires_grad]},
                {"params": [torch.nn.Parameter(torch.ones(3))]},
            ]
        )
        return made, torch.optim.lr_scheduler.ConstantLR(made)

    first, second = attached(), attached()
    ours(first, tmp_path, optimizers=optimizers(first)).train()
    ours(second, tmp_path, optimizers=optimizers(second)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(first, second)


def test_an_interrupted_write_leaves_no_checkpoint(tmp_path, monkeypatch):
    """Writing the optimizer's file fails. The previous checkpoint stays the newest. The next run cleans up."""
    broken = ours(attached(), tmp_path, save_steps=2)
    write = broken._save_optimizer_and_scheduler
    full = Mock(side_effect=OSError("disk full"))
    monkeypatch.setattr(
        broken,
        "_save_optimizer_and_scheduler",
        lambda folder: (full if broken.state.global_step == 4 else write)(folder),
    )
    with pytest.raises(OSError, match="disk full"):
        broken.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"] and (tmp_path / UNFINISHED).exists()
    ours(attached(), tmp_path, save_steps=2).train(resume_from_checkpoint=True)
    assert not (tmp_path / UNFINISHED).exists() and newest_valid(tmp_path).name == "checkpoint-8"


def test_without_a_checkpoint_nothing_is_resumed_and_without_an_adapter_nothing_trained(tmp_path):
    with pytest.raises(ValueError, match="no valid checkpoint in"):
        ours(attached(), tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no S²FT adapter"):
        ours(tiny_model(), tmp_path)
