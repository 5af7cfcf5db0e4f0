"""grouped_linear, forward and backward, against a loop over the experts and against training all of their weights.

An eighth of the units of 32 experts is trained. Floor: the two grouped products of frozen experts, the forward and the
input's gradient.
"""

import torch
import torch.nn.functional as F
from case import Case

from s2ft.ops import grouped_linear, indexed_linear

EXPERTS, UNITS = 32, 8  # one of UNITS units is trained


def step_of(forward, x, grad):
    """A step that runs `forward` and its backward. The gradient of x is dropped before each step."""

    def step():
        x.grad = None
        forward(x).backward(grad)

    return step


def cases(device: str):
    for dtype, tokens, outputs, inputs in ((torch.float32, 2048, 256, 256), (torch.bfloat16, 2048, 256, 256)):
        for dim in (0, 1):
            yield case_of(device, dim, dtype, tokens, outputs, inputs)


def case_of(device, dim, dtype, tokens, outputs, inputs):
    size = (outputs, inputs)[dim]
    count = size // UNITS
    x = torch.randn(tokens, inputs, device=device).to(dtype).requires_grad_()
    weight, grad = (torch.randn(s, device=device).to(dtype) for s in ((EXPERTS, outputs, inputs), (tokens, outputs)))
    rows = torch.full((EXPERTS,), tokens // EXPERTS)
    offsets = rows.cumsum(0, dtype=torch.int32).to(device)
    units = [torch.randperm(size)[:count].to(device) for _ in range(EXPERTS)]
    index = torch.cat([expert * size + each for expert, each in enumerate(units)])
    n = EXPERTS * count
    delta = torch.zeros((n, inputs) if dim == 0 else (outputs, n), device=device).to(dtype).requires_grad_()
    full = weight.clone().requires_grad_()

    def loop(x):
        parts = zip(x.split(rows.tolist()), weight, delta.split(count, dim), units)
        return torch.cat([indexed_linear(part, one, change, each, dim) for part, one, change, each in parts])

    return Case(
        "grouped_linear",
        f"{str(dtype)[6:]} {tokens} × {inputs} → {outputs}, {EXPERTS} experts, {count} of dim {dim}",
        step_of(lambda x: grouped_linear(x, weight, delta, index, offsets, dim, count), x, grad),
        {
            "one after the other": step_of(loop, x, grad),
            "all trained": step_of(lambda x: F.grouped_mm(x, full.transpose(1, 2), offs=offsets), x, grad),
        },
        product=step_of(lambda x: F.grouped_mm(x, weight.transpose(1, 2), offs=offsets), x, grad),
    )
