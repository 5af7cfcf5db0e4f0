"""Signs of life: whom a rank waits for, and how long."""

import pytest
import torch.distributed as dist

from s2ft.ranks.heartbeat import Heartbeat, Vigil, end_heartbeat, heartbeat, wait_for_key

WORKS, LIVES, ENDED, NONE = "{} working", "{} ", "{} ended", ""
# What the other rank's sign is at each second, and the second at which the wait ends, with a word of the reason.
WAITS = {
    "it works": ([WORKS] * 100, None, ""),
    "it works and then does something else": ([WORKS] * 20 + [LIVES] * 30, 30, "every rank must call this"),
    "it lives and does not call": ([LIVES] * 30, 11, "did not call this within 10 s: every rank must call this"),
    "it never gave a sign": ([NONE] * 30, 11, "every rank must call this"),
    "it ended in its work": ([WORKS] * 3 + ["3 working"] * 30, 9, "no sign of life for 5 s, so its process has ended"),
    "it ended before it called": ([LIVES] * 2 + ["7 "] * 30, 8, "no sign of life for 5 s"),
    "it said that it ends": ([WORKS] * 2 + [ENDED], 2, "its process has ended"),
}


@pytest.mark.parametrize("name", WAITS)
def test_how_long_a_rank_waits(name):
    signs, end, word = WAITS[name]
    time = 0
    vigil = Vigil(patience=10, silence=5, clock=lambda: time)
    for time, sign in enumerate(signs):
        why = vigil.why_end(sign.format(time))
        if why:
            break
    assert (time if why else None, word in why) == (end, True), (time, why)


@pytest.fixture
def store():
    yield dist.HashStore()
    end_heartbeat()


def sign(store):
    return store.get("s2ft/sign of life/3").decode()


def test_the_sign_says_whether_the_rank_works_and_that_it_ends(store):
    mine = Heartbeat(store, 3, interval=1000)
    seen = [sign(store)]
    with mine.working():
        seen.append(sign(store))
        with mine.working():
            pass
        seen.append(sign(store))
    seen.append(sign(store))
    mine.end()
    assert [one.split(" ")[1] for one in [*seen, sign(store)]] == ["", "working", "working", "", "ended"]
    assert len(set(seen)) == 4  # each is a new one


def test_the_thread_gives_signs_by_itself(store):
    Heartbeat(store, 3, interval=0.001)
    first = sign(store)
    while sign(store) == first:
        pass


def test_a_process_group_has_one_heartbeat(store):
    first = heartbeat(store, 3)
    assert heartbeat(store, 3) is first
    second = heartbeat(dist.HashStore(), 3)
    assert second is not first and sign(store).endswith("ended")


def test_a_key_that_is_set_is_found_although_its_rank_has_ended(store):
    Heartbeat(store, 3, interval=1000).end()
    assert wait_for_key(store, "key", 3, patience=100) == "its process has ended"
    store.set("key", "")
    assert wait_for_key(store, "key", 3, patience=0) == ""
