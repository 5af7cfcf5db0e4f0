"""A run that is resumed on another number of ranks, or sharded in another way, trains the adapter of one process."""

from functools import cache

import pytest
from runs import attach_to, attached, base_on, check_same_files, reset, unchanged_environment
from support.inside import trainer as trainers
from support.models import model_of
from test_trainer import CLOSE, run_trainer

CASE, ROWS_OF_UPDATE = "llama-grouped", 4
# Strategy and number of ranks before and after. One rank is a process without a group.
FAST = [("ddp", 2, "ddp", 1), ("ddp", 1, "fsdp", 2), ("fsdp", 2, "ddp", 1), ("fsdp sharded", 2, "ddp", 2)]
ZERO = [
    ("zero 1", 2, "ddp", 1),
    ("zero 2", 2, "zero 3", 2),
    ("zero 3", 2, "fsdp", 2),
    ("ddp", 1, "zero 1", 2),
    ("fsdp", 2, "zero 3", 2),
]
SLOW_ZERO = [
    *((f"zero {stage}", 4, f"zero {stage}", count) for stage in (1, 2, 3) for count in (2, 1)),
    ("zero 3", 2, "zero 3", 4),
]
SLOW = [
    *((way, 4, way, 2) for way in ("ddp", "fsdp", "fsdp sharded")),
    *((way, 4, "ddp", 1) for way in ("ddp", "fsdp", "fsdp sharded")),
    *((way, 2, way, 4) for way in ("ddp", "fsdp")),
    *(("ddp", 1, way, 4) for way in ("ddp", "fsdp")),
    ("tp", 2, "ddp", 1),
    ("ddp", 1, "tp", 2),
]


def train(rank, count, way, layout, folder, resumed=None):
    """Four updates of four rows each, or the ones after a checkpoint. Returns the losses and the learning rates."""
    rows = ROWS_OF_UPDATE if way == "tp" else ROWS_OF_UPDATE // count  # ranks that share weights have the same rows
    reset()
    if way == "tp":
        model = base_on("tp", folder.parent / "base")
        model.config._name_or_path = ""
        attach_to(model, CASE, layout)
    else:
        model = attached(CASE, layout)
    made = run_trainer(
        way,
        model,
        folder,
        per_device_train_batch_size=rows,
        eval_strategy="steps",
        eval_steps=2,
        resumed=resumed and str(resumed),
    )
    made.save_model(str(folder / "final"))
    lines = [line for line in made.state.log_history if "loss" in line]
    return [(line["step"], line["loss"], line["learning_rate"]) for line in lines]


@pytest.fixture
def run(request):
    """``run(count, way, ...)`` runs :func:`train` on so many ranks.

    One rank is this process, without a group. DeepSpeed needs a group, and a process of its own for it.
    """

    def run_on(count, way, *args):
        if count == 1 and not way.startswith("zero"):
            with unchanged_environment():
                return train(0, 1, way, *args)
        return request.getfixturevalue({1: "one_rank", 2: "ranks", 4: "four_ranks"}[count])(train, count, way, *args)[0]

    return run_on


@pytest.fixture(scope="module")
def never_interrupted(tmp_path_factory):
    """The lines and the folder of one process that is not interrupted, by layout."""

    @cache
    def of(layout):
        folder = tmp_path_factory.mktemp("whole")
        with unchanged_environment():
            return train(0, 1, "ddp", layout, folder), folder / "final"

    return of


@pytest.mark.parametrize(
    "before, count, after, resumed_on",
    [
        *FAST,
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
        *(pytest.param(*case, marks=pytest.mark.deepspeed) for case in ZERO),
        *(pytest.param(*case, marks=[pytest.mark.deepspeed, pytest.mark.slow]) for case in SLOW_ZERO),
    ],
)
def test_resumed_on_another_number_of_ranks(run, never_interrupted, before, count, after, resumed_on, tmp_path):
    model_of(CASE).save_pretrained(tmp_path / "base")
    layout = "indexed" if count == 1 or "sharded" in before else "permuted"
    run(count, before, layout, tmp_path / "before")
    lines = run(resumed_on, after, layout, tmp_path / "after", tmp_path / "before" / "checkpoint-2")
    expected, final = never_interrupted(layout)
    assert [line[0] for line in lines] == [1, 2, 3, 4]
    assert all(line == pytest.approx(expect, rel=1e-5) for line, expect in zip(lines, expected))
    check_same_files(
        tmp_path / "after" / "final", final, **(CLOSE if "zero" in before + after or "tp" in before + after else {})
    )


@pytest.mark.parametrize("kinds", [("S2FTTrainer", "Trainer"), ("Trainer", "S2FTTrainer")])
def test_a_plain_trainer_and_ours_resume_from_each_other(kinds, tmp_path):
    with unchanged_environment():
        for kind, folder, resumed in zip(kinds, ("before", "after"), (None, str(tmp_path / "before" / "checkpoint-2"))):
            options = dict(kind=getattr(trainers, kind), per_device_train_batch_size=ROWS_OF_UPDATE)
            made = run_trainer("ddp", attached(CASE), tmp_path / folder, **options, resumed=resumed)
            made.save_model(str(tmp_path / folder / "final"))
    check_same_files(tmp_path / "after" / "final", tmp_path / "before" / "final", exactly=True)
