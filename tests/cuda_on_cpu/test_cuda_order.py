"""Streams that use one weight wait for each other. The calls of the CUDA runtime are recorded and not run."""

import pytest

# Steps with the calls of the runtime that they make: an op on a stream, its begin or end alone, or a change around it.
STORIES = {
    "the next stream waits for the last op": (
        ("begin 16", []),  # no op ran before, so there is nothing to wait for
        ("end 16", ["create", "record on 16"]),
        ("begin 32", ["wait on 32"]),
        ("end 32", ["record on 32"]),
    ),
    "devices do not wait for each other": (("op 16", ["create", "record on 16"]), ("begin 32 elsewhere", [])),
    "a capturing stream neither waits nor records": (
        ("op 16", ["create", "record on 16"]),
        ("capture", []),
        ("op 32", []),
        ("op 16", []),
    ),
    "a stream does not wait for itself": (
        ("op 16", ["create", "record on 16"]),
        ("op 16", ["record on 16"]),
        ("op 16", ["record on 16"]),
        ("op 32", ["wait on 32", "record on 32"]),
        ("op 16", ["wait on 16", "record on 16"]),  # its last op is not the last one
    ),
    # It has not run. An op after it on the same stream must still wait for the last op that runs.
    "a captured op is not the last one": (
        ("op 16", ["create", "record on 16"]),
        ("capture", []),
        ("op 32", []),
        ("no capture", []),
        ("op 32", ["wait on 32", "record on 32"]),
        ("op 32", ["record on 32"]),
    ),
    "an op that failed is not the last one": (
        ("op 16", ["create", "record on 16"]),
        ("begin 32", ["wait on 32"]),  # and no end
        ("op 32", ["wait on 32", "record on 32"]),
        ("op 16", ["wait on 16", "record on 16"]),
    ),
    "a new stream with the handle of a destroyed one waits": (
        ("op 16", ["create", "record on 16"]),
        ("other streams", []),
        ("op 16", ["wait on 16", "record on 16"]),
    ),
}


@pytest.mark.parametrize("story", STORIES)
def test_order_of_streams(runner, story):
    device = 2 * list(STORIES).index(story)  # no other story has an op there
    for step, expected in STORIES[story]:
        what, *where = step.split()
        if "capture" in step:
            runner.configure(capturing=step == "capture")
        elif step == "other streams":
            runner.library.recreate_streams()
        else:
            for part in ("begin", "end") if what == "op" else (what,):
                assert runner.order(part, device + ("elsewhere" in where), int(where[0])) == 0
        assert runner.calls() == expected
