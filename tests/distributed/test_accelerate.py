"""A loop with accelerate on two ranks: prepare, backward, clip_grad_norm_, accumulate, save_state, load_state."""

import pytest
import torch
from runs import attached, batches, blocks_of, check_same_files, reset, rows_of
from support.fsdp_on_cpu import allow
from support.pairs import in_turn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

import s2ft


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
    """Steps of AdamW on this rank's rows."""

    def __init__(self, way, model, rank):
        self.accelerator, self.rank, self.batches = accelerator_for(way, model), rank, batches(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        assert isinstance(self.model, DistributedDataParallel if way == "ddp" else FSDPModule)

    def run(self, first, last, directory):
        self.model.train()
        for batch in self.batches[first:last]:
            half = batch[rows_of(self.rank)]
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(input_ids=half, labels=half).loss)
                self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.optimizer.zero_grad()
        s2ft.save_adapter(self.accelerator.unwrap_model(self.model), directory)
        return self


def run_at_once_and_resumed(rank, way, layout, directory):
    Loop(way, attached("llama-grouped", layout), rank).run(0, 4, directory / "whole")
    first = Loop(way, attached("llama-grouped", layout), rank).run(0, 2, directory / "first")
    first.accelerator.save_state(str(directory / "state"))
    again = Loop(way, attached("llama-grouped", layout), rank)
    again.accelerator.load_state(str(directory / "state"))
    again.run(2, 4, directory / "again")


@pytest.mark.parametrize(
    "way, layout",
    [
        *in_turn(("ddp", "fsdp", "fsdp checkpointed", "fsdp state whole"), ("permuted", "indexed")),
        *(
            pytest.param(way, layout, marks=pytest.mark.slow)
            for way in ("fsdp root", "fsdp kept")  # test_equals_one_process.py has both
            for layout in ("permuted", "indexed")
        ),
    ],
)
def test_trains_and_resumes_exactly(ranks, alone, way, layout, tmp_path):
    ranks(run_at_once_and_resumed, way, layout, tmp_path)
    check_same_files(tmp_path / "again", tmp_path / "whole", exactly=True)
    check_same_files(tmp_path / "whole", alone("llama-grouped", layout))
