"""sliced_linear and indexed_linear, forward and backward, against LoRA and against training the whole weight.

LoRA is PEFT's layer with rank 16, with adapters in the weight's dtype and, as PEFT makes them, in float32. Floor: the
two products of a frozen layer, the forward and the input's gradient. sliced_linear trains 3 % of the inputs or outputs,
and indexed_linear trains three heads of 64. The case with 4096 tokens runs on a GPU only: on a CPU it takes minutes.
"""

import torch
import torch.nn.functional as F
from case import Case
from torch import nn

from s2ft.ops import indexed_linear, sliced_linear


def lora_layer(weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
    """PEFT's layer with adapters in `dtype`."""
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.layer import Linear

    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    base.weight = nn.Parameter(weight, requires_grad=False)
    layer = Linear(base, "default", config=LoraConfig(r=16, lora_alpha=32), r=16, lora_alpha=32)
    for adapter in (layer.lora_A, layer.lora_B):
        adapter.to(device=weight.device, dtype=dtype)
    return layer


def step_of(forward, x, grad):
    """A step that runs `forward` and its backward. The gradient of x is dropped before each step."""

    def step():
        x.grad = None
        forward(x).backward(grad)

    return step


def cases(device: str):
    for dtype, tokens, outputs, inputs in (
        (torch.float32, 512, 576, 1536),
        (torch.bfloat16, 512, 576, 1536),
        (torch.bfloat16, 256, 4096, 14336),
        *([(torch.bfloat16, 4096, 4096, 14336)] if device == "cuda" else []),
    ):
        for op, dim in ((sliced_linear, 0), (sliced_linear, 1), (indexed_linear, 0), (indexed_linear, 1)):
            yield case_of(device, op, dim, dtype, tokens, outputs, inputs)


def case_of(device, op, dim, dtype, tokens, outputs, inputs):
    size = (outputs, inputs)[dim]
    x = torch.randn(tokens, inputs, device=device).to(dtype).requires_grad_()
    weight, grad = (torch.randn(shape, device=device).to(dtype) for shape in ((outputs, inputs), (tokens, outputs)))
    if op is sliced_linear:
        units, count = size // 3, round(0.03 * size)
    else:  # three heads
        units = torch.cat([torch.arange(64, device=device) + 64 * head for head in (1, 4, 6)])
        count = len(units)
    delta = torch.zeros((count, inputs) if dim == 0 else (outputs, count), device=device).to(dtype).requires_grad_()
    full = weight.clone().requires_grad_()
    loras = {f"LoRA r=16, {str(kept)[6:]}": lora_layer(weight, kept) for kept in dict.fromkeys((dtype, torch.float32))}
    return Case(
        op.__name__,
        f"{str(dtype)[6:]} {tokens} × {inputs} → {outputs}, {count} of dim {dim}",
        step_of(lambda x: op(x, weight, delta, units, dim), x, grad),
        {
            **{name: step_of(lora, x, grad) for name, lora in loras.items()},
            "all trained": step_of(lambda x: F.linear(x, full), x, grad),
        },
        product=step_of(lambda x: F.linear(x, weight), x, grad),
    )
