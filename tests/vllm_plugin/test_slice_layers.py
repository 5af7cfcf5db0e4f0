"""Banks of slices, and layers like vLLM's that hold them. Nothing here needs vLLM."""

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from ops.cases import DTYPES
from support.gpu import DEVICES
from support.inside import (
    Batch,
    Budget,
    MissingInVLLM,
    SliceBank,
    add_slices_,
    compatibility,
    encode,
    layer_with_slices as with_slices,
    layers,
)
from support.pairs import pairs
from support.tolerances import GEMM
from support.vllm_layers import QKV, Column, Linear, LoRALayer, Punica, Row, lora_config
from support.vllm_modules import PPMissingLayer
from torch import nn

# ---- banks -----------------------------------------------------------------------------------------------


def test_a_slot_keeps_its_units_when_others_change():
    bank = SliceBank(slots=3, capacity=5, width=2, dim=1)
    bank.put(0, torch.tensor([7]), torch.ones(1, 2))
    bank.put(1, torch.arange(5), torch.ones(5, 2) * 2)
    bank.put(1, torch.arange(2), torch.ones(2, 2) * 3)
    assert bank.bounds.tolist() == bank.offsets.tolist() == [0, 1, 5, 7, 10, 10]
    assert bank.index[:1].tolist() == [7] and bank.values[:7, 0].tolist() == [1, 0, 0, 0, 0, 3, 3]


def test_more_units_than_a_slot_holds_are_not_written_over_those_of_the_next_adapter():
    bank = SliceBank(slots=2, capacity=5, width=2, dim=1)
    bank.put(1, torch.arange(5), torch.ones(5, 2))
    with pytest.raises(ValueError, match="6 units do not fit.*room for 5"):
        bank.put(0, torch.arange(6), torch.full((6, 2), 9.0))
    assert bank.values[5:].tolist() == torch.ones(5, 2).tolist() and bank.bounds.tolist() == [0, 0, 5, 10]


# ---- products --------------------------------------------------------------------------------------------


def case(dim, dtype, device, slots, inputs=37, outputs=53, sizes=(7, 0, 20, 5)):
    """A bank, and the full delta of each slot."""
    extent, width = ((outputs, inputs), (inputs, outputs))[dim]
    bank, deltas = SliceBank(len(sizes), 20, width, dim, dtype, device), []
    for slot, size in enumerate(sizes):
        index, values = torch.randperm(extent)[:size], torch.randn(size, width, dtype=dtype)
        bank.put(slot, index, values)
        full = torch.zeros(outputs, inputs, dtype=torch.float64)
        if dim == 0:
            full[index] = values.double()
        else:
            full[:, index] = values.double().t()
        deltas.append(full)
    x, y = torch.randn(len(slots), inputs, dtype=dtype), torch.randn(len(slots), outputs, dtype=dtype)
    rows = [y[t].double() + (deltas[slot] @ x[t].double() if slot >= 0 else 0) for t, slot in enumerate(slots)]
    return bank, x.to(device), y.to(device), torch.stack(rows)


def batch_of(slots, rows=64, many=None, device="cpu"):
    """The batch of an engine that has had another one before."""
    batch = Batch(rows, 4, device, many)
    batch.update(np.full(rows, 3))
    batch.update(np.array(slots))
    return batch


def copied(bank, target):
    for name in ("values", "index", "bounds", "offsets"):
        getattr(target, name).copy_(getattr(bank, name))


BATCHES = {
    "decode": [0, 2, -1, 3, 1, 2],
    "one adapter": [2] * 40,
    "the base": [-1] * 9,
    "prompts": [0] * 20 + [-1] * 5 + [2] * 18 + [3] * 2 + [1] * 17,
    "several prompts of one adapter": [2] * 9 + [-1] * 3 + [2] * 9 + [0] + [2] * 3,
    "mixed": [(5 * number) % 5 - 1 if number % 3 else 2 for number in range(60)],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize("name, dtype, many", pairs(BATCHES, DTYPES, (3, 1000)), ids=str)
def test_every_token_gets_its_adapter(name, dim, dtype, many, device):
    slots = BATCHES[name]
    bank, x, y, expected = case(dim, dtype, device, slots)
    before = y.clone()
    add_slices_(y, x, bank, batch_of(slots, 64, many, device))
    rtol, atol = GEMM[dtype]
    torch.testing.assert_close(y.double().cpu(), expected, rtol=rtol, atol=atol * max(1, expected.abs().max().item()))
    without = torch.tensor([slot in (-1, 1) for slot in slots])  # slot 1 is empty
    assert torch.equal(y.cpu()[without], before.cpu()[without])


def test_padding_after_the_batch_and_another_dtype_of_the_output():
    """A CUDA graph has more rows than the batch; what they have is never read."""
    bank, x, y, expected = case(1, torch.float64, "cpu", [0, 2, -1])
    x, y = torch.cat((x, x[:2])), torch.cat((y, y[:2]))
    add_slices_(y, x, bank, batch_of([0, 2, -1], 8))
    torch.testing.assert_close(y[:3], expected)
    bank, x, y, expected = case(0, torch.bfloat16, "cpu", [0, 2, -1])
    y = y.float()
    add_slices_(y, x, bank, batch_of([0, 2, -1], 8))
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=5e-2)


def test_torch_compile_does_not_look_into_the_op():
    """One graph for all batches, numbers of tokens and contents of the bank."""
    bank, _, _, _ = case(1, torch.float64, "cpu", [0])
    batch = Batch(64, 4)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def layer(x, y):
        add_slices_(y, x * 2, bank, batch)
        return y + 1

    for slots in ([0, 2, -1, 1, 3, 3, 2], [3] * 20, [2, 2]):
        other, x, y, expected = case(1, torch.float64, "cpu", slots)
        copied(other, bank)
        batch.update(np.array(slots))
        torch.testing.assert_close(layer(x.clone(), y.clone()), y + 2 * (expected - y) + 1)
    assert len(graphs) == 1 and "add_slices_" in graphs[0].code


@pytest.mark.parametrize("many", (4, 100))
@pytest.mark.parametrize("dim", (0, 1))
def test_the_op_keeps_its_contract(dim, many):
    slots = [0, 2, -1, 2] * 6
    (bank, x, y, _), batch = case(dim, torch.float64, "cpu", slots), batch_of(slots, many=many)
    torch.library.opcheck(
        torch.ops.s2ft.add_slices_,
        (y, x, bank.values, bank.index, bank.offsets, bank.bounds, batch.names, batch.order, batch.groups, dim),
    )


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", (4, 40))
@pytest.mark.parametrize("dim", (0, 1))
def test_a_cuda_graph_serves_other_batches_and_adapters(dim, tokens):
    bank, x, y, _ = case(dim, torch.float32, "cuda", [0] * tokens)
    batch = batch_of([0] * tokens, device="cuda")
    out = y.clone()
    add_slices_(out, x, bank, batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(y)
        add_slices_(out, x, bank, batch)
    for seed in range(3):
        slots = torch.randint(-1, 4, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
        other, new_x, new_y, expected = case(dim, torch.float32, "cuda", slots)
        copied(other, bank)
        batch.update(np.array(slots))
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
        torch.testing.assert_close(out.double().cpu(), expected, rtol=1e-4, atol=1e-4)


# ---- layers ----------------------------------------------------------------------------------------------

KINDS = {
    "row": (Row, (12, 32), [12], {}),
    "column": (Column, (32, 12), [32], {}),
    "gate and up": (Column, (64, 12), [32, 32], dict(sizes=[32, 32])),
    "gate and up in one weight": (Column, (64, 12), [64], dict(sizes=[32, 32])),
    "query, key and value": (QKV, (48, 12), [32, 8, 8], {}),
    "query, key and value in one weight": (QKV, (48, 12), [48], {}),
    "replicated": (Linear, (24, 12), [24], {}),
}


class Model:
    """One layer on all ranks, served as vLLM serves it: slots, a cache of adapters, and steps of mixed batches."""

    def __init__(self, kind, ranks, slots=3, budget="", dtype=torch.float64):
        layer_class, shape, self.sizes, options = KINDS[kind]
        self.whole = torch.randn(*shape, dtype=dtype)
        self.slot_ids, self.ranks = [None] * slots, ranks
        self.layers, self.punicas = [], []
        cls = with_slices(LoRALayer, Budget.parse(budget))
        packed = [f"part{number}" for number in range(len(self.sizes))] if len(self.sizes) > 1 else []
        for rank in range(ranks):
            layer = layer_class(self.whole, rank, ranks, **options)
            assert cls.can_replace_layer(layer, lora_config(sharded=True), packed)
            wrapped = cls(layer)
            wrapped.create_lora_weights(slots, lora_config(dtype=dtype, sharded=True))
            self.punicas.append(Punica())
            wrapped.set_mapping(self.punicas[-1])
            self.layers.append(wrapped)

    def adapter(self, dims, most, seed):
        """An adapter and its full delta: of each projection units of a random number, or none."""
        generator = torch.Generator().manual_seed(seed)
        full, factors, begin = torch.zeros_like(self.whole), [], 0
        for size in self.sizes:
            dim = dims[int(torch.randint(len(dims), (), generator=generator))]
            extent, width = ((size, self.whole.shape[1]), (self.whole.shape[1], size))[dim]
            count = min(extent, int(torch.randint(0, most + 1, (), generator=generator)))
            index = torch.randperm(extent, generator=generator)[:count]
            values = torch.randn(count, width, generator=generator, dtype=self.whole.dtype)
            if dim == 0:
                full[begin : begin + size][index] = values
            else:
                full[begin : begin + size, index] = values.t()
            factors.append((encode(index, dim), values) if count else None)
            begin += size
        if len(factors) == 1 or not any(factors):
            return factors[0], full
        return ([one and one[0] for one in factors], [one and one[1] for one in factors]), full

    def activate(self, number, factors):
        """vLLM's activate_adapter."""
        slot = self.slot_ids.index(None)
        self.slot_ids[slot] = number
        for layer in self.layers:
            layer.set_lora(slot, *factors) if factors is not None else layer.reset_lora(slot)

    def output(self, x, numbers):
        parts = []
        for layer, punica in zip(self.layers, self.punicas):
            punica.step(numbers, self.slot_ids)
            parts.append(layer(layer.base_layer.input_of(x)))
        return self.layers[0].base_layer.joined(parts)

    def check(self, deltas, numbers, x=None):
        x = torch.randn(len(numbers), self.whole.shape[1], dtype=self.whole.dtype) if x is None else x
        expected = torch.stack(
            [(self.whole + (deltas[number] if number else 0)) @ x[t] for t, number in enumerate(numbers)]
        )
        torch.testing.assert_close(self.output(x, numbers), expected)


@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_outputs_of_every_layer(kind, ranks):
    """A layer that is in no coupling may train its other side. The option names it then."""
    model = Model(kind, ranks, budget="proj:inputs=64,proj:outputs=64,qkv_proj:inputs=64,qkv_proj:outputs=64")
    factors, full = model.adapter([0, 1], 9, seed=3)
    model.activate(7, factors)
    model.check({7: full}, [7, 0, 7])


def test_warm_up_fills_all_slots_and_makes_room_for_adapters():
    """vLLM measures memory with LoRA of zeros in all slots, and does not tell the layers when they are gone."""
    model = Model("row", 1, budget="64")
    layer = model.layers[0]
    assert layer.lora_a_stacked[0].shape == (3, 1, 1, 32) and layer.lora_b_stacked[0].shape == (3, 1, 12, 1)
    assert layer.lora_a_stacked[0].is_meta
    for slot in range(3):
        layer.set_lora(slot, torch.zeros(8, 32), torch.zeros(12, 8))
    assert layer.banks[0].bounds.tolist() == [0, 32, 32, 64, 64, 96]
    model.check({}, [0, 0])
    factors, full = model.adapter([1], 30, seed=3)
    model.activate(7, factors)
    model.check({7: full}, [7, 0])


def test_a_lora_that_reaches_a_layer_of_slices_is_no_adapter_of_zeros():
    """A program that loads adapters by a function of its own, such as an RL framework, goes past the check of names."""
    layer = Model("row", 1, budget="64").layers[0]
    with pytest.raises(ValueError, match="S²FT adapters alone"):
        layer.set_lora(0, torch.ones(8, 32), torch.ones(12, 8))
    assert layer.banks[0].bounds.tolist() == [0, 0, 32, 32, 64, 64]


INDEX, VALUES = encode(torch.tensor([7]), 0), torch.ones(1, 12, dtype=torch.float64)


@pytest.mark.parametrize("ranks", (1, 2))
def test_an_adapter_with_another_number_of_projections(ranks):
    layer = Model("query, key and value", ranks).layers[0]
    with pytest.raises(ValueError, match="3 projections"):
        layer.needs([(INDEX, VALUES), None])
    assert layer.needs([(INDEX, VALUES), (INDEX, VALUES), None]) == {0: 2 if ranks == 1 else 1}


def test_all_ranks_count_the_units_of_the_fullest():
    """Otherwise one rank would refuse an adapter that the others have taken."""
    model = Model("row", 4)
    factors = encode(torch.tensor([0, 1, 2, 9]), 1), torch.ones(4, 12, dtype=torch.float64)
    assert [layer.needs([factors]) for layer in model.layers] == [{1: 3}] * 4


# ---- budgets ---------------------------------------------------------------------------------------------


QKV_SIZES = {"q_proj": (4096, 2048), "k_proj": (128, 64), "v_proj": (128, 64)}


def test_the_default_budget():
    assert Budget.parse("").units("qkv_proj", QKV_SIZES, 0, True, rank=16) == 256 + 64 + 64
    down = {"down_proj": (14336, 14336)}
    assert Budget.parse("").units("down_proj", down, 1, True, rank=16) == 717
    assert Budget.parse("").units("down_proj", down, 1, True, rank=1024) == 1024
    assert Budget.parse("").units("down_proj", down, 0, False, rank=16) == 0


@pytest.mark.parametrize(
    "text, expected",
    [
        ("100", 100),
        ("9999999", 2176),
        ("q_proj=5, k_proj=7", 12),
        ("qkv_proj=5,o_proj=9", 5),
        ("o_proj=9", 0),
        ("qkv_proj:outputs=3", 3),
        ("qkv_proj:inputs=3", 0),
    ],
)
def test_budgets(text, expected):
    assert Budget.parse(text).units("qkv_proj", QKV_SIZES, 0, True, rank=16) == expected


@pytest.mark.parametrize("text", ("many", "down_proj", "down_proj=", "=5", "down_proj=-1", "a=1,,b=2", "a:rows=1"))
def test_a_budget_of_another_form(text):
    with pytest.raises(ValueError, match="S2FT_VLLM_UNITS"):
        Budget.parse(text)


# ---- the option ------------------------------------------------------------------------------------------


@pytest.fixture
def changes(monkeypatch):
    """What `install` would change in a vLLM that lacks every name."""
    found = []
    monkeypatch.setattr(layers, "when_imported", lambda module, feature, change: found.append((module, change)))
    for module in (layers, compatibility):
        monkeypatch.setattr(module, "private", Mock(side_effect=MissingInVLLM("vllm", "")))
    return found


def test_nothing_changes_without_the_option(changes, monkeypatch):
    for value in ("", "0"):
        monkeypatch.setenv(layers.SWITCH, value)
        layers.install()
    assert not changes and not layers.enabled


def test_a_release_of_vllm_that_lacks_a_name(changes, monkeypatch):
    """Adapters are served as LoRA then: the layers say that they hold no slices."""
    monkeypatch.setenv(layers.SWITCH, "1")
    layers.install()
    assert {module for module, _ in changes} >= {"vllm.config.lora", "vllm.lora.worker_manager"}
    for _, change in changes:
        with pytest.raises(MissingInVLLM, match="s2ft export"):
            change()
    assert not layers.enabled


def test_compiled_models_are_kept_apart(monkeypatch):
    """vLLM finds compiled models on the disk by this hash."""
    found = set()
    for text in ("", "5", "a=5"):
        config = type("LoRAConfig", (), {"compute_hash": lambda self: "same"})
        found_in = {"LoRAConfig": config, "LoRAConfig.compute_hash": config.compute_hash}
        monkeypatch.setattr(compatibility, "private", lambda module, name, found_in=found_in: found_in[name])
        layers._change_hash(Budget.parse(text))
        found.add(config().compute_hash())
    assert len(found) == 3


# ---- adapters as vLLM has them -----------------------------------------------------------------------------


@pytest.fixture
def manager(monkeypatch):
    """vLLM's manager of a model with two layers on this rank, and one on another."""
    monkeypatch.setattr("s2ft.vllm.layers.private", lambda module, attribute: PPMissingLayer)
    wrapped = {
        "layers.0.qkv_proj": Model("query, key and value", 1).layers[0],
        "layers.0.proj": Model("row", 1).layers[0],
    }
    model = nn.Module()
    model.layers = nn.ModuleDict({"0": nn.Module(), "1": PPMissingLayer()})
    packed = {"layers.0.qkv_proj": [f"layers.0.{name}_proj" for name in "qkv"]}
    return SimpleNamespace(modules=wrapped, packed_modules=packed, model=model)


def loras(**parts):
    """vLLM's LoRAModel, not yet packed."""
    made = {f"layers.0.{name}" if "." not in name else name: pair for name, pair in parts.items()}
    return SimpleNamespace(loras={name: SimpleNamespace(lora_a=a, lora_b=b) for name, (a, b) in made.items()})


def test_an_adapter_of_fused_and_other_layers(manager):
    o = encode(torch.arange(3), 1), torch.ones(3, 12)
    layers.admit(manager, loras(**{"q_proj": Q, "proj": o, "layers.1.proj": o}), "a")  # one is on another rank
    for bank in (*manager.modules["layers.0.qkv_proj"].banks, *manager.modules["layers.0.proj"].banks):
        bank.capacity = 4
    with pytest.raises(ValueError, match="it has 5 units in layers.0.qkv_proj, .* is 4. .*UNITS=proj=3,qkv_proj=5"):
        layers.admit(manager, loras(q_proj=Q, proj=o), "a")


ONE, Q = (torch.ones(1, 12), torch.ones(32, 1)), (encode(torch.arange(5), 0), torch.ones(5, 12))


@pytest.mark.parametrize(
    "parts, word",
    [
        (dict(q_proj=ONE), "without S2FT_VLLM_SLICES"),
        ({"q_proj": Q, "layers.9.proj": ONE}, "no S²FT adapter"),
        ({"q_proj": Q, "layers.9.proj": Q}, "layers.9.proj"),
    ],
)
def test_adapters_that_are_refused(manager, parts, word):
    with pytest.raises(ValueError, match=f"'a' .*{word}"):
        layers.admit(manager, loras(**parts), "a")
