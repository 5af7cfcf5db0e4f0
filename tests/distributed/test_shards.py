"""Weights that are spread over ranks: they are read in full, reordered in place, and their own shards are found."""

from unittest import mock

import pytest
import torch
from support.inside import Move, distributed, find_couplings, fingerprint, tensors_of, weight_at
from support.models import ALL_RATIOS, model_of, ratios_for
from torch import nn

import s2ft
from s2ft import Coupling

CASES = ("llama-grouped", "gpt2", "mixtral", "phi3")


def cut(model: nn.Module, dim_of) -> nn.Module:
    """Spread every parameter, along dimension dim_of(tensor)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                part = distribute_tensor(parameter.detach().clone(), mesh, [Shard(dim_of(parameter))])
                module._parameters[name] = nn.Parameter(part, requires_grad=False)
    return model


CUTS = {"first": lambda tensor: 0, "last": lambda tensor: tensor.dim() - 1}


def orders_of(couplings: list[Coupling]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(coupling.count, generator=generator) for coupling in couplings]


def moved_on_shards(rank, case, way):
    whole, model = model_of(case), cut(model_of(case), CUTS[way])
    base = {name: tensor.full_tensor() for name, tensor in model.named_parameters()}
    couplings = [coupling for coupling in find_couplings(whole).couplings if coupling.movable]
    moves = []
    for coupling, order in zip(couplings, orders_of(couplings)):
        Move(coupling, order).do(whole)
        moves.append(Move(coupling, order))
        moves[-1].do(model)
    expected = dict(whole.named_parameters(remove_duplicate=False))
    same = all(torch.equal(t.full_tensor(), expected[name]) for name, t in model.named_parameters())
    changed = any(not torch.equal(base[name], expected[name]) for name in base)
    for move in reversed(moves):
        move.undo(model)
    return same, changed, all(torch.equal(t.full_tensor(), base[name]) for name, t in model.named_parameters())


@pytest.mark.parametrize("case, way", [(case, "first") for case in CASES] + [(case, "last") for case in CASES])
def test_units_move_on_shards_as_on_whole_weights(ranks, case, way):
    assert ranks(moved_on_shards, case, way) == [(True, True, True)] * 2


def recovered(rank):
    """Interrupt a move after each of its tensors, on this rank only, as a signal may."""
    from support.inside import MovingTensor

    model = cut(model_of("llama-grouped"), CUTS["first"])
    base = {name: tensor.to_local().clone() for name, tensor in model.named_parameters()}
    coupling = next(coupling for coupling in find_couplings(model).couplings if coupling.movable)
    move, permute, seen = Move(coupling, orders_of([coupling])[0]), MovingTensor.permute, []
    for count in range(len(tensors_of(model, coupling))):
        seen.clear()

        def stop(moving, tensor, count=count):
            permute(moving, tensor)
            seen.append(moving)
            if len(seen) > count:
                raise KeyboardInterrupt

        with mock.patch.object(MovingTensor, "permute", stop), pytest.raises(KeyboardInterrupt):
            move.do(model)
        move.recover(model)
        if move.is_done or any(not torch.equal(t.to_local(), base[name]) for name, t in model.named_parameters()):
            return f"after {count}"
    return ""


def test_an_interrupted_move_of_shards_is_taken_back_by_each_rank(ranks):
    assert ranks(recovered) == ["", ""]


def read_from_shards(rank, case, way):
    whole, model = model_of(case), cut(model_of(case), CUTS[way])
    couplings = find_couplings(whole).couplings
    config = s2ft.S2FTConfig(**ratios_for(case, ALL_RATIOS), selection="weight")
    same = []
    for coupling in couplings:
        for projection in coupling.projections:
            with weight_at(model, projection).full() as full:
                same.append(torch.equal(full, weight_at(whole, projection).tensor))
    return (
        all(same),
        fingerprint(model, couplings) == fingerprint(whole, couplings),
        s2ft.select(model, config) == s2ft.select(whole, config),
    )


@pytest.mark.parametrize("case, way", [("llama-grouped", "first"), ("gpt2", "last"), ("mixtral", "last")])
def test_fingerprint_and_weight_selection_read_shards_as_whole_weights(ranks, case, way):
    assert ranks(read_from_shards, case, way) == [(True, True, True)] * 2


# ---- own shards ------------------------------------------------------------------------------------------


def own_shards(rank, shape, mesh_shape, placements):
    """Whether own_shard says where each rank's values are."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    named = {"r": Replicate(), "0": Shard(0), "1": Shard(1), "s0": _StridedShard(0, split_factor=mesh_shape[-1])}
    full = torch.arange(shape[0] * shape[1]).view(shape)
    mesh = init_device_mesh("cpu", mesh_shape)
    tensor = distribute_tensor(full, mesh, [named[one] for one in placements], src_data_rank=None)
    shard = distributed.own_shard(tensor)
    for dim, start in enumerate(shard.start):
        full = full.narrow(dim, start, shard.tensor.shape[dim])
    return torch.equal(shard.tensor, full)


@pytest.mark.parametrize(
    "shape, mesh, placements",
    [((5, 4), (2,), "0"), ((5, 4), (2,), "1"), ((1, 4), (2,), "0"), ((6, 5), (1, 2), "01"), ((8, 3), (1, 2), "r0")],
)
def test_the_own_shard_of_two_ranks(ranks, shape, mesh, placements):
    assert ranks(own_shards, shape, mesh, list(placements)) == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, placements", [((8, 4), ["s0", "0"]), ((8, 4), ["0", "1"]), ((7, 3), ["0", "0"]), ((8, 3), ["r", "0"])]
)
def test_the_own_shard_of_four_ranks(four_ranks, shape, placements):
    """Also where FSDP2 shards what tensor parallelism has cut along the same dimension."""
    assert four_ranks(own_shards, shape, (2, 2), placements) == [True] * 4


# ---- deciding --------------------------------------------------------------------------------------------


def decided(rank, able, fails):
    def compute():
        if fails:
            raise ValueError("no data")
        return {"units": [rank, 2]}

    try:
        return distributed.decide("a test", able[rank], compute).value
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    "able, fails, expected",
    [
        ((True, False), False, [{"units": [0, 2]}] * 2),
        ((False, True), False, [{"units": [1, 2]}] * 2),
        ((True, True), False, [{"units": [0, 2]}, {"units": [1, 2]}]),
        ((False, False), False, [None, None]),
        ((True, False), True, ["ValueError: no data", "RuntimeError: rank 0 failed: ValueError: no data"]),
    ],
)
def test_ranks_without_numbers_get_what_another_rank_decides_or_its_error(ranks, able, fails, expected):
    assert ranks(decided, able, fails) == expected
