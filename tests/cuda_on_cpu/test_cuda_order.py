"""Streams that use one weight wait for each other. The calls of the CUDA runtime are recorded and not run."""


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
    runner.order("end", 1, 16)
    runner.calls()
    runner.order("begin", 2, 32)
    assert runner.calls() == []


def test_a_capturing_stream_neither_waits_nor_records(runner):
    runner.order("end", 3, 16)
    runner.calls()
    runner.configure(capturing=True)
    runner.order("begin", 3, 32)
    runner.order("end", 3, 32)
    assert runner.calls() == []
