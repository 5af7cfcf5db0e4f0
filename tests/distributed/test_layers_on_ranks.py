"""Two gloo ranks under DDP and FSDP2 train the same slices as one process."""

import pytest
import torch
import torch.nn.functional as F
from support.ranks import RANKS
from torch import nn

from s2ft import S2ColumnLinear, S2RowLinear


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
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in trained]


def wrapped(kind):
    from torch.distributed.fsdp import fully_shard

    model = network()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for block in model:
        fully_shard(block)
    fully_shard(model)
    return model


def train_on_rank(rank, kind):
    rows = 4 // RANKS
    return train(wrapped(kind), slice(rank * rows, (rank + 1) * rows))


@pytest.mark.parametrize("kind", ("fsdp2", "ddp"))
def test_two_ranks_train_what_one_trains(ranks, kind):
    for ours, alone in zip(ranks(train_on_rank, kind)[0], train(network(), slice(None)), strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-6)
