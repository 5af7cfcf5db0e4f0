"""Several linear layers of one input: the same outputs, and gradients of x that are summed in one buffer."""

import pytest
import torch
from state.models import tiny_model
from support.inside import forwards, run_on_one_input
from support.tolerances import GEMM
from torch import nn

import s2ft

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
UNITS = {"plain": None, "slice": {"start": 3, "end": 9}, "index": {"index": torch.tensor([7, 3, 12])}}
PAIRS = [("plain", "plain"), ("plain", "slice"), ("slice", "slice"), ("index", "plain")]
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.cuda))


def layer_of(kind, dtype=torch.float64, bias=True, device="cpu"):
    plain = nn.Linear(12, 20, bias=bias, dtype=dtype, device=device).requires_grad_(False)
    if kind == "plain":
        return plain
    layer = s2ft.S2ColumnLinear.from_module(plain, **UNITS[kind])
    nn.init.normal_(layer.s2)
    return layer


def pair_of(kinds, **options):
    layers = [layer_of(kind, bias=i == 0, **options) for i, kind in enumerate(kinds)]
    return layers, [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]


def is_one_node(outputs):
    return outputs[0].grad_fn is outputs[1].grad_fn


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_outputs_and_delta_gradients_are_those_of_the_layers_and_x_has_their_sum(kinds, dtype, device):
    layers, deltas = pair_of(kinds, dtype=dtype, device=device)
    for shape in ((12,), (5, 12), (2, 3, 12), (0, 12)):
        x = torch.randn(shape, device=device).to(dtype).requires_grad_()
        ours, theirs = run_on_one_input(x, *layers), [layer(x) for layer in layers]
        assert is_one_node(ours)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs))
        upstream = [torch.randn_like(output) for output in ours]
        (found, *others), (expected, *more) = (
            torch.autograd.grad(outputs, (x, *deltas), upstream) for outputs in (ours, theirs)
        )
        rtol, atol = GEMM[dtype]
        scale = expected.abs().max().item() if expected.numel() else 1
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol * scale)
        assert all(torch.equal(one, other) for one, other in zip(others, more))


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_derivatives_of_both_orders_float64(kinds):
    layers, deltas = pair_of(kinds)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)

    def run(x, *_):
        return run_on_one_input(x, *layers)

    assert torch.autograd.gradcheck(run, (x, *deltas))
    assert torch.autograd.gradgradcheck(run, (x, *deltas))


def test_an_output_without_a_gradient_adds_nothing():
    layers, _ = pair_of(("plain", "slice"))
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    for i in (0, 1):
        (found,) = torch.autograd.grad(run_on_one_input(x, *layers)[i].sum(), x)
        torch.testing.assert_close(found, torch.autograd.grad(layers[i](x).sum(), x)[0])


def test_x_is_kept_only_if_a_delta_trains():
    for kinds, expected in ((("plain", "plain"), False), (("plain", "slice"), True)):
        layers, _ = pair_of(kinds)
        x, kept = torch.randn(3, 12, dtype=torch.float64, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
            run_on_one_input(x, *layers)
        of_layers = {parameter.data_ptr() for layer in layers for parameter in layer.parameters()}
        assert [t.data_ptr() for t in kept if t.data_ptr() not in of_layers] == [x.data_ptr()] * expected


def hooked(layers):
    layers[0].register_forward_hook(lambda module, inputs, output: output * 2)


def replaced(layers):
    layers[1].forward = lambda x: nn.Linear.forward(layers[1], x) * 2


def fused(layers):
    layers[0] = layer_of("slice")
    layers[0].eval().fuse()


def off(layers):
    layers[0] = layer_of("slice")
    layers[0].enabled = False


def derived(layers):
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    layers[0].__class__ = Doubled


CASES = {
    "hook": hooked,
    "another forward": replaced,
    "fused": fused,
    "adapter off": off,
    "derived class": derived,
    "bias that trains": lambda layers: layers[0].bias.requires_grad_(),
    "weight that trains": lambda layers: layers[0].weight.requires_grad_(),
    "another layer": lambda layers: layers.__setitem__(1, nn.Identity()),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_layer_does_besides_its_product_is_not_lost(case):
    layers, _ = pair_of(("plain", "plain"))
    CASES[case](layers)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    found = run_on_one_input(x, *layers)
    assert not is_one_node(found)
    assert all(torch.equal(one, layer(x)) for one, layer in zip(found, layers))


def test_global_hooks_and_autocast_see_the_layers():
    layers, _ = pair_of(("plain", "slice"), dtype=torch.float32)
    x, seen = torch.randn(3, 12, requires_grad=True), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        run_on_one_input(x, *layers)
    finally:
        handle.remove()
    assert seen == layers
    with torch.autocast("cpu", torch.bfloat16):
        assert [y.dtype for y in run_on_one_input(x, *layers)] == [torch.bfloat16] * 2


def test_a_gated_ffn_shares_the_gradient_of_its_input_where_products_add_fast(monkeypatch):
    """On GPUs. Here the CPU takes that path."""
    x = torch.randn(2, 5, 24, requires_grad=True)
    found = {}
    for shares in (False, True):
        torch.manual_seed(0)
        model = tiny_model("llama")
        s2ft.attach(model, s2ft.S2FTConfig(u_ratio=0.1, d_ratio=0.1))
        monkeypatch.setattr(forwards, "adds_products_fast", lambda x, shares=shares: shares)
        block = model.model.layers[0].mlp
        trained = [p for p in block.parameters() if p.requires_grad]
        y = block(x)
        assert len(trained) == 2 and ("_Linears" in _nodes(y)) == shares
        found[shares] = y, torch.autograd.grad(y.square().sum(), (x, *trained))
    (y, (grad_x, *slices)), (other, (other_grad_x, *other_slices)) = found.values()
    assert torch.equal(y, other) and all(map(torch.equal, slices, other_slices))
    torch.testing.assert_close(grad_x, other_grad_x)


def _nodes(y):
    """The names of all nodes of a graph, joined."""
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return " ".join(type(node).__name__ for node in seen)
