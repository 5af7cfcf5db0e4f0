"""Streams that use one weight wait for each other. The calls of the CUDA runtime are recorded and not run."""


def op(runner, device, stream):
    assert runner.order("begin", device, stream) == 0
    assert runner.order("end", device, stream) == 0


def test_the_next_stream_waits_for_the_last_op(runner):
    device, first, second = 0, 16, 32
    assert runner.order("begin", device, first) == 0
    assert runner.calls() == []  # no op ran before, so there is nothing to wait for
    assert runner.order("end", device, first) == 0
    assert runner.calls() == ["create", "record on 16"]
    assert runner.order("begin", device, second) == 0
    assert runner.calls() == ["wait on 32"]
    assert runner.order("end", device, second) == 0
    assert runner.calls() == ["record on 32"]


def test_devices_do_not_wait_for_each_other(runner):
    op(runner, 1, 16)
    runner.calls()
    runner.order("begin", 2, 32)
    assert runner.calls() == []


def test_a_capturing_stream_neither_waits_nor_records(runner):
    op(runner, 3, 16)
    runner.calls()
    runner.configure(capturing=True)
    op(runner, 3, 32)
    op(runner, 3, 16)
    assert runner.calls() == []


def test_a_stream_does_not_wait_for_itself(runner):
    op(runner, 4, 16)
    runner.calls()
    op(runner, 4, 16)
    op(runner, 4, 16)
    assert runner.calls() == ["record on 16", "record on 16"]
    op(runner, 4, 32)
    op(runner, 4, 16)  # its last op is not the last one
    assert runner.calls() == ["wait on 32", "record on 32", "wait on 16", "record on 16"]


def test_a_captured_op_is_not_the_last_one(runner):
    """It has not run. An op after it on the same stream must still wait for the last op that runs."""
    op(runner, 5, 16)
    runner.configure(capturing=True)
    op(runner, 5, 32)
    runner.configure()
    runner.calls()
    op(runner, 5, 32)
    op(runner, 5, 32)
    assert runner.calls() == ["wait on 32", "record on 32", "record on 32"]


def test_an_op_that_failed_is_not_the_last_one(runner):
    op(runner, 6, 16)
    runner.order("begin", 6, 32)  # and no end
    runner.calls()
    op(runner, 6, 32)
    op(runner, 6, 16)
    assert runner.calls() == ["wait on 32", "record on 32", "wait on 16", "record on 16"]


def test_a_new_stream_with_the_handle_of_a_destroyed_one_waits(runner):
    op(runner, 7, 16)
    runner.calls()
    runner.library.recreate_streams()
    op(runner, 7, 16)
    assert runner.calls() == ["wait on 16", "record on 16"]
