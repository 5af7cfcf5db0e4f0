"""A loop with accelerate on two ranks: prepare, backward, clip_grad_norm_, accumulate, save_state, load_state."""

import pytest
import torch
from runs import attached, batches, blocks_of, check_same_files, reset, rows_of
from support.fsdp_on_cpu import allow
from support.pairs import in_turn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

import s2ft

WAYS = ("ddp", "fsdp", "fsdp root", "fsdp kept", "fsdp checkpointed", "fsdp state whole")


def accelerator_for(way, model, **options):
    """A new Accelerator."""
    allow()
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    reset()
    if way != "ddp":
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="no_wrap" if "root" in way else "transformer_based_wrap",
            transformer_cls_names_to_wrap=[type(blocks_of(model)[0]).__name__],
            reshard_after_forward="kept" not in way,
            activation_checkpointing="checkpointed" in way,
            cpu_ram_efficient_loading="efficient" in way,
            state_dict_type="FULL_STATE_DICT" if "whole" in way else "SHARDED_STATE_DICT",
        )
    return Accelerator(cpu=True, **options)


class Loop:
    """Steps of AdamW with a decaying rate on this rank's rows."""

    def __init__(self, way, model, rank, steps=8, **options):
        self.accelerator, self.rank, self.steps = accelerator_for(way, model, **options), rank, steps
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, total_iters=steps)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)
        assert isinstance(self.model, DistributedDataParallel if way == "ddp" else FSDPModule)
        self.schedule.split_batches = True  # each call advances the schedule by one step
        self.batches = batches(model, steps)

    @property
    def plain(self):
        return self.accelerator.unwrap_model(self.model)

    def run(self, first, last):
        self.model.train()
        for batch in self.batches[first:last]:
            half = batch[rows_of(self.rank)]
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(input_ids=half, labels=half).loss)
                self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        self.model.eval()
        return self


def run_at_once_and_resumed(rank, way, layout, directory):
    whole = Loop(way, attached("llama-grouped", layout), rank).run(0, 8)
    s2ft.save_adapter(whole.plain, directory / "whole")
    first = Loop(way, attached("llama-grouped", layout), rank).run(0, 4)
    first.accelerator.save_state(str(directory / "state"))
    again = Loop(way, attached("llama-grouped", layout), rank)
    again.accelerator.load_state(str(directory / "state"))
    again.run(4, 8)
    s2ft.save_adapter(again.plain, directory / "again")


@pytest.mark.parametrize("way, layout", in_turn(WAYS, ("permuted", "indexed")))
def test_trains_and_resumes_exactly(ranks, way, layout, tmp_path):
    ranks(run_at_once_and_resumed, way, layout, tmp_path)
    check_same_files(tmp_path / "again", tmp_path / "whole", exactly=True)
    model = attached("llama-grouped", layout)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, total_iters=8)
    model.train()
    for batch in batches(model, 8):  # one process with twice the accumulation
        for half in (batch[rows_of(0)], batch[rows_of(1)]):
            (model(input_ids=half, labels=half).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    s2ft.save_adapter(model, tmp_path / "alone")
    check_same_files(tmp_path / "whole", tmp_path / "alone")
