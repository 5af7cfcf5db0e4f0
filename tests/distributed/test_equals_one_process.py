"""Several ranks train and save the adapter of one process: a row for each strategy, model, layout and option."""

from typing import Any, NamedTuple

import pytest
import torch
from runs import EXTRA, attach_to, base_is, check_same_files, logits, sharded, train
from support.models import LAYOUTS, model_of
from support.pairs import in_turn
from torch.nn.parallel import DistributedDataParallel

import s2ft

CASES = ("llama-grouped", "qwen2-grouped-tied", "gpt2", "mixtral", "phi3")
DDP = {"plain": {}, "static": {"static_graph": True}, "views": {"gradient_as_bucket_view": True}}
FSDP = {
    "blocks": {},
    "root": {"blocks": False},
    "kept": {"reshard_after_forward": False},
    "offloaded": {"offload": True},
}
ONE_ROW = dict(
    units={"model.layers.1.mlp.up_proj": [7], "model.layers.1.mlp.down_proj": [3]},
    **{f"{key}_ratio": 0.0 for key in "qkvougd"},
)


class Run(NamedTuple):
    """How a model is trained.

    Attributes:
        strategy: "ddp" or "fsdp" around an attached model, or "fsdp first": attached after it was sharded.
        case: The model.
        way: A key of DDP or FSDP.
        checkpointing: `use_reentrant` of gradient checkpointing; None for none.
        changes: Of the config.
        ran: Whether a forward was run before attach, so that FSDP2 has made its gathered parameters.
    """

    strategy: str
    case: str
    way: str = "blocks"
    checkpointing: bool | None = None
    changes: dict[str, Any] = {}
    ran: bool = False


def train_and_save(rank, run, layout, directory, dtype=torch.float32, mesh=None):
    """Train on this rank's half of every batch, save, and detach. Returns whether the base is back, bit for bit.

    Under DDP all ranks save to one folder at once, as a script that does not check its rank does.
    """
    model = model_of(run.case, dtype)
    options = dict(FSDP.get(run.way, {}))
    if mesh is not None:
        names = ("copy", "shard")[-len(mesh) :]
        options["mesh"] = torch.distributed.device_mesh.init_device_mesh("cpu", mesh, mesh_dim_names=names)
    if run.strategy == "fsdp first":
        sharded(model, **options)
    if run.ran:
        logits(model)
        model.reshard()
    attach_to(model, run.case, layout, **run.changes)
    if run.checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": run.checkpointing})
    if run.strategy == "fsdp":
        sharded(model, **options)
    forward = DistributedDataParallel(model, **DDP[run.way]) if run.strategy == "ddp" else None
    train(model, rank * 2 // torch.distributed.get_world_size(), forward=forward)
    s2ft.save_adapter(model, directory)
    return base_is(s2ft.detach(model), run.case, dtype)


ROWS = (  # each layout in turn; the other one is slow
    *(Run("ddp", case, "plain") for case in CASES),
    Run("ddp", "llama", "plain", False),
    Run("ddp", "llama", "static", True),
    Run("ddp", "llama", "views"),
    *(Run("fsdp", case) for case in CASES),
    *(Run("fsdp", "llama-grouped", way) for way in FSDP if way != "blocks"),
    Run("fsdp", "llama-grouped", checkpointing=False),
    Run("fsdp", "llama-grouped", checkpointing=True),
    Run("fsdp", "llama", changes=ONE_ROW),  # the second rank's shard is empty
    *(Run("fsdp", "llama-grouped", way, None, EXTRA) for way in FSDP),
    *(Run("fsdp first", *row) for row in (("llama-grouped",), ("llama-grouped", "root"), ("mixtral",))),
    Run("fsdp first", "qwen2-grouped-tied", "kept"),
    Run("fsdp first", "phi3", "offloaded"),
    Run("fsdp first", "gpt2"),
    *(Run("fsdp first", "mixtral", changes=dict(selection=one), ran=True) for one in ("weight", "activation")),
    Run("fsdp first", "qwen2-grouped-tied", changes=dict(selection="gradient"), ran=True),
    *(Run("fsdp first", "llama-grouped", "blocks", reentrant, EXTRA) for reentrant in (False, True)),
)


@pytest.mark.parametrize("run, layout", in_turn(ROWS, LAYOUTS), ids=str)
def test_two_ranks_train_and_save_the_adapter_of_one_process(ranks, alone, run, layout, tmp_path):
    assert ranks(train_and_save, run, layout, tmp_path) == [True, True]
    check_same_files(tmp_path, alone(run.case, layout, **run.changes))
    if run.changes == EXTRA:
        assert set(s2ft.read_adapter(tmp_path).extra_weights) == {"model.norm.weight", "lm_head.weight"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, layout, mesh",
    [("llama-grouped", "permuted", (4,)), ("mixtral", "permuted", (2, 2)), ("gpt2", "indexed", (4,))],
)
def test_four_ranks(four_ranks, alone, case, layout, mesh, tmp_path):
    """In float64, because AdamW enlarges the rounding of a sum over four ranks where a gradient is nearly zero."""
    run = Run("fsdp first", case, changes=dict(selection="weight"))
    assert four_ranks(train_and_save, run, layout, tmp_path, torch.float64, mesh) == [True] * 4
    check_same_files(tmp_path, alone(case, layout, dtype=torch.float64, selection="weight"), rtol=1e-9, atol=1e-9)
