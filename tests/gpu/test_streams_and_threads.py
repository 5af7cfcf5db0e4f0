"""Ops on one weight from several streams and threads give the numbers of one after the other, and the base is kept."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from support.gpu import DEVICES, Layer, check_frozen, frozen, reference, small_model

from s2ft.ops import scatter_add_, sliced_linear, swap_

LONG = 50_000  # clock cycles for which a stream is kept busy, so that the other one can overtake it


@pytest.mark.cuda
@pytest.mark.parametrize("op", (sliced_linear, reference), ids=("op", "reference"))
def test_two_streams_on_one_weight(op):
    layer = Layer("cuda")
    deltas = [layer.delta, -3 * layer.delta]
    expected = [F.linear(layer.x, layer.merged(delta)) for delta in deltas]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    for turn in range(400):
        with torch.cuda.stream(streams[turn % 2]):
            if turn % 5 == 0:
                torch.cuda._sleep(LONG)
            results.append((turn % 2, op(*layer.arguments(deltas[turn % 2]))))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[which]) for which, y in results)
    layer.check_base()


@pytest.mark.cuda
def test_a_switch_waits_for_a_product_on_another_stream():
    """swap_ and scatter_add_ write the same weight; a product in between must see all of an adapter or none of it."""
    layer, other = Layer("cuda", units=64, start=8), torch.cuda.Stream()
    index = torch.arange(8, 72, device="cuda")
    added = torch.randn(layer.weight.shape[0], 64, device="cuda") / 64
    old = torch.empty_like(added, dtype=layer.weight.dtype)
    expected = F.linear(layer.x, layer.merged())
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        with torch.cuda.stream(other):
            results.append(sliced_linear(*layer.arguments()))
            torch.cuda._sleep(LONG)
        torch.cuda.current_stream().wait_stream(other)  # the caller orders streams, as with PyTorch's own in-place ops
        scatter_add_(layer.weight, index, added, 1, replaced=old)
        swap_(layer.weight, index, old, 1)
        other.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)
    layer.check_base()


@pytest.mark.parametrize("device", DEVICES)
def test_three_threads_on_one_weight(device):
    """On a GPU each thread has a stream of its own."""
    layer = Layer(device, tokens=64)
    if device == "cuda":
        torch.cuda.synchronize()

    def work(scale):
        with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext():
            delta = scale * layer.delta
            expected = F.linear(layer.x, layer.merged(delta))
            for _ in range(200 if device == "cuda" else 30):
                assert torch.equal(sliced_linear(*layer.arguments(delta)), expected)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, (1, 2, -1)))  # raises what a thread raised
    if device == "cuda":
        torch.cuda.synchronize()
    layer.check_base()


@pytest.mark.cuda
def test_a_backward_on_another_stream_than_the_forward():
    """Autograd runs a backward on the stream of its forward, whichever stream is current."""
    model, ids = small_model("cuda")
    before = frozen(model)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    side = torch.cuda.Stream()
    loss = model(input_ids=ids, labels=ids).loss
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss.backward()
    torch.cuda.synchronize()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters() if name in expected)
    check_frozen(model, before)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_the_second_device_while_the_first_is_current():
    layer = Layer("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(sliced_linear(*layer.arguments()), F.linear(layer.x, layer.merged()))
    assert torch.cuda.current_device() == 0
    layer.check_base()
