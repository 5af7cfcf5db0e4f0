"""permute_ against indexing in PyTorch, which makes a second matrix. Floor: a copy of the weight."""

from pathlib import Path

import torch
from case import Case

from s2ft.ops import permute_


def order_of(size: int, moved: float) -> torch.Tensor:
    """A permutation that moves the fraction `moved` of the units."""
    order, chosen = torch.arange(size), torch.randperm(size)[: int(moved * size)]
    order[chosen.sort().values] = chosen[torch.randperm(len(chosen))]
    return order


def peak_growth(step) -> float | None:
    """The MiB by which a step raises the peak memory of the process above its memory before. None if unreadable."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before = peak()
        step()
        return round(peak() - before, 1)
    except (OSError, StopIteration):
        return None


def peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def cases(device: str):
    for dtype, dim, moved in (
        (torch.bfloat16, 1, 1.0),
        (torch.bfloat16, 1, 0.06),
        (torch.bfloat16, 0, 1.0),
        (torch.float32, 1, 1.0),
    ):
        weight = torch.randn(4096, 14336, device=device).to(dtype)
        order = order_of(weight.shape[dim], moved).to(device)

        def ours(weight=weight, order=order, dim=dim):
            permute_(weight, order, dim)

        def indexing(weight=weight, order=order, dim=dim):
            return weight.index_select(dim, order)

        def in_place(weight=weight, order=order, dim=dim):
            weight.copy_(weight.index_select(dim, order))

        yield Case(
            "permute_",
            f"{str(dtype)[6:]} 4096 × 14336, dim {dim}, {moved:.0%} moved",
            ours,
            {"index_select": indexing, "index_select, copy_": in_place},
            moved=2 * weight.numel() * weight.element_size(),
            note={"peak MiB more": peak_growth(ours)},
        )
