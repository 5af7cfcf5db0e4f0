"""The receiving side of slice sync: every message that an engine takes or refuses, on one rank and on several."""

import base64
from unittest.mock import Mock

import pytest
import torch
from support.engines import Threads, checkpoint, engines, specs_of
from support.inside import Receiver, SliceSpec, to_message
from support.states import same

INDEX = {
    "model.layers.0.mlp.down_proj.weight": (1, [1, 2, 13]),
    "model.layers.0.self_attn.q_proj.weight": (0, [4, 5, 6, 7]),
    "model.norm.weight": (0, list(range(16))),
}
NAMES = tuple(INDEX)


def flat(tensors, specs):
    return torch.cat([tensors[one.name].index_select(one.dim, one.index).reshape(-1) for one in specs])


def made(**options):
    (engine,) = engines(1)
    return engine, Receiver(engine, **options)


def init(sender="a", base=None, **changes):
    specs = specs_of(checkpoint() if base is None else base, INDEX)
    return {"sender": sender, "dtype": "float32", "slices": to_message(specs), **changes}


def update(step=1, sender="a", seed=1, **changes):
    return {
        "sender": sender,
        "step": step,
        "tensor": flat(checkpoint(seed=seed), specs_of(checkpoint(), INDEX)),
        **changes,
    }


def expected(seed=1, size=1):
    base, other = checkpoint(), checkpoint(seed=seed)
    for spec in specs_of(base, INDEX):
        base[spec.name].index_copy_(spec.dim, spec.index, other[spec.name].index_select(spec.dim, spec.index))
    return [one.checksums() for one in engines(size, base=base)]


@pytest.fixture
def bound():
    engine, receiver = made()
    before = engine.checksums()
    receiver.bind(init())
    assert same(engine.checksums(), before)
    return engine, receiver, before


@pytest.mark.parametrize("kind", ["values", "tensor"])
def test_an_update_writes_the_merged_weights_and_the_base_returns(bound, kind):
    engine, receiver, before = bound
    numbers = update()["tensor"]
    receiver.update(
        {
            "sender": "a",
            "step": 0,
            kind: numbers if kind == "tensor" else base64.b64encode(numbers.numpy().tobytes()).decode(),
        }
    )
    assert same(engine.checksums(), expected()[0]) and receiver.serving == "slices of sender 'a', step 0"
    receiver.update(update(2, seed=2))
    receiver.update(update(2, seed=2))  # again, after an answer that was lost
    assert same(engine.checksums(), expected(seed=2)[0])
    for _ in range(2):
        receiver.update({"base": True, "sender": "a"})
        assert same(engine.checksums(), before) and receiver.serving == "the base"


BAD_UPDATES = {
    "of another sender": (update(sender="b"), "take_over"),
    "while requests run": (update(idle=False), "pause the engine"),
    "older": (update(step=0), "older than step 1"),
    "without a step": (update(step=None), "whole number"),
    "with a bool as step": (update(step=True), "whole number"),
    "too short": (update(tensor=torch.zeros(3)), "3 numbers"),
    "too long": (update(tensor=torch.zeros(129)), "129 numbers"),
    "of another dtype": (update(tensor=torch.zeros(128, dtype=torch.bfloat16)), "numbers of torch.bfloat16 came"),
    "no tensor": (update(tensor=[1.0]), "not list"),
    "no base64": (update(tensor=None, values="ä"), "values is no base64 text"),
    "of bytes that are cut off": (update(tensor=None, values="AAAA"), "values is no base64 text of torch.float32"),
    "of two kinds": (update(values="AAAA"), "not values and tensor"),
    "of no kind": (update(tensor=None), "not none"),
    "base and numbers": (update(base=True), "not tensor and base"),
    "base that is a text": ({"base": "yes"}, "base must be true, not 'yes'"),
    "release by another": ({"base": True, "sender": "b"}, "sender 'b' is refused: release"),
    "not finite": (update(tensor=torch.full((128,), float("nan"))), "the numbers are not finite"),
}


@pytest.mark.parametrize("kind", BAD_UPDATES)
def test_a_bad_update_is_refused_and_nothing_is_written(bound, kind):
    engine, receiver, before = bound
    receiver.update(update(1))
    message, words = BAD_UPDATES[kind]
    with pytest.raises((ValueError, RuntimeError), match=words):
        receiver.update(message)
    assert same(engine.checksums(), expected()[0]) and receiver.serving == "slices of sender 'a', step 1"
    receiver.update({"base": True, "sender": "a"})
    assert same(engine.checksums(), before)


def other_base():
    base = checkpoint()
    base[NAMES[1]][5, 3] += 1
    return base


UNKNOWN = SliceSpec("model.layers.7.mlp.down_proj.weight", (16, 24), 1, torch.tensor([1]), torch.tensor([1]))
BAD_INITS = {
    "an unknown weight": (init(slices=to_message([*specs_of(checkpoint(), INDEX), UNKNOWN])), "layers.7.mlp.down_proj"),
    "another base": (init(base=other_base()), "1 of 3 slices differ, the first is model.layers.0.self_attn.q_proj"),
    "another dtype": (init(dtype="bfloat16"), "sent as bfloat16"),
    "unknown dtype": (init(dtype="int8"), "int8"),
    "no sender": (init(sender=""), "sender must be the trainer's name"),
    "no slices": (init(slices=dict.fromkeys(("names", "shapes", "dims", "counts"), ())), "slices describes none"),
    "a damaged description": (init(slices={**init()["slices"], "dims": []}), "lists of lengths"),
    "a field that lacks": (init(slices={"names": []}), "shapes"),
}


@pytest.mark.parametrize("kind", BAD_INITS)
def test_after_a_bad_init_the_engine_has_its_base(kind):
    engine, receiver = made()
    before = engine.checksums()
    message, words = BAD_INITS[kind]
    with pytest.raises(ValueError, match=words):
        receiver.bind(message)
    assert same(engine.checksums(), before) and receiver.serving == "the base"
    receiver.bind(init())
    receiver.update(update(5))
    with pytest.raises(ValueError, match=words):
        receiver.bind({**message, "take_over": True})
    assert receiver.serving in ("the base", "slices of sender 'a', step 5")
    assert same(engine.checksums(), before if receiver.sender is None else expected()[0])


def test_an_update_before_init():
    with pytest.raises(RuntimeError, match="before init"):
        made()[1].update(update())


def test_a_second_trainer_is_refused_until_it_takes_over(bound):
    engine, receiver, before = bound
    receiver.update(update(5))
    with pytest.raises(RuntimeError, match="has slices of sender 'a', step 5, so sender 'b' is refused: release"):
        receiver.bind(init("b"))
    assert same(engine.checksums(), expected()[0])
    with pytest.raises(RuntimeError, match="requests are running"):
        receiver.bind(init("b", take_over=True, idle=False))
    assert same(engine.checksums(), expected()[0])
    receiver.bind(init("b", take_over=True, idle=True))
    assert same(engine.checksums(), before) and receiver.serving == "slices of sender 'b', no step yet"
    with pytest.raises(RuntimeError, match="so sender 'a' is refused"):
        receiver.update(update(6))
    receiver.update(update(1, "b"))
    receiver.update({"base": True, "sender": "b"})
    assert same(engine.checksums(), before)


def test_the_same_trainer_begins_again_with_other_slices(bound):
    engine, receiver, before = bound
    receiver.update(update(5))
    receiver.bind({**init(), "slices": to_message(specs_of(checkpoint(), {NAMES[0]: INDEX[NAMES[0]]}))})
    assert same(engine.checksums(), before)
    receiver.update({"sender": "a", "step": 0, "tensor": torch.ones(48)})
    receiver.close()
    assert same(engine.checksums(), before)


def test_a_write_that_fails_restores_the_base(bound, monkeypatch):
    engine, receiver, before = bound
    receiver.update(update(1))
    monkeypatch.setattr(receiver._bound.places[1], "write", lambda values: 1 / 0)
    with pytest.raises(RuntimeError, match="writing failed, and the base has been restored: ZeroDivisionError"):
        receiver.update(update(2, seed=2))
    assert same(engine.checksums(), before)
    monkeypatch.undo()
    receiver.update(update(2, seed=2))
    assert same(engine.checksums(), expected(seed=2)[0])


# ---- weights that were changed by others -----------------------------------------------------------------


def test_weights_that_sleep_mode_has_dropped_or_that_were_replaced(bound):
    engine, receiver, before = bound
    receiver.update(update(1))
    for parameter in engine.parameters():
        parameter.data.zero_()
    with pytest.raises(RuntimeError, match="down_proj.weight was changed by others"):
        receiver.update(update(2, seed=2))
    engine.load_weights(checkpoint().items())  # reload_weights
    receiver.update(update(2, seed=2))
    assert same(engine.checksums(), expected(seed=2)[0])
    engine.down.data = before["down"].clone()
    with pytest.raises(RuntimeError, match="down_proj.weight was changed by others"):
        receiver.update(update(3))
    receiver.bind(init())
    receiver.update(update(4))
    assert same(engine.checksums(), expected()[0])


# ---- several ranks ---------------------------------------------------------------------------------------


def ranks(size):
    threads, made = Threads(size), engines(size)
    return threads, made, [Receiver(one, gather=threads.of(rank).gather) for rank, one in enumerate(made)]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_write_their_parts(size):
    threads, workers, receivers = ranks(size)
    before = [engine.checksums() for engine in workers]
    assert threads.run(lambda rank: receivers[rank].bind(init())) == [None] * size
    assert threads.run(lambda rank: receivers[rank].update(update())) == [None] * size
    assert all(same(engine.checksums(), checksums) for engine, checksums in zip(workers, expected(size=size)))
    assert threads.run(lambda rank: receivers[rank].update({"base": True, "sender": "a"})) == [None] * size
    assert all(same(engine.checksums(), checksums) for engine, checksums in zip(workers, before))


def test_ranks_refuse_together():
    threads, workers, receivers = ranks(2)
    before = [engine.checksums() for engine in workers]
    errors = threads.run(lambda rank: receivers[rank].bind(init(base=other_base())))
    assert all("the first is model.layers.0.self_attn.q_proj.weight" in str(error) for error in errors)
    assert threads.run(lambda rank: receivers[rank].bind(init())) == [None, None]
    bad = [update(), update(tensor=torch.zeros(1))]
    errors = threads.run(lambda rank: receivers[rank].update(bad[rank]))
    assert "rank 1: 1 numbers" in str(errors[0]) and "1 numbers of" in str(errors[1])
    assert all(same(engine.checksums(), checksums) for engine, checksums in zip(workers, before))


def test_a_write_that_fails_on_one_rank_is_undone_on_all(monkeypatch):
    threads, workers, receivers = ranks(2)
    before = [engine.checksums() for engine in workers]
    threads.run(lambda rank: receivers[rank].bind(init()))
    monkeypatch.setattr(receivers[1]._bound.places[0], "write", lambda values: 1 / 0)
    errors = threads.run(lambda rank: receivers[rank].update(update()))
    assert all("the base has been restored" in str(error) and "ZeroDivisionError" in str(error) for error in errors)
    assert all(same(engine.checksums(), checksums) for engine, checksums in zip(workers, before))


def test_places_that_the_engine_does_not_compute_with():
    check = Mock(side_effect=ValueError("packed"))
    with pytest.raises(ValueError, match="packed"):
        made(check=check)[1].bind(init())
    places, specs = check.call_args.args
    assert [specs[place.slice_number].name for place in places] == list(NAMES)
