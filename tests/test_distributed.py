"""Two gloo ranks under DDP and FSDP2 train the same slices as one process."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from support.rounding import set_up_kernels
from torch import nn

from s2ft import S2ColumnLinear, S2RowLinear

RANKS = 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = S2ColumnLinear(16, 32, start=3, end=9)
        self.down = S2RowLinear(32, 16, index=torch.tensor([4, 1, 7]))

    def forward(self, x):
        return x + self.down(F.silu(self.up(x)))


def network():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), Block())


def train(model, part):
    """Train six AdamW steps on the rows `part` of the batch. Returns the trained slices, unsharded."""
    from torch.distributed.tensor import DTensor

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        x, target = (torch.randn(4, 5, 16, generator=generator)[part] for _ in range(2))
        (model(x) - target).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in trained]


def wrapped(kind):
    from torch.distributed.fsdp import fully_shard

    model = network()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for block in model:
        fully_shard(block)
    fully_shard(model)
    return model


def run_rank(rank, kind, port, results):
    set_up_kernels()  # as in the process that gives the expected numbers
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    rows = 4 // RANKS
    slices = train(wrapped(kind), slice(rank * rows, (rank + 1) * rows))
    if rank == 0:
        torch.save(slices, results)
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ("fsdp2", pytest.param("ddp", marks=pytest.mark.slow)))
def test_two_ranks_train_what_one_trains(kind, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run_rank, args=(kind, port, tmp_path / "slices"), nprocs=RANKS)
    for ours, alone in zip(torch.load(tmp_path / "slices"), train(network(), slice(None))):
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-6)
