"""swap_ against index_select and index_copy_. Floor: a copy that reads and writes as many bytes."""

import torch
from case import Case

from s2ft.ops import swap_


def cases(device: str):
    for dtype, dim in ((torch.bfloat16, 1), (torch.bfloat16, 0), (torch.float32, 1), (torch.float32, 0)):
        weight = torch.randn(4096, 4096, device=device).to(dtype)
        index = torch.randperm(4096, device=device)[:64]
        values = weight.index_select(dim, index)

        def ours(weight=weight, index=index, values=values, dim=dim):
            swap_(weight, index, values, dim)

        def torch_way(weight=weight, index=index, values=values, dim=dim):
            held = weight.index_select(dim, index)
            weight.index_copy_(dim, index, values)
            values.copy_(held)

        def index_add(weight=weight, index=index, values=values, dim=dim):
            weight.index_add_(dim, index, values)

        yield Case(
            "swap_",
            f"{str(dtype)[6:]} 4096², 64 of dim {dim}",
            ours,
            {"index_select, index_copy_": torch_way, "index_add_": index_add},
            moved=4 * values.numel() * values.element_size(),
        )
