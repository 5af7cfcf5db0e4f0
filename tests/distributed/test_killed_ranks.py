"""A rank that is killed at any moment: the others end with an error, files are whole, and the next run goes on.

A rank kills itself with SIGKILL when it is about to call a chosen function. The processes of a test are its own.
"""

from contextlib import closing

import pytest
from runs import attached, check_same_files, sharded, train
from support.inside import distributed
from support.killed import kill_at
from support.models import model_of
from support.ranks import Ranks, patience
from test_meta_ranks import meta_of
from test_trainer import run_trainer

import s2ft

SECONDS = 5  # that a rank waits for another one, instead of half an hour


@pytest.fixture
def mortals(request):
    """Ranks of an agent, as torchrun's, if the test does not say that rank 0 has their store."""
    with closing(Ranks(agent=getattr(request, "param", "an agent") == "an agent")) as made:
        yield made


def run_and_kill(rank, victim, point, number, act, args):
    """Run ``act(rank, *args)``, in which one rank is killed."""
    if rank == victim:
        kill_at(point, number)
    with patience(SECONDS):
        act(rank, *args)


def errors_of_survivors(ranks, victim, point, number, act, *args):
    """Kill one rank. Returns what the others raised, after checking that they did so before the limit of a call."""
    outcomes = ranks.outcomes(run_and_kill, victim, point, number, act, args)
    assert outcomes[victim].died and not any(one.died for one in outcomes if one is not outcomes[victim]), outcomes
    survivors = [outcome for rank, outcome in enumerate(outcomes) if rank != victim]
    assert all(outcome.error for outcome in survivors), f"{point} was not reached, or a rank went on alone"
    return [outcome.error for outcome in survivors]


# ---- saving an adapter -----------------------------------------------------------------------------------------


def save_twice(rank, directory):
    """Save, train on, and save to the same folder again."""
    model = train(sharded(attached("llama")), rank, steps=1)
    s2ft.save_adapter(model, directory / "first")
    distributed.wait_for_ranks("the test", [0, 1])
    train(model, rank, steps=1)
    s2ft.save_adapter(model, directory / "first")


def save_once(directory):
    s2ft.save_adapter(train(attached("llama"), steps=1), directory)


WRITING = "s2ft.adapter.native:replace_file"  # two calls each time: the config, then the tensors
DEATHS = {  # the rank that dies, its call, which is of the second save, and what the other one waits for
    "before the tensors are replaced": (0, WRITING, 4, "saving an adapter: rank 1 waited for rank 0"),
    "before the config is replaced": (0, WRITING, 3, "saving an adapter: rank 1 waited for rank 0"),
    "before the slices are gathered": (
        1,
        "s2ft.attached.active:full_tensors",  # one call in attach, two each time: slices, then weights trained in full
        4,
        "gathering what is trained: rank 0 waited for rank 1",
    ),
}
MORE_DEATHS = [("before the tensors are replaced", "rank 0"), *((death, "an agent") for death in list(DEATHS)[1:])]


@pytest.mark.parametrize(
    "death, mortals",
    [
        ("before the tensors are replaced", "an agent"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE_DEATHS),
    ],
    indirect=["mortals"],
)
def test_a_rank_dies_while_an_adapter_is_saved(mortals, death, tmp_path):
    victim, point, number, waits = DEATHS[death]
    (error,) = errors_of_survivors(mortals, victim, point, number, save_twice, tmp_path)
    assert f"{waits}: it did not call this within 5 s" in error or (
        not mortals.agent and "can't reach the store" in error
    )
    save_once(tmp_path / "expected")
    check_same_files(tmp_path / "first", tmp_path / "expected")  # the earlier one, whole


# ---- checkpoints -----------------------------------------------------------------------------------------------

MOVING = "s2ft.train.output:seal"
RENAMING = "s2ft.train.output:os.rename"
RANDOM = "transformers:Trainer._save_rng_state"
OPTIMIZER = "s2ft.train.optimizer_state:gather_state"
KILLS = [
    pytest.param("ddp", 0, RENAMING, marks=pytest.mark.slow),
    *(
        pytest.param(way, victim, point, marks=pytest.mark.slow)
        for way in ("ddp", "fsdp", "fsdp sharded")
        for victim, point in ((0, MOVING), (0, OPTIMIZER), (1, OPTIMIZER), (0, WRITING), (1, RANDOM), (0, RANDOM))
    ),
]


def train_to_the_end(rank, way, folder, resumed=None):
    run_trainer(way, attached("llama"), folder, resumed=resumed).save_model(str(folder / "final"))


@pytest.mark.parametrize("way, victim, point", KILLS)
def test_a_rank_dies_while_a_checkpoint_is_written(mortals, way, victim, point, tmp_path):
    errors_of_survivors(
        mortals, victim, point, 3 if point == WRITING else 2, train_to_the_end, way, tmp_path / "killed"
    )
    assert [path.name for path in tmp_path.glob("killed/checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "killed" / "final").exists()
    mortals(train_to_the_end, way, tmp_path / "killed", True)
    mortals(train_to_the_end, way, tmp_path / "whole")
    check_same_files(tmp_path / "killed" / "final", tmp_path / "whole" / "final", exactly=True)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["checkpoint-2", "checkpoint-4", "final"]


# ---- ranks without weights ---------------------------------------------------------------------------------------


def without_weights(rank, saved):
    """The second rank has no weights, and takes the fingerprint and the selection of the first one."""
    model = model_of("llama") if rank == 0 else meta_of(model_of("llama"))
    if saved is None:
        s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.2, selection="weight"))
    else:
        s2ft.load_adapter(model, saved, trainable=True)


FINGERPRINT, SELECTION = "s2ft.attached.record:fingerprint", "s2ft.selection:_select"
WAITS = [(FINGERPRINT, True, "rank 0"), (FINGERPRINT, False, "an agent"), (SELECTION, False, "an agent")]


@pytest.mark.parametrize(
    "point, loads, mortals",
    [(FINGERPRINT, True, "an agent"), *(pytest.param(*case, marks=pytest.mark.slow) for case in WAITS)],
    indirect=["mortals"],
)
def test_the_first_rank_dies_while_others_wait_for_what_it_computes(mortals, point, loads, tmp_path):
    if loads:
        save_once(tmp_path / "saved")
    (error,) = errors_of_survivors(mortals, 0, point, 1, without_weights, tmp_path / "saved" if loads else None)
    assert (
        "can't find it itself" in error
        and "waited for rank 0: it did not call this within 5 s" in error
        or (not mortals.agent and "can't reach the store" in error)
    )


# ---- waiting ---------------------------------------------------------------------------------------------------


def work_for_long(rank, folder):
    """The first rank works until the other one has stopped waiting for it."""
    waited = folder / "waited"

    def work():
        while not waited.exists():
            pass

    with patience(0.1):
        try:
            distributed.run_on_first_rank("long work", [0, 1], work)
        except RuntimeError as error:
            waited.touch()
            return str(error)


def test_a_rank_that_works_for_longer_than_the_timeout_is_named_with_the_way_out(mortals, tmp_path):
    first, second = mortals(work_for_long, tmp_path)
    assert "long work: rank 1 waited for rank 0: it did not call this within 0.1 s" in second
    assert "--ddp-timeout" in second and "waited for rank 1" in first
