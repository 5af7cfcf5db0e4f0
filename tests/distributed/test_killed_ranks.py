"""A rank that is killed at any moment: the others end with an error, files are whole, and the next run goes on.

A rank kills itself with SIGKILL when it is about to call a chosen function. The processes of a test are its own.
"""

import importlib
import os
import signal
import time
from datetime import timedelta

import pytest
from runs import attached, check_same_files, sharded, train
from support.pairs import in_turn
from support.ranks import LIMIT, Ranks
from test_trainer import trainer

import s2ft
from s2ft import distributed
from s2ft.ranks import heartbeat

SILENCE = 1.5  # seconds, instead of a minute


@pytest.fixture
def mortals(request):
    made = Ranks(agent="agent" in request.param)
    yield made
    made.close()


@pytest.fixture
def of_agent():
    made = Ranks(agent=True)
    yield made
    made.close()


def kill_at(point, number=1):
    """Kill this process when it calls a function for the nth time. The point is "module:name"."""
    module, _, names = point.partition(":")
    *classes, name = names.split(".")
    owner = importlib.import_module(module)
    for one in classes:
        owner = getattr(owner, one)
    function, calls = getattr(owner, name), []

    def kill(*args, **options):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    setattr(owner, name, kill)


def run_and_kill(rank, victim, point, number, act, args):
    """Run ``act(rank, *args)``, in which one rank is killed."""
    heartbeat.INTERVAL, heartbeat.SILENCE = SILENCE / 10, SILENCE
    if rank == victim:
        kill_at(point, number)
    act(rank, *args)


def errors_of_survivors(ranks, victim, point, number, act, *args):
    """Kill one rank. Returns what the others raised, after checking that they did so, and soon."""
    start = time.monotonic()
    outcomes = ranks.outcomes(run_and_kill, victim, point, number, act, args)
    assert outcomes[victim].died and not any(one.died for one in outcomes if one is not outcomes[victim]), outcomes
    survivors = [outcome for rank, outcome in enumerate(outcomes) if rank != victim]
    assert all(outcome.error for outcome in survivors), f"{point} was not reached, or a rank went on alone"
    assert time.monotonic() - start < LIMIT / 2
    return [outcome.error for outcome in survivors]


# ---- saving an adapter -----------------------------------------------------------------------------------------


def save_twice(rank, directory):
    """Save, train on, and save to the same folder again."""
    model = sharded(attached("llama"))
    train(model, rank, steps=1)
    s2ft.save_adapter(model, directory / "first")
    distributed.wait_for_ranks("the test", [0, 1])
    train(model, rank, steps=1)
    s2ft.save_adapter(model, directory / "first")


def save_once(directory):
    model = attached("llama")
    train(model, steps=1)
    s2ft.save_adapter(model, directory)


WRITING = "s2ft.adapter.formats.native:replace_file"  # two calls each time: the config, then the tensors


@pytest.mark.parametrize(
    "number, mortals", in_turn([3, 4], ["rank 0 has the store", "an agent has the store"]), indirect=["mortals"]
)
def test_the_first_rank_dies_while_it_writes_an_adapter(mortals, number, tmp_path):
    (error,) = errors_of_survivors(mortals, 0, WRITING, number, save_twice, tmp_path)
    assert "saving an adapter: rank 1 waited for rank 0: it has given no sign of life for 1.5 s" in error or (
        not mortals.agent and "can't reach the store" in error
    )
    save_once(tmp_path / "expected")
    check_same_files(tmp_path / "first", tmp_path / "expected")  # the earlier one, whole


def test_another_rank_dies_before_the_slices_are_gathered(of_agent, tmp_path):
    (error,) = errors_of_survivors(of_agent, 1, "s2ft.attached.active:full_tensors", 2, save_twice, tmp_path)
    assert "gathering what is trained: rank 0 waited for rank 1: it has given no sign of life for 1.5 s" in error
    save_once(tmp_path / "expected")
    check_same_files(tmp_path / "first", tmp_path / "expected")


# ---- checkpoints -----------------------------------------------------------------------------------------------

MOVING = "s2ft.train.checkpoints:seal"
RENAMING = "s2ft.train.checkpoints:os.rename"
RANDOM = "transformers:Trainer._save_rng_state"
OPTIMIZER = "s2ft.train.optimizer_state:gather_state"
KILLS = [
    pytest.param("ddp", 0, RENAMING, marks=pytest.mark.slow),
    ("fsdp", 1, RANDOM),
    *(
        pytest.param(way, victim, point, marks=pytest.mark.slow)
        for way in ("ddp", "fsdp", "fsdp sharded")
        for victim, point in ((0, MOVING), (0, OPTIMIZER), (1, OPTIMIZER), (0, WRITING), (1, RANDOM), (0, RANDOM))
    ),
]


def train_to_the_end(rank, way, folder, resumed=None):
    made = trainer(way, attached("llama"), folder)
    made.train(resume_from_checkpoint=resumed)
    made.save_model(str(folder / "final"))


@pytest.mark.parametrize("way, victim, point", KILLS)
def test_a_rank_dies_while_a_checkpoint_is_written(of_agent, way, victim, point, tmp_path):
    errors_of_survivors(
        of_agent, victim, point, 3 if point == WRITING else 2, train_to_the_end, way, tmp_path / "killed"
    )
    assert [path.name for path in tmp_path.glob("killed/checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "killed" / "final").exists()
    of_agent(train_to_the_end, way, tmp_path / "killed", True)
    of_agent(train_to_the_end, way, tmp_path / "whole")
    check_same_files(tmp_path / "killed" / "final", tmp_path / "whole" / "final", exactly=True)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["checkpoint-2", "checkpoint-4", "final"]


# ---- waiting ---------------------------------------------------------------------------------------------------


def work_for_long(rank, shared):
    """The first rank works for longer than others wait for a rank that does nothing."""
    heartbeat.INTERVAL, heartbeat.SILENCE = 0.01, 60
    distributed.RANK_TIMEOUT = timedelta(seconds=0.01)

    def until_the_other_has_waited():
        while not shared.exists():
            time.sleep(0.01)

    why_end = heartbeat.Vigil.why_end

    def looked(vigil, sign):
        """Let the first rank end after this one has been patient for ten times as long as it is with others."""
        if vigil.clock() - created > 0.1 and sign.endswith(heartbeat.WORKING):
            shared.touch()
        return why_end(vigil, sign)

    heartbeat.Vigil.why_end, created = looked, time.monotonic()
    distributed.run_on_first_rank("long work", [0, 1], until_the_other_has_waited)


def test_a_rank_that_works_for_long_is_waited_for(of_agent, tmp_path):
    of_agent(work_for_long, tmp_path / "done")
