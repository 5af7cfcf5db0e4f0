"""Devices that share each row (context parallelism) train the adapter of one process: s2ft sft, and plain Trainers."""

from dataclasses import replace

import pytest
import torch
from runs import check_same_files, reset, unchanged_environment
from support.context_on_cpu import allow as allow_context
from support.fsdp_on_cpu import allow
from support.inside import HeldOut, RunFolder, RunOptions, SFTArguments, read_log, sft
from support.states import tensors_of, with_adapter
from train.test_sft import CONFIG, token_rows
from train.tiny import tiny_model, tiny_tokenizer

FSDP = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
}


def arguments_for(folder, context=1, data=1, **changes):
    """Updates of four rows."""
    from accelerate import ParallelismConfig

    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, save_steps=2)
    if context > 1:
        reset()
        allow()
        allow_context()
        parallelism = ParallelismConfig(cp_size=context, dp_shard_size=data)
        options.update(fsdp=True, fsdp_config=FSDP, parallelism_config=parallelism)
    options["gradient_accumulation_steps"] = 2 // data
    options.update(learning_rate=1e-2, max_grad_norm=0.3, eval_strategy="steps", eval_steps=2, **changes)
    return SFTArguments(output_dir=str(folder), **options)


def train(rank, folder, context=1, data=1, layout="permuted", chunked=True, changes=None):
    """Train the tiny model. Returns the log's losses."""
    model, rows = with_adapter(tiny_model(), replace(CONFIG, layout=layout)), token_rows(16)
    arguments, place = arguments_for(folder, context, data, **(changes or {})), RunFolder(folder)
    if rank == 0:
        place.begin({})
    held_out = HeldOut(rows)
    sft(model, tiny_tokenizer(), rows, arguments, place, options=RunOptions(chunked_loss=chunked), held_out=held_out)
    names = ("step", "loss", "grad_norm", "eval_loss")
    return [{name: line[name] for name in names if name in line} for line in read_log(place.log)]


def check_log(ours, theirs):
    assert ours == [pytest.approx(line, rel=1e-4) for line in theirs] and len(ours) == 6


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    """The log and the adapter of one process."""
    folder = tmp_path_factory.mktemp("alone")
    with unchanged_environment():
        return train(0, folder), folder / "adapter"


@pytest.mark.parametrize(
    "layout, chunked, changes", [("permuted", True, {}), ("indexed", False, {"gradient_checkpointing": True})]
)
def test_two_devices_share_each_row(ranks, by_one, tmp_path, layout, chunked, changes):
    check_log(ranks(train, tmp_path, 2, 1, layout, chunked, changes)[0], by_one[0])
    (check_same_files if layout == "permuted" else check_same_deltas)(tmp_path / "adapter", by_one[1])


def check_same_deltas(ours, theirs):
    torch.testing.assert_close(tensors_of(ours), tensors_of(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_four_devices_in_two_groups(four_ranks, by_one, tmp_path):
    check_log(four_ranks(train, tmp_path, 2, 2)[0], by_one[0])
    check_same_files(tmp_path / "adapter", by_one[1])
