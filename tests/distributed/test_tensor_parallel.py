"""Models that tensor parallelism has split before attach: the same units, the same training, the same adapter."""

import copy

import pytest
import torch
from runs import batches, check_same_files, config_for, logits, train
from support.inside import couplings_of, fingerprint
from support.models import model_of
from support.states import same, with_adapter
from torch import nn
from transformers import AutoModelForCausalLM

import s2ft

# "llama" moves heads and channels, "llama-grouped" has heads that can't move and "phi3" weights whose units are on
# different ranks; "llama-biased" has biases on both sides, "qwen3" norms of heads that transformers runs by a style
CASES = [("llama", "permuted"), ("llama-biased", "indexed"), ("qwen2-grouped-tied", "permuted")]
MORE_CASES = [
    ("phi3-grouped", "permuted"),
    ("llama", "indexed"),
    ("llama-biased", "permuted"),
    ("qwen3", "permuted"),
    ("olmo2-grouped", "permuted"),
]


def load(folder, tp=2, **sizes):
    """The model in `folder`, split over this process's ranks; tp of 1 and no sizes: whole."""
    from transformers.distributed import DistributedConfig

    config = {"distributed_config": DistributedConfig(tp_size=tp, **sizes)} if tp > 1 or sizes else {}
    return AutoModelForCausalLM.from_pretrained(folder, **config)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def load_packed(folder):
    from transformers.distributed import DistributedConfig

    plan = {"model.layers.*.mlp.gate_up_proj": "packed_colwise", "model.layers.*.mlp.down_proj": "rowwise"}
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2, tp_plan=plan))


def load_parallelized(folder, mesh=None):
    """torch's own parallelize_module: it registers hooks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = load(folder, 1)
    outputs = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan = {
        **{name: ColwiseParallel() for name in outputs},
        **{name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")},
    }
    for layer in model.model.layers:
        parallelize_module(layer, mesh or init_device_mesh("cpu", (2,)), plan)
    return model


# How a model is split. With a number of ranks that share a row, the others train on the other half of each batch.
WAYS = {
    "one process": (lambda folder: load(folder, 1), None),
    "two": (load, None),
    "four": (lambda folder: load(folder, 4), None),
    "two halves": (lambda folder: load(folder, fsdp_size=2), 2),
    "two copies": (lambda folder: load(folder, dp_replicate_size=2), 2),
    "packed": (load_packed, None),
    "parallelized": (load_parallelized, None),
    "sharded later": (load_parallelized, 2),
}


def folder_of(folder, way, rank):
    """Each rank has the whole slices of a model that is split alone. Of one that is sharded too, the first rank saves."""
    return folder / (way if WAYS[way][1] else f"{way}, {rank}")


def live(rank, folder, case, config, way):
    """Attach, train, save, load again and detach. Returns what must equal one process."""
    loader, share = WAYS[way]
    saved = folder_of(folder, way, rank)
    if way == "sharded later":  # parallelize_module on one dimension of a mesh, attach, fully_shard on the other one
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        model = loader(folder, mesh["tp"])
    else:
        model = loader(folder)
    found = {"before": logits(model)}
    s2ft.attach(model, config)
    if way == "sharded later":
        for module in (*model.model.layers, model):
            torch.distributed.fsdp.fully_shard(module, mesh=mesh["dp"])
    found["attached"] = logits(model)
    seen = []
    train(model, None if share is None else rank // share, seen=seen)
    s2ft.save_adapter(model, saved)
    found |= {"seen": torch.tensor(seen), "after": logits(model)}  # float32: assert_close takes floats for float64
    found["slices"] = {name: whole(p).detach() for name, p in model.named_parameters() if p.requires_grad}
    if way != "sharded later":
        if way in ("one process", "two"):
            found["state"] = {key: whole(value) for key, value in model.state_dict().items()}
        s2ft.set_adapter(model, None)
        s2ft.load_adapter(model, saved, name="again")
        found["again"] = logits(model)
        s2ft.detach(model)
        found["restored"] = logits(model)
    return found


def check_equal_to_one_process(ranks, folder, way, case, config):
    model_of(case).save_pretrained(folder)
    alone, found = live(0, folder, case, config, "one process"), ranks(live, folder, case, config, way)
    base = load(folder, 1).state_dict()
    for rank, one in enumerate(found):
        torch.testing.assert_close(one["before"], alone["before"])
        torch.testing.assert_close(one["attached"], one["before"])
        for name in one.keys() & {"seen", "after", "again"} - ({"seen"} if WAYS[way][1] else set()):
            torch.testing.assert_close(one[name], alone[name], rtol=1e-4, atol=1e-4, msg=name)
        assert torch.equal(one.get("restored", one["before"]), one["before"])  # detach gives the forwards back
        if "state" in one:  # the base, in its own order
            assert all(torch.equal(one["state"][key], value) for key, value in base.items())
        check_same_files(folder_of(folder, way, rank), folder_of(folder, "one process", 0), atol=1e-4)
        # s2 has the same order, so that an optimizer's state fits any number of ranks
        torch.testing.assert_close(one["slices"], alone["slices"], rtol=1e-4, atol=1e-4)
        assert same(one["slices"], found[0]["slices"])  # the ranks have the same, bit for bit


@pytest.mark.parametrize(
    "way, case, layout",
    [
        *(("two", *row) for row in CASES),
        ("packed", "phi3-grouped", "permuted"),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in ([("two", *row) for row in MORE_CASES] + [("parallelized", "llama-biased", "permuted")])
        ),
    ],
)
def test_two_ranks_equal_one_process(ranks, tmp_path, way, case, layout):
    check_equal_to_one_process(ranks, tmp_path, way, case, config_for(case, layout=layout))


def test_inputs_of_every_layer(ranks, tmp_path):
    """Those of o and down are split over the ranks, those of the other layers are on both."""
    check_equal_to_one_process(ranks, tmp_path, "two", "llama", s2ft.S2FTConfig(i_ratio=0.1))


def test_attention_beside_split_experts_is_trained(ranks, tmp_path):
    check_equal_to_one_process(ranks, tmp_path, "two", "mixtral", s2ft.S2FTConfig(v_ratio=0.5, o_ratio=0.5))


@pytest.mark.slow
@pytest.mark.parametrize(
    "way, case, layout",
    [
        ("four", "llama", "permuted"),
        ("two halves", "llama", "permuted"),
        ("two halves", "llama-biased", "indexed"),
        ("two copies", "qwen2-grouped-tied", "permuted"),
        ("sharded later", "llama", "permuted"),
    ],
)
def test_four_ranks_equal_one_process(four_ranks, tmp_path, way, case, layout):
    check_equal_to_one_process(four_ranks, tmp_path, way, case, config_for(case, layout=layout))


# ---- selection and the base ----------------------------------------------------------------------------


def select_all(rank, folder, case, tp=2, sizes=()):
    model = load(folder, tp, **dict(sizes))
    found = {}
    for selection in ("weight", "activation", "product", "gradient"):
        data = None if selection == "weight" else batches(model, 2)
        chosen = s2ft.select(model, config_for(case, selection=selection), data)
        found[selection] = {name: units.tolist() for name, units in chosen.units.items()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    return found, fingerprint(model, couplings_of(model)), required, [p.grad is None for p in model.parameters()]


@pytest.mark.parametrize("case", ["llama-biased", pytest.param("phi3-grouped", marks=pytest.mark.slow)])
def test_selection_and_fingerprint_equal_one_process(ranks, tmp_path, case):
    model_of(case).save_pretrained(tmp_path)
    assert ranks(select_all, tmp_path, case) == [select_all(0, tmp_path, case, tp=1)] * 2


# ---- training as people do it --------------------------------------------------------------------------


def checkpointed(rank, folder, way):
    model = with_adapter(load(folder), config_for("llama"))
    if way is not None:
        model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
    model.train()
    batch = batches(model, 1)[0]
    model(input_ids=batch, labels=batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_checkpointed_blocks_give_the_same_gradients(ranks, tmp_path):
    model_of("llama").save_pretrained(tmp_path)
    expected = ranks(checkpointed, tmp_path, None)[0]
    for way in ("reentrant", "not reentrant"):
        torch.testing.assert_close(ranks(checkpointed, tmp_path, way), [expected] * 2)


def one_unit(rank, folder):
    """Train one unit, which only one rank has, in bfloat16 autocast; generate; and what a copy of the layer computes."""
    model = load(folder)
    layer = "model.layers.1.mlp.down_proj"
    s2ft.attach(model, s2ft.S2FTConfig(units={layer: [3], "model.layers.0.mlp.up_proj": [51]}))
    model.train()
    batch = batches(model, 1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=batch, labels=batch).loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    tokens = model.eval().generate(batch[:1], max_new_tokens=3, do_sample=False)
    found = model.get_submodule(layer)
    copied = copy.deepcopy(found)
    with torch.no_grad():
        found.s2.fill_(9.0)
        x = torch.ones(1, 26)
        return grads, tokens, copied(x), found(x)


def test_a_rank_without_units_takes_part(ranks, tmp_path):
    model_of("llama").save_pretrained(tmp_path)
    first, second = ranks(one_unit, tmp_path)
    assert all(torch.equal(a, b) and bool(a.any()) for a, b in zip(first[0], second[0]))
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[3], first[2])  # a copy has an s2 and a forward of its own


# ---- what is refused -----------------------------------------------------------------------------------


def refused(rank, folder, way):
    """The message, and whether the model is as it was."""
    from transformers.distributed import DistributedConfig

    if way == "pipeline":
        options = DistributedConfig(pp_size=2)
    elif way == "experts":  # tensor parallelism alone leaves them whole since transformers 5.25
        options = DistributedConfig(tp_size=2, ep_size=2)
    else:
        options = DistributedConfig(tp_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=options)
    if way == "plain shards":  # as older releases of transformers split
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and type(parameter.data).__name__ == "DTensor":
                    module._parameters[name] = nn.Parameter(parameter.to_local())
    if way == "another forward":
        layer = model.model.layers[1].mlp.down_proj
        layer.forward = lambda x, forward=layer.forward: forward(x)
    before = {key: (id(p), p.requires_grad) for key, p in model.named_parameters()}
    with pytest.raises(ValueError) as error:
        s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.2))
    return str(error.value), (before == {key: (id(p), p.requires_grad) for key, p in model.named_parameters()})


@pytest.mark.parametrize(
    "case, way, words",
    [
        ("llama", "pipeline", "pipeline stages"),
        ("llama", "plain shards", "update transformers"),
        ("llama", "another forward", "has replaced its forward"),
        ("qwen3-moe", "experts", "experts that are split by tensor or expert parallelism"),
    ],
)
def test_refused_before_anything_changes(ranks, tmp_path, case, way, words):
    model_of(case).save_pretrained(tmp_path)
    assert all(words in message and is_same for message, is_same in ranks(refused, tmp_path, way))


# ---- what a rank has -------------------------------------------------------------------------------------


def bytes_of_rank(rank, folder):
    """Bytes of the weights and deltas that this rank has after attach, and of the deltas alone."""
    model = load(folder)
    s2ft.attach(model, EXPERTS_TOO)
    local = [(p.to_local() if hasattr(p, "to_local") else p, p.requires_grad) for p in model.parameters()]
    return sum(p.nbytes for p, _ in local), sum(p.nbytes for p, trained in local if trained)


EXPERTS_TOO = s2ft.S2FTConfig(d_ratio=0.25, o_ratio=0.25)


def test_the_estimate_counts_the_bytes_that_two_ranks_have(ranks, tmp_path):
    """Experts that the plan leaves whole are on every rank. Kept values of the base are no parameters."""
    model = model_of("mixtral")
    if "moe_tp_experts" in model.tp_plan.values():
        pytest.skip("before transformers 5.25 tensor parallelism splits experts, which attach and estimate refuse")
    model.save_pretrained(tmp_path)
    found = s2ft.estimate(model, EXPERTS_TOO, 2, 9, strategy="tp", devices=2, device="cpu")
    for parameters, trained in ranks(bytes_of_rank, tmp_path):
        assert found.gradients == trained
        assert found.parameters == pytest.approx(parameters, rel=0.05)
