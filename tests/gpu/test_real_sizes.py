"""Ops at the sizes of large models: bit for bit, every 16-bit number, more than 2^31 elements, and many switches."""

import pytest
import torch
import torch.nn.functional as F
from support.gpu import DEVICES, DOWN_PROJ, Layer, bits
from support.inside import EXPERTS
from support.tolerances import GEMM
from torch import nn

from s2ft.ops import act_mul, indexed_linear, permute_, scatter_add_, sliced_linear, swap_

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("units,start", ((430, 0), (432, 0), (430, 333), (1, 4095), (512, 8)))
@pytest.mark.parametrize("dim", (0, 1))
def test_products_equal_those_of_the_merged_weight(dim, units, start, dtype, device):
    layer = Layer(device, dtype, units=units, start=start, dim=dim)
    merged, inputs = layer.merged(), layer.weight.shape
    grad = torch.randn(len(layer.x), inputs[0], device=device).to(dtype)
    assert torch.equal(sliced_linear(*layer.arguments()), F.linear(layer.x, merged))
    x = layer.x.clone().requires_grad_()
    sliced_linear(x, *layer.arguments()[1:]).backward(grad)
    assert torch.equal(x.grad, grad @ merged)
    index = torch.arange(layer.start, layer.start + layer.delta.shape[dim], device=device)
    assert torch.equal(indexed_linear(layer.x, layer.weight, layer.delta, index, dim), F.linear(layer.x, merged))
    layer.check_base()


@pytest.mark.cuda
@pytest.mark.alone
def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    rows, columns = (1 << 31) // 8192 + 64, 8192
    weight = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda").random_(-8, 8)
    tail, delta = weight[-64:].clone(), torch.ones(64, columns, device="cuda")
    x = torch.eye(8, columns, device="cuda", dtype=torch.bfloat16)
    y = sliced_linear(x, weight, delta, rows - 64, 0)
    assert torch.equal(y[:, -64:], (tail[:, :8] + 1).t())
    index = torch.arange(rows - 64, rows, device="cuda")
    assert torch.equal(indexed_linear(x, weight, delta, index, 0), y) and torch.equal(weight[-64:], tail)
    scatter_add_(weight, index, delta, 0)
    assert torch.equal(weight[-64:], tail + 1)
    swap_(weight, index, tail, 0)
    assert torch.equal(tail - 1, weight[-64:])  # the two were exchanged
    del y
    assert torch.equal(act_mul(weight, torch.ones_like(weight), "relu")[-64:], weight[-64:].clamp(min=0))


@pytest.mark.parametrize("device", DEVICES)
def test_a_thousand_switches_restore_the_base(device):
    outputs, inputs, units, count = (*DOWN_PROJ, 430, 1000) if device == "cuda" else (64, 160, 5, 50)
    weight = torch.randn(outputs, inputs, device=device).bfloat16()
    before = weight.clone()
    for turn in range(count):
        dim = turn % 2
        index = torch.randperm(weight.shape[dim], device=device)[:units]
        shape = (units, inputs) if dim == 0 else (outputs, units)
        old = torch.empty(shape, device=device, dtype=torch.bfloat16)
        scatter_add_(weight, index, torch.randn(shape, device=device), dim, replaced=old)
        swap_(weight, index, old, dim)
    assert torch.equal(bits(weight), bits(before))
    for dim in (0, 1):
        order = torch.randperm(weight.shape[dim], device=device)
        permute_(weight, order, dim)
        assert torch.equal(weight, before.index_select(dim, order))
        permute_(weight, order.argsort(), dim)
        assert torch.equal(bits(weight), bits(before))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", (0, 1))
def test_experts_at_real_sizes(dim, device):
    """The experts of Qwen3-30B-A3B, some of them without tokens."""
    experts, outputs, inputs, per = (128, 2048, 768, 96) if device == "cuda" else (8, 32, 24, 3)
    rows = torch.randint(0, 64, (experts,))
    rows[::5] = 0
    weight = (torch.randn(experts, outputs, inputs, device=device) / 32).bfloat16()
    index = {expert: torch.randperm((outputs, inputs)[dim])[:per] for expert in range(experts)}
    layer = EXPERTS.layers[dim](nn.Parameter(weight.clone()), index, torch.float32)
    torch.nn.init.normal_(layer.s2, std=1 / 32)
    x = torch.randn(int(rows.sum()), inputs, device=device).bfloat16().requires_grad_()
    got = layer(x, rows.cumsum(0, dtype=torch.int32).to(device))
    merged = weight.clone()
    for (expert, units), part in zip(index.items(), layer.s2.detach().split(per, dim)):
        own = units.to(device)
        merged[expert].index_copy_(dim, own, (weight[expert].index_select(dim, own) + part).bfloat16())
    assert torch.equal(bits(layer.weight), bits(merged))
    expected = [F.linear(part, one) for part, one in zip(x.split(rows.tolist()), merged)]
    rtol, atol = GEMM[torch.bfloat16]
    torch.testing.assert_close(got, torch.cat(expected), rtol=rtol, atol=atol)

    grad = torch.randn_like(got)
    got.backward(grad)
    grads, inputs_of = grad.split(rows.tolist()), x.detach().split(rows.tolist())
    expected_x = [part @ one for part, one in zip(grads, merged)]
    torch.testing.assert_close(x.grad, torch.cat(expected_x), rtol=rtol, atol=atol)
    for expert, part in enumerate(layer.s2.grad.split(per, dim)):
        whole = grads[expert].float().t() @ inputs_of[expert].float()
        wanted = whole.index_select(dim, index[expert].to(device))
        torch.testing.assert_close(part, wanted, rtol=rtol, atol=atol)
        assert rows[expert] or not part.any(), f"expert {expert} has no tokens, and a gradient"
    layer.unfuse()
    assert torch.equal(bits(layer.weight), bits(weight))
