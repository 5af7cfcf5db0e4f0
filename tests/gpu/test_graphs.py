"""Captured, compiled and unwatched by the host: CUDA graphs, torch.compile, and forwards without a wait."""

import pytest
import torch
from support.gpu import bits, check_frozen, frozen, small_model
from support.models import train
from support.waits import no_waits_on_gpu

from s2ft.ops import multi_adapter_linear, pack_adapters

pytestmark = pytest.mark.cuda
D = "cuda"


def captured(step):
    """Run a step three times on a side stream, as a capture needs it, and capture it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def trained_by(capture: bool) -> list[torch.Tensor]:
    """The slices after three warming steps and three more, replayed or eager."""
    model, ids = small_model(D)
    before = frozen(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, capturable=True, fused=True)

    def step():
        optimizer.zero_grad()  # no gradient is left, so that a capture records their writing and not an addition
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    if capture:
        graph = captured(step)
    else:
        for _ in range(3):
            step()
    for _ in range(3):
        graph.replay() if capture else step()
    torch.cuda.synchronize()
    check_frozen(model, before)
    return [p.detach().clone() for p in trained]


def test_a_captured_training_step_is_an_eager_step():
    assert all(torch.equal(replayed, eager) for replayed, eager in zip(trained_by(True), trained_by(False)))


def test_replays_see_slices_that_changed_after_the_capture():
    model, ids = small_model(D)
    model.eval()
    held = {}

    @torch.no_grad()
    def step():
        held["logits"] = model(input_ids=ids).logits

    graph = captured(step)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
        expected = model(input_ids=ids).logits.clone()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(held["logits"], expected)


@pytest.mark.parametrize("mode", (None, "reduce-overhead", "max-autotune-no-cudagraphs"))
def test_compiled_training_is_eager_training(mode):
    model, ids = small_model(D)
    expected = train(model, 4, lr=1e-3, loss_of=lambda model: model(input_ids=ids, labels=ids).loss)
    model, ids = small_model(D)
    before = frozen(model)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    losses = train(model, 4, lr=1e-3, loss_of=lambda _: compiled(input_ids=ids, labels=ids).loss)
    assert losses == pytest.approx(expected, rel=2e-2)
    check_frozen(model, before)


def test_the_check_for_waits_sees_a_wait():
    with pytest.raises(RuntimeError), no_waits_on_gpu():
        torch.ones(1, device=D).item()


def test_no_wait_in_forward_backward_and_step():
    model, ids = small_model(D)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)

    def step():
        model.model(input_ids=ids).last_hidden_state.float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # what only the first step does may wait
    with no_waits_on_gpu():
        step()


def bank_of(count: int, tokens: int, dim: int, width: int = 4096, units: int = 64):
    """A batch and a bank of `count` adapters, of which each sequence has one or none."""
    shape = (units, width) if dim == 0 else (width, units)
    adapters = [
        (torch.randperm(width, device=D)[:units], (torch.randn(*shape, device=D) / 64).bfloat16()) for _ in range(count)
    ]
    x, y = (torch.randn(count, tokens, width, device=D).bfloat16() for _ in range(2))
    return x, y, pack_adapters(adapters, dim), torch.randint(-1, count, (count,), device=D)


@pytest.mark.parametrize("tokens", (1, 7, 512))
@pytest.mark.parametrize("count", (1, 8, 64))
@pytest.mark.parametrize("dim", (0, 1))
def test_the_bank_in_a_graph_serves_other_adapters(count, tokens, dim):
    x, y, bank, names = bank_of(count, tokens, dim)
    values, index, offsets = bank
    full = torch.zeros(count, 4096, 4096, device=D) if count <= 8 else None
    held = {}

    def step():
        held["out"] = multi_adapter_linear(x, y, *bank, names, dim)

    graph = captured(step)
    for shift in (0, 1):
        names.copy_((names + 1 + shift) % (count + 1) - 1)
        graph.replay()
        assert torch.equal(bits(held["out"]), bits(multi_adapter_linear(x, y, *bank, names, dim)))
    if full is None:
        return
    for row, name in enumerate(names.tolist()):
        weight = torch.zeros(4096, 4096, device=D, dtype=torch.float64)
        if name >= 0:
            some = slice(int(offsets[name]), int(offsets[name + 1]))
            part = values[some].double()
            weight.index_copy_(dim, index[some], part if dim == 0 else part.t())
        expected = y[row].double() + x[row].double() @ weight.t()
        torch.testing.assert_close(held["out"][row].double(), expected, rtol=2e-2, atol=2e-2)
