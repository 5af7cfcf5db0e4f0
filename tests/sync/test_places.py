"""Where slices lie in an engine's weights, found by watching its loader."""

import pytest
import torch
from support.engines import HIDDEN, Engine, checkpoint, engines, specs_of
from support.inside import NoPlace, SliceSpec, check_base, hashes_of, parts_of, places, regions
from torch import nn

INDEX = {  # positions of each weight's slice: some, runs, all, the ends
    "model.embed_tokens.weight": (0, [0, 3, 15, 16, 29]),
    "model.layers.0.self_attn.q_proj.weight": (0, [4, 5, 6, 7, 12, 13, 14, 15]),
    "model.layers.0.self_attn.q_proj.bias": (0, [4, 5, 6, 7]),
    "model.layers.0.self_attn.k_proj.bias": (0, [0, 7]),
    "model.layers.0.self_attn.v_proj.bias": (0, list(range(8))),
    "model.layers.0.self_attn.k_proj.weight": (0, [4, 5, 6, 7]),
    "model.layers.0.self_attn.v_proj.weight": (0, [0, 1, 2, 3, 7]),
    "model.layers.0.self_attn.o_proj.weight": (1, [0, 9, 15]),
    "model.layers.0.mlp.gate_proj.weight": (0, [0, 23]),
    "model.layers.0.mlp.up_proj.weight": (1, [0, 5, 15]),
    "model.layers.0.mlp.down_proj.weight": (1, [2, 11, 12, 23]),
    "model.layers.0.mlp.conv1d.weight": (1, [2, 11, 12, 23]),
    "model.layers.0.experts.1.down_proj.weight": (1, [1, 20]),
    "model.norm.weight": (0, list(range(HIDDEN))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_written_slices_are_the_merged_weights_and_the_base_returns(size, dtype):
    base, other = checkpoint(dtype), checkpoint(dtype, seed=1)
    specs = specs_of(base, INDEX)
    merged = {name: tensor.clone() for name, tensor in base.items()}
    for spec in specs:
        merged[spec.name].index_copy_(spec.dim, spec.index, other[spec.name].index_select(spec.dim, spec.index))
    for engine, expected in zip(engines(size, dtype), engines(size, dtype, merged)):
        before = engine.checksums()
        found = places(engine.load_weights, engine, specs, dtype)
        assert all(torch.equal(one, before[name]) for name, one in engine.checksums().items()), "finding changed it"
        for place in found:
            spec = specs[place.slice_number]
            place.write(other[spec.name].index_select(spec.dim, spec.index))
        assert all(torch.equal(one, expected.checksums()[name]) for name, one in engine.checksums().items())
        for place in found:
            place.restore()
        assert all(torch.equal(one, before[name]) for name, one in engine.checksums().items())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_base_of_all_ranks_together_is_compared(size):
    base = checkpoint()
    specs = specs_of(base, INDEX)

    def parts():
        return [
            part
            for engine in engines(size, base=base)
            for part in parts_of(places(engine.load_weights, engine, specs, torch.float32), specs)
        ]

    check_base(parts(), specs)
    base["model.layers.0.mlp.up_proj.weight"][3, 5] += 1
    with pytest.raises(ValueError, match="1 of 14 slices differ, the first is model.layers.0.mlp.up_proj.weight"):
        check_base(parts(), specs)


def test_parts_that_no_rank_holds_or_that_differ_are_noticed():
    specs, pair = specs_of(checkpoint(), INDEX), engines(2)
    first, other = (parts_of(places(one.load_weights, one, specs, torch.float32), specs) for one in pair)
    with pytest.raises(NoPlace, match="model.embed_tokens.weight: this engine has no place for all of it"):
        check_base(first, specs)
    check_base([*first, *other], specs)
    pair[1].norm.data[3] = 9
    other = parts_of(places(pair[1].load_weights, pair[1], specs, torch.float32), specs)
    with pytest.raises(ValueError, match="model.norm.weight: two ranks"):
        check_base([*first, *other], specs)


def test_a_stage_without_a_weight_has_no_place_and_the_other_has_it():
    base = checkpoint()
    specs = specs_of(base, INDEX)
    parts = []
    for stage in (0, 1):
        engine = Engine(stage=stage)
        engine.load_weights(base.items())
        found = places(engine.load_weights, engine, specs, torch.float32)
        assert ({specs[one.slice_number].name for one in found} == {"model.norm.weight"}) == (stage == 1)
        parts += parts_of(found, specs)
    check_base(parts, specs)


def test_a_tied_weight_is_sent_under_one_name():
    engine = engines(1)[0]
    spec = specs_of({"lm_head.weight": checkpoint()["model.embed_tokens.weight"]}, {"lm_head.weight": (0, [1, 2])})
    found = places(engine.load_weights, engine, spec, torch.float32)
    with pytest.raises(NoPlace, match="lm_head.weight: this engine has no place. A tied weight is sent under the one"):
        check_base(parts_of(found, spec), spec)


class Odd(nn.Module):
    """A model whose loader does not copy."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.arange(12.0).view(3, 4), requires_grad=False)
        self.other = nn.Parameter(torch.zeros(2, 2), requires_grad=False)

    def load_weights(self, tensors):
        for name, tensor in tensors:
            if name == "other":
                self.other.data.copy_(tensor)
            else:
                self.how(self, tensor)


ODD = {
    "adds one": (lambda model, tensor: model.weight.data.copy_(tensor + 1), "makes new tensors of it"),
    "adds in place": (lambda model, tensor: model.weight.data.add_(1), "computes"),
    "reads numbers": (lambda model, tensor: model.weight.data.fill_(tensor[0, 0].item()), "does not take them"),
    "interleaves": (
        lambda model, tensor: model.weight.data.copy_(tensor.view(3, 2, 2).transpose(1, 2).reshape(3, 4)),
        "does not take them|another way|new tensors",
    ),
    "flattens": (lambda model, tensor: model.weight.data.view(-1).copy_(tensor.view(-1)), "another way"),
    "broadcasts": (lambda model, tensor: model.weight.data.copy_(tensor[0]), "another way"),
    "concatenates": (lambda model, tensor: model.weight.data.copy_(torch.cat([tensor, tensor])[:3]), "new tensors"),
    "through a buffer": (
        lambda model, tensor: model.weight.data.copy_(torch.zeros(3, 4).copy_(tensor)),
        "no parameter of the model",
    ),
    "replaces the parameter": (
        lambda model, tensor: (
            setattr(model, "weight", nn.Parameter(torch.zeros(3, 4), requires_grad=False)),
            model.weight.data.copy_(tensor),
        ),
        "replaces the parameter|no parameter",
    ),
    "gives it new memory": (
        lambda model, tensor: setattr(model.weight, "data", torch.zeros(3, 4)),
        "replaces the parameter",
    ),
    "fails": (lambda model, tensor: {}["missing"], "does not take them: KeyError"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_loader_that_does_not_copy_is_refused_and_the_model_is_as_before(kind):
    how, message = ODD[kind]
    model = Odd(how)
    before, data = model.weight, model.weight.data_ptr()
    numbers = model.weight.clone()
    with pytest.raises(NoPlace, match=f"weight.*({message})"):
        regions(model.load_weights, model, [("other", (2, 2)), ("weight", (3, 4))], torch.float32)
    assert model.weight is before and model.weight.data_ptr() == data and torch.equal(model.weight, numbers)


@pytest.mark.parametrize("kind", ["transposed", "contiguous", "moved", "stacked", "selected"])
def test_views_and_copies_of_the_same_numbers_are_followed(kind):
    steps = {
        "transposed": lambda model, tensor: model.weight.data.t().copy_(tensor.t()),
        "contiguous": lambda model, tensor: model.weight.data.copy_(tensor.t().contiguous().t()),
        "moved": lambda model, tensor: model.weight.data.copy_(tensor.to("cpu")),
        "stacked": lambda model, tensor: model.weight.data[None].copy_(tensor[None]),
        "selected": lambda model, tensor: [model.weight.data[row].copy_(tensor[row]) for row in range(3)],
    }
    model = Odd(steps[kind])
    spec = SliceSpec("weight", (3, 4), 1, torch.tensor([1, 3]), hashes_of(model.weight[:, [1, 3]], 1))
    found = places(model.load_weights, model, [spec], torch.float32)
    check_base(parts_of(found, [spec]), [spec])
    values = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    for place in found:
        place.write(values)
    assert torch.equal(model.weight[:, [1, 3]], values) and model.weight[:, [0, 2]].tolist() == [
        [0, 2],
        [4, 6],
        [8, 10],
    ]


def test_weights_of_another_dtype():
    engine = engines(1)[0]
    specs = specs_of(checkpoint(torch.bfloat16), INDEX)
    with pytest.raises(NoPlace, match="is float32 in this engine, and the slices are sent as bfloat16"):
        places(engine.load_weights, engine, specs, torch.bfloat16)
    packed = Odd(lambda model, tensor: model.weight.data.copy_(tensor))
    packed.weight.data = packed.weight.data.to(torch.float8_e4m3fn)
    spec = SliceSpec("weight", (3, 4), 1, torch.tensor([1]), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(NoPlace, match="weight is float8_e4m3fn in this engine, which is quantized or packed"):
        places(packed.load_weights, packed, [spec], torch.bfloat16)


def test_a_weight_that_is_named_twice_would_lose_its_base_and_is_refused():
    engine, specs = engines(1)[0], specs_of(checkpoint(), INDEX)
    with pytest.raises(NoPlace, match="named twice"):
        places(engine.load_weights, engine, specs[:1] * 2, torch.float32)
