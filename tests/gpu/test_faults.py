"""Memory that runs out and interrupts, in the middle of an op: the base is back afterwards, bit for bit."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.gpu import Layer, check_frozen, frozen, reference, small_model
from support.models import train

from s2ft.ops import sliced_linear

LIMIT = 2 << 30  # bytes that this process may take


@pytest.fixture
def little_memory():
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(LIMIT / torch.cuda.mem_get_info()[1])
    yield
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.cuda
@pytest.mark.alone
@pytest.mark.parametrize("op", (sliced_linear, reference), ids=("op", "reference"))
def test_memory_that_runs_out_inside_the_product(op, little_memory):
    """The output is far larger than the input, so its allocation fails while the weight holds base + delta."""
    layer = Layer("cuda", shape=(16384, 64), units=8, tokens=16)
    op(*layer.arguments())  # loads kernels and makes handles
    many = layer.x[:1].repeat(2 * LIMIT // (2 * layer.weight.shape[0]), 1)
    with pytest.raises(torch.OutOfMemoryError):
        op(many, *layer.arguments()[1:])
    torch.cuda.empty_cache()
    layer.check_base()
    assert torch.equal(op(*layer.arguments()), F.linear(layer.x, layer.merged()))


@pytest.mark.cuda
@pytest.mark.alone
def test_memory_that_runs_out_in_a_training_step(little_memory):
    model, ids = small_model("cuda")
    before = frozen(model)
    step = partial(train, model, 1, lr=1e-3, loss_of=lambda model: model(input_ids=ids, labels=ids).loss)
    expected = step()
    many = ids.repeat(2 * LIMIT // (ids.numel() * 1000 * 4), 1)  # float32 logits of twice the memory
    with pytest.raises(torch.OutOfMemoryError):
        model(input_ids=many, labels=many).loss.backward()
    torch.cuda.empty_cache()
    check_frozen(model, before)
    assert step()[0] < expected[0]
