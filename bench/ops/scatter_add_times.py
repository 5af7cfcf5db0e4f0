"""scatter_add_ against index_add_, and against merging a LoRA of as many numbers, in the weight's dtype and in float32.

Floor: a copy that moves the bytes of the delta once and those of the changed units twice.
"""

import torch
from case import Case

from s2ft.ops import scatter_add_

RANK = 32  # 2 * 4096 * 32 numbers, as many as 64 rows or columns of 4096 have


def cases(device: str):
    for dtype, dim, deltas in (
        (torch.bfloat16, 1, 1),
        (torch.bfloat16, 0, 1),
        (torch.float32, 1, 1),
        (torch.float32, 0, 1),
        (torch.bfloat16, 1, 4),
        (torch.bfloat16, 0, 4),
    ):
        weight = torch.randn(4096, 4096, device=device).to(dtype)
        index = [torch.randperm(4096, device=device)[:64] for _ in range(deltas)]
        delta = [1e-3 * torch.randn((64, 4096) if dim == 0 else (4096, 64), device=device).to(dtype) for _ in index]
        alpha = [0.5**j for j in range(deltas)]
        b, a = torch.zeros(4096, RANK, device=device, dtype=dtype), torch.randn(RANK, 4096, device=device).to(dtype)

        def ours(weight=weight, index=index, delta=delta, alpha=alpha, dim=dim):
            scatter_add_(weight, index, delta, dim, alpha)

        def torch_way(weight=weight, index=index, delta=delta, alpha=alpha, dim=dim):
            for i, d, factor in zip(index, delta, alpha):
                weight.index_add_(dim, i, d, alpha=factor)

        def lora_merge(weight=weight, a=a, b=b, deltas=deltas):
            for _ in range(deltas):
                weight.add_((b @ a) * 2.0)

        def lora_merge_float32(weight=weight, a=a.float(), b=b.float(), deltas=deltas):
            for _ in range(deltas):
                weight.add_(((b @ a) * 2.0).to(weight.dtype))

        rivals = {"index_add_": torch_way, "LoRA merge": lora_merge}
        if dtype != torch.float32:  # as PEFT makes its adapters
            rivals["LoRA merge, float32"] = lora_merge_float32
        size = weight.element_size()
        touched = torch.cat(index).unique().numel() * 4096 * size
        yield Case(
            "scatter_add_",
            f"{str(dtype)[6:]} 4096², {deltas} × 64 of dim {dim}",
            ours,
            rivals,
            moved=2 * touched + sum(d.numel() for d in delta) * size,
        )
