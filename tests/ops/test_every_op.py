"""Hazards that all ops have in common, over the table of their calls."""

from contextlib import nullcontext

import pytest
import torch
from ops.cases import ALL, DIFFERENTIABLE, DTYPES, LINEAR, REGISTERED, SMALL, TRAINED, upstream_of
from support.gpu import DEVICES
from support.slices import bytes_kept
from support.tolerances import assert_close
from support.waits import References


def named(table):
    return pytest.mark.parametrize("name", table)


def made(name, every_delta=True):
    """The case in every dtype, with deltas of the same dtype and, where there are any, of all others."""
    has_delta = "multi" not in name and any(part in name for part in ("linear", "scatter", "write"))
    for dtype in DTYPES:
        yield dtype, ALL[name](dtype=dtype)
        for other in DTYPES if has_delta and every_delta else ():
            yield dtype, ALL[name](dtype=dtype, delta_dtype=other)


@pytest.mark.parametrize("device", DEVICES)
@named(ALL)
def test_results_and_gradients_are_those_of_the_definition(name, device):
    """The output of a layer has the bits of the merged weight, so that trained is merged; so has a changed tensor."""
    for dtype, case in made(name, every_delta=name in SMALL):
        ours, theirs = case.results(device=device), case.results(case.definition, device)
        assert_close(ours, theirs, dtype, exact=case.is_exact * max(1, case.changed))


@named(ALL)
def test_compiled_kernels_are_the_references_bit_for_bit(name):
    for dtype, case in made(name):
        for op, arguments in case.registered:
            results = []
            for runs_reference in (False, True):
                given = [copied(argument) for argument in arguments]
                with References() if runs_reference else nullcontext():
                    out = getattr(REGISTERED, op)(*given)
                results.append([*([out] if isinstance(out, torch.Tensor) else out or ()), *flat(given)])
            sums = name.startswith(("act_mul", "multi_adapter_linear"))  # in another order
            assert_close(*results, dtype, exact=0 if sums else len(results[0]))


def copied(argument):
    if isinstance(argument, list):
        return [copied(one) for one in argument]
    return argument.detach().clone() if isinstance(argument, torch.Tensor) else argument


def flat(arguments):
    every = [one for argument in arguments for one in (argument if isinstance(argument, list) else [argument])]
    return [one for one in every if isinstance(one, torch.Tensor)]


@named(DIFFERENTIABLE)
def test_first_and_second_derivatives_float64(name):
    """A gradient penalty or a Hessian-vector product needs the second ones."""
    case = DIFFERENTIABLE[name](dtype=torch.float64)
    assert torch.autograd.gradcheck(case.call, case.leaves) and torch.autograd.gradgradcheck(case.call, case.leaves)


@named([*SMALL, *(f"{name} (7, 11, 2, 3) (2, 1, 3) False" for name in LINEAR)])
def test_opcheck(name):
    for op, arguments in ALL[name]().registered:
        torch.library.opcheck(getattr(REGISTERED, op).default, arguments)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@named(SMALL)
def test_torch_compile_fullgraph(name):
    """Later operations of the graph use the result."""
    for dtype in (torch.float32, torch.bfloat16):
        case = SMALL[name](dtype=dtype, **({"delta_dtype": torch.float32} if name in TRAINED else {}))

        def run(*tensors, case=case):
            out = case.run(*tensors)
            return (tensors[0] if case.changed else out) * 2

        assert all(map(torch.equal, case.results(compiled(run)), case.results(run)))


@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=str)
@named(TRAINED)
def test_autocast(name, low):
    """base + delta is added in float32 and rounded once. Gradients stay in float32."""
    case = TRAINED[name]()
    with torch.autocast("cpu", low):
        expected = case.results(case.definition)
        for run in (case.run, compiled(case.run)):
            ours = case.results(run)
            assert [one.dtype for one in ours] == [low, *[torch.float32] * len(case.leaves)]
            assert_close(ours[:1], expected[:1], low, exact=case.is_exact)


LAYOUTS = {
    "strided": lambda t: torch.stack([t, t], -1).repeat_interleave(2, 0)[::2, ..., 0],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.filterwarnings("ignore:torch.searchsorted.*non-contiguous")
@pytest.mark.parametrize("layout", LAYOUTS)
@named(SMALL)
def test_layouts(name, layout):
    case = SMALL[name]()
    assert_close(case.results(lay=LAYOUTS[layout]), case.results(case.definition), torch.float32)


@named(TRAINED)
def test_a_weight_with_one_matrix_or_row_in_all_places(name):
    case = TRAINED[name]()
    case.tensors = [tensor[:1].expand(tensor.shape) if i == 1 else tensor for i, tensor in enumerate(case.tensors)]
    expected = case.definition(*case.tensors)
    assert_close([case.run(*case.tensors)], [expected], torch.float32)
    assert_close(
        torch.autograd.grad(case.run(*case.tensors), case.leaves, upstream_of(expected)),
        torch.autograd.grad(expected, case.leaves, upstream_of(expected)),
        torch.float32,
    )


# Bytes beside the arguments: the selected columns of x, as a copy, because a view would keep all of x.
KEPT = {
    "sliced_linear 1": 4 * 3 * 3 * 4,
    "indexed_linear 1": 4 * 3 * 3 * 4,
    "act_mul silu": 7 * 9 * 4,  # the gate itself
}


@pytest.mark.parametrize("trains", (True, False))
@named(KEPT)
def test_backward_keeps_only_what_it_needs_of_x(name, trains):
    """A frozen delta keeps nothing."""
    case = SMALL[name]()
    x, *rest = case.tensors if trains else (tensor.detach() for tensor in case.tensors)
    assert bytes_kept(rest, lambda: case.run(x, *rest)) == trains * KEPT[name]


@named([*DIFFERENTIABLE, *(name for name in ALL if name.startswith(tuple(LINEAR)) and "(7, 11, 2, 3)" in name)])
def test_a_model_may_change_the_output_in_place(name):
    """As nn.ReLU(inplace=True), the attention of Longformer and OLMo's clip_qkv do. Autograd refuses it for a view."""
    case = ALL[name]()
    assert_close(
        case.results(lambda *tensors: case.run(*tensors).mul_(2).relu_()),
        case.results(lambda *tensors: (case.definition(*tensors) * 2).relu()),
        torch.float32,
    )


@named(TRAINED)
def test_two_forwards_before_backward(name):
    """The backward of an earlier call still runs."""
    case = TRAINED[name]()
    x, *rest = case.leaves
    (case.call(x, *rest) + case.call(x * 2, *rest)).sum().backward()
    assert all(leaf.grad is not None for leaf in case.leaves)


@named([name for name in TRAINED if name.endswith("1")])
def test_a_delta_that_changes_before_the_backward_is_an_error(name):
    case = TRAINED[name]()
    y = case.run(*case.tensors)
    with torch.no_grad():
        case.tensors[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
