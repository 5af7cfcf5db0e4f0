"""Model types that have the declaration of another type's family: the declaration is right for each of them."""

import copy
from fnmatch import fnmatch

import pytest
import torch
from support.aliases import (
    DEAD,
    GROUPED,
    LEFT_OUT,
    NUMBERED,
    RARE,
    RARELY_GROUPED,
    ROWS,
    VARIANTS,
    alias_of,
    with_dropout,
)
from support.composites import missing as lacks_composite, part_types
from support.inside import (
    FAMILIES,
    composite,
    couplings_of,
    gated_forward,
    is_too_old,
    mounted_deltas,
    projections_of,
    record_of,
    tower_of,
)
from support.models import ALL_RATIOS, CASES, block_weights, inputs_of, loss_of, output_of, randomized, token_batch
from support.pairs import rest_slow
from support.states import same
from support.tolerances import LOGITS, relative_difference
from transformers import AutoConfig, AutoModelForCausalLM, __version__

import s2ft
from s2ft import S2FTConfig

CASE_TYPES = {make().model_type for make in CASES.values()}


def check_declaration(base):
    """Attach, train one step, merge and detach a copy of `base`, with all its projections.

    Experts without tokens do not train. Their projections are compared with the weights of the blocks only.
    """
    model, couplings, model_type = copy.deepcopy(base), couplings_of(base), base.config.model_type
    projections = list(projections_of(couplings))
    paths, weights = {p.path for p in projections}, block_weights(base, LEFT_OUT.get(model_type, ()))
    assert weights - paths == set()  # no layer of a block is left out
    assert all("conv" in path for path in paths - weights)
    ratios = {
        key: ratio for key, ratio in {**ALL_RATIOS, "l_ratio": 0.2}.items() if key[0] in {p.key for p in projections}
    }
    towers = sorted({tower_of(base, path) for path in paths})
    with torch.no_grad():  # recurrent models keep the last state, which can't be copied with a graph
        before = output_of(base)
        config = S2FTConfig(**ratios, layout="permuted", towers=towers if len(towers) > 1 else None)
        s2ft.attach(model, config, verify=True, example=inputs_of(base))
        assert relative_difference(output_of(model), before) <= LOGITS

    loss_of(model).backward()
    torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0).step()
    deltas = mounted_deltas(record_of(model))
    assert deltas.keys() == {p.name for p in projections}
    changes = {p.name: float(deltas[p.name].values.abs().max()) for p in projections if p.expert is None}
    # a gradient of 0 may come out as a rounding error
    dead = [name for name, change in changes.items() if change <= 1e-6 * max(changes.values())]
    assert [name for name in dead if not any(fnmatch(name, pattern) for pattern in DEAD.get(model_type, ()))] == []

    with torch.no_grad():
        after = output_of(model)
        assert relative_difference(after, before) > LOGITS and same(s2ft.detach(copy.deepcopy(model)), base)
        assert relative_difference(output_of(s2ft.merge(model)), after) <= LOGITS


def check_ffn_kernel(model):
    """The forward of one op has to be all that the module of a gated FFN computes, also in training."""
    for coupling in couplings_of(model):
        if coupling.activation is not None:
            block, x = model.get_submodule(coupling.block), torch.randn(8, model.config.hidden_size)
            assert (
                relative_difference(gated_forward(block, x, coupling.activation, type(block.act_fn)), block(x))
                <= LOGITS
            ), coupling.block


@pytest.mark.parametrize("model_type", rest_slow(ROWS, set(ROWS) - set(RARE)))
def test_the_declaration_of_the_family_is_right(model_type):
    base = alias_of(model_type)
    movable = [coupling.movable for coupling in couplings_of(base) if "attention" in coupling.kind]
    assert any(movable) == (bool(movable) and model_type not in NUMBERED)
    check_declaration(base)
    check_ffn_kernel(with_dropout(base))


@pytest.mark.parametrize("model_type", rest_slow(GROUPED, set(GROUPED) - set(RARELY_GROUPED)))
def test_the_declaration_is_right_with_grouped_queries(model_type):
    check_declaration(alias_of(model_type, num_key_value_heads=2))


@pytest.mark.parametrize("variant", rest_slow(VARIANTS, {"falcon-groups"}))
def test_other_layouts_of_a_type(variant):
    model_type, options = VARIANTS[variant]
    check_declaration(alias_of(model_type, **options))


def test_a_decoder_alone_has_no_cross_attention():
    """BART's decoder has the layers, and runs them only with an encoder. They would get no gradient."""
    options = {**ROWS["bart"], "is_encoder_decoder": False, "is_decoder": True}
    base = randomized(AutoModelForCausalLM, AutoConfig.for_model("bart", **options))
    assert {coupling.kind for coupling in couplings_of(base)} == {"ffn", "attention"}
    ratios = dict.fromkeys(("q_ratio", "k_ratio", "v_ratio", "o_ratio", "u_ratio", "d_ratio"), 0.5)
    s2ft.attach(base, S2FTConfig(**ratios), verify=True, example={"input_ids": token_batch(base)})
    loss_of(base).backward()
    assert all(parameter.grad is not None for parameter in base.parameters() if parameter.requires_grad)


def test_every_model_type_is_tested():
    composites = set(composite.PROJECTORS)  # tests/test_composites.py tests them with their parts
    known = {kind for kind in FAMILIES if not is_too_old(__version__, kind)}
    assert CASE_TYPES | set(ROWS) <= set(FAMILIES) and not CASE_TYPES & set(ROWS)
    if any(map(lacks_composite, composites)):
        pytest.skip(f"transformers {__version__} lacks composite types, and nothing else names their parts")
    assert known <= CASE_TYPES | set(ROWS) | composites | part_types()
