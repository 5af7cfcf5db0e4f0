"""DDP on two ranks trains and saves the same adapter as one process with twice the accumulation."""

import pytest
import torch
from runs import attached, check_same_files, train
from support.pairs import in_turn
from torch.nn.parallel import DistributedDataParallel

import s2ft

WAYS = {"plain": {}, "static": {"static_graph": True}, "views": {"gradient_as_bucket_view": True}}


def train_and_save(rank, case, layout, way, directory, checkpointing):
    """Both ranks save to one folder at once, as a script that does not check its rank does."""
    model = attached(case, layout)
    base = {key: value.detach().clone() for key, value in model.named_parameters() if not value.requires_grad}
    if checkpointing is not None:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": checkpointing})
    wrapper = DistributedDataParallel(model, **WAYS[way])
    train(model, rank, forward=wrapper)
    s2ft.save_adapter(wrapper.module, directory)
    return all(torch.equal(value, base[key]) for key, value in model.named_parameters() if key in base)


RUNS = (
    *((case, "plain", None) for case in ("llama-grouped", "qwen2-grouped-tied", "gpt2", "mixtral", "phi3")),
    ("llama", "plain", False),
    ("llama", "static", True),
    ("llama", "views", None),
)


@pytest.mark.parametrize("run, layout", in_turn(RUNS, ("permuted", "indexed")), ids=str)
def test_two_ranks_train_and_save_the_adapter_of_one_process(ranks, run, layout, tmp_path):
    case, way, checkpointing = run
    assert all(ranks(train_and_save, case, layout, way, tmp_path / "two", checkpointing))
    model = attached(case, layout)
    train(model)
    s2ft.save_adapter(model, tmp_path / "one")
    check_same_files(tmp_path / "two", tmp_path / "one")
