"""act_mul, forward and backward, against PyTorch's two operators. Floor: a copy that moves as many bytes.

Gate and up may be the halves of one product, as in a mixture of experts. This is timed against copies of them too.
"""

import torch
from case import Case

from s2ft.ops.act_mul import ACTIVATIONS, reference, reference_backward


def cases(device: str):
    op, backward = torch.ops.s2ft.act_mul.default, torch.ops.s2ft.act_mul_backward.default
    for dtype in (torch.float32, torch.bfloat16):
        for activation in ACTIVATIONS:
            gate, up, grad = (torch.randn(512, 8192, device=device).to(dtype) for _ in range(3))
            size = gate.numel() * gate.element_size()

            def forward(gate=gate, up=up, activation=activation):
                return op(gate, up, activation)

            def forward_torch(gate=gate, up=up, activation=activation):
                return reference(gate, up, activation)

            def both(gate=gate, up=up, grad=grad, activation=activation):
                return backward(grad, gate, up, activation)

            def both_torch(gate=gate, up=up, grad=grad, activation=activation):
                return reference_backward(grad, gate, up, activation)

            name = f"{str(dtype)[6:]} 512 × 8192, {activation}"
            yield Case("act_mul", name, forward, {"torch": forward_torch}, moved=3 * size)
            yield Case("act_mul", name + ", backward", both, {"torch": both_torch}, moved=5 * size)

        halves = torch.randn(512, 2 * 1408, device=device).to(dtype).chunk(2, -1)

        def in_place(halves=halves):
            return op(*halves, "silu")

        def copied(halves=halves):
            return op(*(half.contiguous() for half in halves), "silu")

        def halves_torch(halves=halves):
            return reference(*halves, "silu")

        others = {"copies": copied, "torch": halves_torch}
        size = halves[0].numel() * halves[0].element_size()
        yield Case("act_mul", f"{str(dtype)[6:]} 512 × 1408, silu, halves", in_place, others, moved=3 * size)
