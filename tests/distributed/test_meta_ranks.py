"""Ranks that attach without weights (the meta device), and get them when the model has been sharded."""

import os
from contextlib import contextmanager

import pytest
import torch
from runs import batches, blocks_of, check_same_files, rows_of, train
from support.fsdp_on_cpu import allow
from support.models import ALL_RATIOS, model_of, ratios_for

import s2ft
from s2ft.attached.record import attachment_of

CASES = ("llama-grouped", "gpt2", "mixtral")
SELECTIONS = ("random", "weight", "activation", "gradient")


def config_for(case, layout, **changes):
    return s2ft.S2FTConfig(**{**ratios_for(case, ALL_RATIOS), "layout": layout, **changes})


def attach_to(model, config):
    calibrated = config.selection in ("activation", "product", "gradient")
    s2ft.attach(model, config, calibration=batches(model, 2) if calibrated else None)
    return model


def meta_of(model):
    """The model without its numbers, as from_pretrained makes it on ranks that do not read."""
    buffers = {name: buffer for name, buffer in model.named_buffers()}
    model.to("meta")
    for name, buffer in buffers.items():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Adapters that one process trained, by case, layout and changes of the config."""
    made = {}

    def get(case, layout, **changes):
        key = repr((case, layout, changes))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("alone")
            model = attach_to(model_of(case), config_for(case, layout, **changes))
            train(model)
            s2ft.save_adapter(model, made[key])
        return made[key]

    return get


@contextmanager
def efficient_accelerator(model):
    """An Accelerator for FSDP2 with cpu_ram_efficient_loading. What it sets in the process is reset before and after."""
    allow()
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    def reset():
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
            del os.environ[name]

    reset()
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    try:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[type(blocks_of(model)[0]).__name__],
            cpu_ram_efficient_loading=True,
        )
        yield Accelerator(cpu=True, fsdp_plugin=plugin)
    finally:
        reset()
        os.environ["ACCELERATE_USE_CPU"] = "true"


def base_is(model, case):
    expected = dict(model_of(case).named_parameters())
    return all(torch.equal(p.full_tensor(), expected[name]) for name, p in model.named_parameters())


def with_accelerate(rank, case, layout, directory, changes):
    """Rank 1 has no weights. Returns whether the base is unchanged after training and detach."""
    model = model_of(case) if rank == 0 else meta_of(model_of(case))
    with efficient_accelerator(model) as accelerator:
        attach_to(model, config_for(case, layout, **changes))
        assert all(mount.layer.weight.is_meta == (rank == 1) for mount in attachment_of(model).mounts.values())
        trained = [p for p in model.parameters() if p.requires_grad]
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1))
        model.train()
        for batch in batches(model):
            half = batch[rows_of(rank)]
            accelerator.backward(model(input_ids=half, labels=half).loss)
            accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
            optimizer.step()
            optimizer.zero_grad()
        s2ft.save_adapter(model, directory)
        s2ft.set_adapter(model, None)
        s2ft.detach(model)
        return base_is(model, case)


@pytest.mark.parametrize(
    "case, layout, selection",
    [
        ("llama-grouped", "permuted", "random"),
        ("llama-grouped", "indexed", "weight"),
        ("gpt2", "permuted", "activation"),
        ("mixtral", "permuted", "gradient"),
        ("mixtral", "indexed", "random"),
    ],
)
def test_accelerate_broadcasts_the_weights_of_the_first_rank(ranks, alone, case, layout, selection, tmp_path):
    assert ranks(with_accelerate, case, layout, tmp_path, dict(selection=selection)) == [True, True]
    check_same_files(tmp_path, alone(case, layout, selection=selection))
