"""Ranks that attach without weights (the meta device), and get them when the model has been sharded."""

import os
from contextlib import contextmanager

import pytest
import torch
from runs import EXTRA, attach_to, attached, base_is, batches, check_same_files, logits, reset, sharded, train
from support.models import model_of
from support.states import with_adapter
from test_accelerate import accelerator_for

import s2ft


def meta_of(model):
    """The model without its numbers, as from_pretrained makes it on ranks that do not read."""
    buffers = dict(model.named_buffers())
    model.to("meta")
    for name, buffer in buffers.items():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer
    model.tie_weights()
    return model


@contextmanager
def efficient_accelerator(model):
    """An Accelerator for FSDP2 with cpu_ram_efficient_loading. What it sets in the process is reset afterwards."""
    try:
        accelerator = accelerator_for("fsdp efficient", model)
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
        yield accelerator
    finally:
        reset()


def without_weights(case, has):
    """A model on a rank that does not read: on the meta device, or with any values, as transformers may leave it."""
    model = model_of(case)
    if has == "nothing":
        return meta_of(model)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


def with_accelerate(rank, case, layout, directory, has, changes):
    """Only rank 0 has weights. Returns whether the base is unchanged after training and detach."""
    model = model_of(case) if rank == 0 else without_weights(case, has)
    with efficient_accelerator(model) as accelerator:
        attach_to(model, case, layout, **changes)
        model, _ = accelerator.prepare(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
        train(model, rank * 2 // torch.distributed.get_world_size())
        s2ft.save_adapter(model, directory)
        s2ft.set_adapter(model, None)
        return base_is(s2ft.detach(model), case)


@pytest.mark.parametrize(
    "case, layout, selection, has",
    [
        ("llama-grouped", "indexed", "weight", "any values"),
        ("mixtral", "permuted", "gradient", "nothing"),
        pytest.param("gpt2", "permuted", "activation", "any values", marks=pytest.mark.slow),
    ],
)
def test_accelerate_broadcasts_the_weights_of_the_first_rank(ranks, alone, case, layout, selection, has, tmp_path):
    assert ranks(with_accelerate, case, layout, tmp_path, has, dict(selection=selection)) == [True, True]
    check_same_files(tmp_path, alone(case, layout, selection=selection))


@pytest.mark.slow
def test_accelerate_broadcasts_to_four_ranks(four_ranks, alone, tmp_path):
    changes = dict(selection="activation")
    assert four_ranks(with_accelerate, "llama-grouped", "permuted", tmp_path, "nothing", changes) == [True] * 4
    check_same_files(tmp_path, alone("llama-grouped", "permuted", **changes))


# ---- without accelerate ----------------------------------------------------------------------------------


def shard_and_load(model, rank, state, keeps=False):
    """Shard the model and broadcast the state of the first rank, as PyTorch documents it.

    keeps: Whether this rank shards the weights that it has.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    buffers = dict(model.named_buffers())
    sharded(model if keeps else model.to("meta"))
    if not keeps:
        model.to_empty(device="cpu")
        for name, buffer in model.named_buffers():
            if "inv_freq" in name:
                buffer.copy_(buffers[name])
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, state if rank == 0 else {}, options=options)
    return model


def with_torch(rank, case, layout, directory, selection, real, first_keeps):
    """The ranks in `real` have weights when they attach, which the first one may shard. Returns whether the base is unchanged after detach."""
    model = model_of(case) if rank in real else meta_of(model_of(case))
    attach_to(model, case, layout, selection=selection)
    shard_and_load(model, rank, (model if real else model_of(case)).state_dict(), first_keeps and rank == 0)
    train(model, rank)
    s2ft.save_adapter(model, directory)
    return base_is(s2ft.detach(model), case)


@pytest.mark.parametrize(
    "layout, selection, real, first_keeps",
    [
        ("permuted", "weight", (0,), False),
        ("permuted", "random", (), False),
        ("permuted", "random", (0, 1), False),
        ("permuted", "random", (0,), True),
    ],
)
def test_torch_broadcasts_the_weights_of_the_first_rank(ranks, alone, layout, selection, real, first_keeps, tmp_path):
    """Also if no rank has weights when it attaches, and if all have and the state is loaded in the base's order."""
    assert ranks(with_torch, "llama-grouped", layout, tmp_path, selection, real, first_keeps) == [True, True]
    check_same_files(tmp_path, alone("llama-grouped", layout, selection=selection))


# ---- adapters --------------------------------------------------------------------------------------------


def go_on(rank, saved, directory, has):
    """Load a trained adapter with extra weights on ranks of which one has weights. Returns what must be equal."""
    model = model_of("llama-grouped") if rank == 0 else without_weights("llama-grouped", has)
    with efficient_accelerator(model) as accelerator:
        s2ft.load_adapter(model, saved, trainable=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        s2ft.save_adapter(model, directory / "same")
        ours = {id(p) for p in model.parameters() if p.requires_grad}
        complete = {id(p) for group in optimizer.param_groups for p in group["params"]} == ours
        train(model, rank)
        s2ft.save_adapter(model, directory / "trained")
        s2ft.set_adapter(model, None)
        weights, base = dict(model.named_parameters()), model_of("llama-grouped")
        extra = ("lm_head.weight", "model.norm.weight")
        off = all(torch.equal(weights[name].full_tensor(), base.get_parameter(name)) for name in extra)
        s2ft.set_adapter(model, "default")
        s2ft.save_adapter(model, directory / "again")
        s2ft.load_adapter(model, saved, "other")
        return complete, off, base_is(s2ft.detach(model), "llama-grouped")


@pytest.mark.parametrize("has", (pytest.param("nothing", marks=pytest.mark.slow), "any values"))
def test_a_trained_adapter_goes_on(ranks, has, tmp_path):
    model = train(attached("llama-grouped", **EXTRA))
    s2ft.save_adapter(model, tmp_path / "start")
    assert ranks(go_on, tmp_path / "start", tmp_path, has) == [(True, True, True)] * 2
    check_same_files(tmp_path / "same", tmp_path / "start", exactly=True)
    train(model)
    s2ft.save_adapter(model, tmp_path / "alone")
    check_same_files(tmp_path / "trained", tmp_path / "alone")
    check_same_files(tmp_path / "again", tmp_path / "trained", exactly=True)


# ---- calls that are refused ------------------------------------------------------------------------------


def refusals(rank, saved):
    meta, no_weights = meta_of(model_of("llama-grouped")), s2ft.S2FTConfig(d_ratio=0.1, selection="weight")
    waiting = attach_to(meta_of(model_of("llama-grouped")), "llama-grouped")
    broken = with_adapter(model_of("llama-grouped") if rank == 0 else meta_of(model_of("llama-grouped")), no_weights)
    other = model_of("llama-grouped").state_dict()
    other["model.layers.1.mlp.down_proj.weight"] *= 2
    tries = {
        "weight": lambda: s2ft.attach(meta, no_weights),
        "active": lambda: s2ft.load_adapter(meta, saved),
        "save": lambda: s2ft.save_adapter(waiting, saved.parent / "nothing"),
        "another base": lambda: shard_and_load(broken, rank, other),
    }
    messages = {}
    for name, act in tries.items():
        with pytest.raises((ValueError, RuntimeError)) as error:
            act()
        messages[name] = str(error.value)
    return messages, s2ft.list_adapters(meta), (saved.parent / "nothing").exists()


def test_what_needs_weights_that_are_not_there_is_refused(ranks, tmp_path):
    s2ft.save_adapter(attached("llama-grouped"), tmp_path / "saved")
    for messages, names, exists in ranks(refusals, tmp_path / "saved"):
        assert "they are on the meta device on every rank: load them first" in messages["weight"]
        assert "the weights have not arrived on every rank" in messages["active"]
        assert "the weights of this model have not arrived on this rank" in messages["save"]
        assert "not those of the base" in messages["another base"] and "layer 1" in messages["another base"]
        assert names == [] and not exists


def run_before_order(rank):
    """Load weights around load_state_dict, and run a part of the model, whose hooks see nothing of it."""
    model = attach_to(meta_of(model_of("llama-grouped")), "llama-grouped")
    for name, parameter in model_of("llama-grouped").named_parameters():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._parameters[last] = torch.nn.Parameter(parameter.detach(), requires_grad=False)
    with pytest.raises(RuntimeError) as error:
        model.model(batches(model, 1)[0])
    return str(error.value), torch.equal(logits(model), logits(attached("llama-grouped")))


def test_layers_refuse_to_run_before_their_units_are_in_order(ranks):
    words = "their units are not in the order of this layer yet"
    assert [(words in message, same) for message, same in ranks(run_before_order)] == [(True, True)] * 2
