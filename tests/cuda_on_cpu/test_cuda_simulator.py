"""The simulator finds a missing barrier and a barrier that only a part of a block reaches, and multiplies matrices."""

import ctypes

import pytest
import torch

FAULT_FREE, MISSING_BARRIER, DIVERGENT_BARRIER = 0, 1, 2


def block_sum(runner, values, fault):
    out = torch.zeros(1)
    error = runner.library.block_sum(
        ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()), values.numel(), fault
    )
    return error, out.item()


@pytest.mark.parametrize("n", (1, 33, 255, 256))
def test_a_correct_kernel_gives_the_sum_under_every_schedule(runner, n):
    values = torch.arange(1.0, n + 1)
    for seed in range(5):
        runner.configure(seed)
        assert block_sum(runner, values, FAULT_FREE) == (0, values.sum().item())


def test_a_missing_barrier_gives_wrong_numbers(runner):
    results = set()
    for seed in range(10):
        runner.configure(seed)
        results.add(block_sum(runner, torch.ones(256), MISSING_BARRIER)[1])
    assert results != {256}


def test_a_barrier_that_only_a_part_of_a_block_reaches_is_an_error(runner):
    error, _ = block_sum(runner, torch.ones(256), DIVERGENT_BARRIER)
    assert error != 0 and b"barrier" in runner.library.last_error()


def test_the_product_of_matrices(runner):
    for seed in range(3):
        runner.configure(seed)
        a, b, sums = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16(), torch.empty(2, 16, 8)
        assert runner.library.multiply(*(ctypes.c_void_p(t.data_ptr()) for t in (a, b, sums))) == 0
        torch.testing.assert_close(sums, (a.float() @ b.float()).expand(2, 16, 8))
