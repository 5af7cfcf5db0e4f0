"""Couplings found by trials: the declared ones again, no wrong ones, and what becomes of every other weight."""

import copy
import json
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from support.aliases import GROUPED, alias_of
from support.inside import discover, judge, registry, search as search_module, trial_of
from support.models import CASES, inputs_of, model_of
from support.nets import Block, Net, batch, seeded
from support.pairs import rest_slow
from test_life_cycle import Subject, live_natively
from torch import nn
from transformers import BitConfig, BitForImageClassification, LlamaForCausalLM

import s2ft
from s2ft import Coupling, S2FTConfig
from s2ft.cli.main import main

# ---- the declared couplings are found again --------------------------------------------------------------------

# The inputs made from a config have no states of an encoder, which cross-attention needs.
GIVEN = ("bert-cross-attention", "gpt2-cross-attention", "bert-generation")


# Types in which less is found than declared, and nothing else.
LESS = {
    "codegen": "its four parts of a packed weight are a number in the code of the attention, and no number of heads",
    "bloom": "with slow_but_exact its blocks multiply by weights past the layers, so these are left alone",
}


SEARCHED = (
    "bert-generation camembert data2vec-text electra ernie layoutlm megatron-bert rembert roberta-prelayernorm "
    "roc_bert roformer tapas xlm-roberta xlm-roberta-xl metaclip_2 tipsv2_text_model axk1 glm4_moe_lite "
    "minicpm3 mistral4 sarvam_mla youtu imagegpt openai-gpt cwm ernie4_5 eurobert exaone exaone4 helium "
    "hunyuan_v1_dense hyperclovax internlm3 iquestcoder ministral ministral3 nomic_bert ultrabert vaultgemma "
    "mellum phimoe esmc olmo3 mt5 pop2piano umt5 deit ijepa vit_msn fsmt m2m_100 pegasus_x speech_to_text "
    "olmoe hy_v3 kolibri1 mimo_v2_flash minimax_m3_vl_text afmoe codegen bloom distilbert falcon swin"
).split()  # not yet all rows: DeBERTa-v2's position projections and wav2vec 2.0's numbers of layers are read otherwise


def declared(model):
    """The declared couplings, without what trials can't know: the kernel of an FFN, and heads that settings number."""
    fixed = {} if model.config.model_type != "whisper" else {"fixed": False}
    found = [replace(one, block=None, activation=None, **fixed) for one in registry.couplings_of(model)]
    return {one for one in found if not one.is_one_sided}


def check_found_again(model, example=None):
    found = {one for one in discover(model, example).couplings if not one.is_one_sided}
    assert found <= declared(model)
    assert found == declared(model) or getattr(model.config, "model_type", None) in LESS


@pytest.mark.parametrize(
    "case", rest_slow(CASES, ("llama-grouped", "phi3-multi-query", "gpt-neox", "olmo2-grouped", "qwen2-moe"))
)
def test_discovery_finds_the_declared_couplings(case):
    model = model_of(case)
    check_found_again(model, inputs_of(model) if case in GIVEN else None)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SEARCHED)
def test_discovery_finds_the_couplings_of_types_with_the_same_modules(model_type):
    for options in ({}, {"num_key_value_heads": 2}) if model_type in GROUPED else ({},):
        model = alias_of(model_type, **options)
        check_found_again(model, inputs_of(model) if model_type in GIVEN else None)


def test_experts_are_tried_on_a_given_example():
    """The grouped product, which transformers prefers, takes no float64."""
    model = model_of("qwen3-moe")
    model.set_experts_implementation("grouped_mm")
    found = discover(model, inputs_of(model)).couplings
    assert {coupling.kind for coupling in found} == {"experts", "attention", "ffn"}
    assert not any(coupling.is_one_sided for coupling in found)


def test_a_model_on_meta_is_enough_and_layers_are_numbered():
    with torch.device("meta"):
        model = model_of("whisper")
    found = discover(model).couplings
    assert [one.layer for one in found] == sorted(one.layer for one in found)
    assert {one.layer for one in found} == set(range(5))  # 2 of the encoder, 3 of the decoder
    assert set(found) == declared(model)


class Headed(nn.Module):
    """Its head runs last and could read the channels of `down`, but they stay."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 7)

    def forward(self, x):
        return self.head((x + self.down(torch.relu(self.up(x)))).cumsum(-1))


def test_a_layer_of_a_refused_pair_is_free_for_another():
    found = [one for one in discover(Headed(), torch.randn(2, 12)).couplings if not one.is_one_sided]
    assert [(one.producers[0].path, one.consumer.path) for one in found] == [("up", "down")]


# ---- wrong couplings are refused ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def olmo_twin():
    """A twin with grouped queries and norms over all heads, and its couplings of layers 0 and 1."""
    trial = trial_of(model_of("olmo2"))
    return trial, {(one.kind, one.layer): one for one in discover(trial.twin).couplings}


def halved(one):
    parts = [replace(p, count=2 * p.count, unit=p.unit // 2) for p in one.projections]
    vectors = tuple(replace(vector, unit=vector.unit // 2) for vector in one.vectors)
    return replace(one, producers=tuple(parts[:-1]), consumer=parts[-1], vectors=vectors)


WRONG = {
    "heads of half the width": lambda found: halved(found["attention", 0]),
    "no vectors": lambda found: replace(found["attention", 0], vectors=()),
    "one vector of two": lambda found: replace(found["attention", 0], vectors=found["attention", 0].vectors[:1]),
    "no keys": lambda found: replace(
        found["attention", 0], producers=tuple(p for p in found["attention", 0].producers if p.key != "k")
    ),
    "values of another layer": lambda found: replace(
        found["attention", 0], producers=(*found["attention", 0].producers[:2], found["attention", 1].producers[2])
    ),
    "down of another layer": lambda found: replace(found["ffn", 0], consumer=found["ffn", 1].consumer),
    "no gate": lambda found: replace(found["ffn", 0], producers=found["ffn", 0].producers[:1]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_coupling_is_refused(wrong, olmo_twin):
    trial, found = olmo_twin
    assert not judge(trial, [WRONG[wrong](found)])[0]
    assert all(judge(trial, [one])[0] for (_, layer), one in found.items() if layer == 0)


def test_another_order_of_a_packed_weight_is_refused():
    trial = trial_of(model_of("gpt-neox"))
    one = next(c for c in discover(trial.twin).couplings if c.kind == "attention")
    path, o = one.producers[0].path, one.consumer
    apart = Coupling.packed_attention(0, qkv=path, o=o.path, heads=o.count, head_dim=o.unit)
    assert judge(trial, [one])[0] and not judge(trial, [apart])[0]


def test_heads_with_numbers_stay_and_cross_attention_moves():
    found = discover(model_of("t5")).couplings
    assert {(one.kind, one.fixed) for one in found} == {("attention", True), ("cross-attention", False), ("ffn", False)}


# ---- what becomes of every weight --------------------------------------------------------------------------------


def test_an_own_module_needs_no_number_of_heads():
    found = discover(Net(), batch())
    assert {(one.kind, one.consumer.key, one.count) for one in found.couplings} == {
        ("attention", "o", 4),
        ("ffn", "d", 40),
    }
    assert {row.status for row in found.weights} == {"confirmed"} and len(found.weights) == 18
    assert "18 confirmed" in str(found)


class Bypassed(Block):
    """The output projection's weight is used without its layer, as in nn.MultiheadAttention."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(24, 24)

    def forward(self, x):
        return F.linear(super().forward(x), self.last.weight)


class SometimesPast(Block):
    """Kernels that are not installed here read the weight past the layer, as those of state spaces do."""

    is_fast = False

    def forward(self, x):
        x = x + self.attention(x)
        inner = torch.tanh(self.fc1(x))
        return x + (F.linear(inner, self.fc2.weight) if self.is_fast else self.fc2(inner))


REASONS = {  # a module, its input, the layers in which couplings are found, and what becomes of some weights
    # the attention sees one token: queries and keys can be in any order, so their heads are not confirmed
    "a trial that could not fail": (
        Net,
        batch()[:, :1],
        {0, 1, 2},
        {"blocks.0.attention.q_proj": ("in place", "alone changes nothing"), "blocks.0.fc1": ("confirmed", "")},
    ),
    # the output of the last block is not used, as in many vision towers
    "a layer without a gradient": (
        lambda: Net(lambda outputs: outputs[-2]),
        batch(),
        {0, 1},
        {"blocks.2.fc1": ("untouched", "no gradient")},
    ),
    "a layer whose forward is not called": (Bypassed, batch(), {0}, {"last": ("untouched", "runs without it")}),
    "a layer whose weight is read past it": (
        SometimesPast,
        batch(),
        {0},
        {"fc2": ("untouched", "without its layer"), "fc1": ("one-sided", "fc2")},
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_is_not_confirmed_has_a_reason(case):
    make, given, layers, expected = REASONS[case]
    found = discover(seeded(make), given)
    rows = {row.path: row for row in found.weights}
    for path, (status, words) in expected.items():
        assert rows[path].status == status and words in rows[path].reason, path
    assert {one.layer for one in found.couplings} == layers


# ---- attach, save, load ------------------------------------------------------------------------------------------


@pytest.fixture
def unknown(monkeypatch):
    """A llama model of a type that no family has."""
    for table in (registry.FAMILIES, registry._REGISTERED):
        monkeypatch.delitem(table, "llama", raising=False)
    return model_of("llama")


def test_a_model_of_no_family_lives_as_others_and_only_attach_searches(unknown, tmp_path, monkeypatch):
    searches = Mock(wraps=registry.discover)
    monkeypatch.setattr(registry, "discover", searches)
    live_natively(Subject(partial(model_of, "llama"), dict(d_ratio=0.2, o_ratio=0.5)), tmp_path)
    assert searches.call_count == 1


def test_plan_select_and_estimate_find_the_same_couplings(unknown):
    config = S2FTConfig(d_ratio=0.2, o_ratio=0.5)
    with torch.device("meta"):
        hollow = LlamaForCausalLM(unknown.config)
    planned = s2ft.plan(hollow, config)
    assert s2ft.estimate(hollow, config, 1, 4).trained == planned.trainable
    assert set(s2ft.select(unknown, config).units) == {
        f"model.layers.{i}.{name}" for i in range(3) for name in ("mlp.down_proj", "self_attn.o_proj")
    }
    report = s2ft.attach(unknown, config)
    assert planned.trainable == report.trainable and "confirmed" in str(report)


def test_a_search_is_done_once_for_models_that_are_alike(monkeypatch):
    count = []
    monkeypatch.setattr(search_module, "_FOUND", {})
    monkeypatch.setattr(
        search_module, "search", lambda *args, search=search_module.search: count.append(1) or search(*args)
    )
    model = model_of("opt")
    assert discover(model).couplings == discover(copy.deepcopy(model)).couplings and len(count) == 1
    discover(model_of("opt-post-norm"))
    assert len(count) == 2


# ---- bad input ---------------------------------------------------------------------------------------------------


BAD = {
    "no example": (Net, None, ValueError, "pass example="),
    "an example that does not run": (Net, torch.randn(2, 7, 5), ValueError, "mat1 and mat2|must match the size"),
    "an example of another type": (Net, "text", TypeError, "example must be a tensor"),
    "random outputs": (
        lambda: Net(lambda outputs: outputs[-1] + torch.randn_like(outputs[-1])),
        batch(),
        ValueError,
        "random",
    ),
    "outputs that are choices": (
        lambda: Net(lambda outputs: outputs[-1].argmax(-1)),
        batch(),
        ValueError,
        "no floating-point",
    ),
    "nothing to train": (lambda: nn.Sequential(nn.LayerNorm(24)), batch(), ValueError, "nothing that it can train"),
    # its convolutions are of classes of its own, which standardise their weights
    "nothing to train in a model of transformers": (
        lambda: BitForImageClassification(
            BitConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=2)
        ),
        None,
        ValueError,
        "BitForImageClassification: s2ft finds nothing that it can train",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_the_model_untouched(case):
    make, example, error, words = BAD[case]
    model = make().train()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(error, match=words):
        s2ft.attach(model, S2FTConfig(d_ratio=0.2), example=example)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_transformers_model_that_no_input_fits_says_what_was_tried(unknown):
    unknown.__class__ = type("Odd", (LlamaForCausalLM,), {"forward": lambda self, input_ids: input_ids.no_such_thing})
    with pytest.raises(ValueError, match=r"no small copy of it runs. Tried: .*input_ids: AttributeError"):
        s2ft.plan(unknown, S2FTConfig(d_ratio=0.2))


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_json(unknown, tmp_path, capsys):
    unknown.config.save_pretrained(tmp_path)
    assert main(["couplings", str(tmp_path)]) == 0
    assert "model.layers.*.mlp.down_proj" in (table := capsys.readouterr().out) and "21 confirmed" in table
    assert main(["couplings", str(tmp_path), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    couplings = [Coupling.from_dict(one) for one in written["couplings"]]
    assert set(couplings) == set(discover(unknown).couplings) and len(written["weights"]) == 21
