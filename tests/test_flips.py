"""Every boolean and every listed choice of each type's config, flipped one at a time: attach is right, or refuses."""

from dataclasses import replace

import pytest
from support import composites
from support.aliases import ROWS, missing
from support.flips import Flip, flips_of, outcome_of, outcomes_of
from support.inside import composite, named
from support.models import CASES

# Flips that change a block, of which some were wrong once
FAST = {
    "beit": Flip("", "use_shared_relative_position_bias", True),
    "dinov2": Flip("", "use_swiglu_ffn", True),
    "dinov3_vit": Flip("", "use_gated_mlp", True),
    "doge": Flip("", "is_moe", True),
}


def known(types):
    """The types that this version of transformers has."""
    return [one for one in types if not (composites.missing if one in composite.PROJECTORS else missing)(one)]


@pytest.mark.parametrize("model_type", known(FAST))
def test_a_flag_that_changes_a_block(model_type):
    assert FAST[model_type] in list(flips_of(model_type))
    assert outcome_of(model_type, FAST[model_type], None).word == "right"


def test_a_flag_that_a_declaration_does_not_know_is_found(monkeypatch):
    # attach proves itself, so such a declaration is refused and computes nothing wrong
    (names,) = named.BY_TYPE["dinov3_vit"]
    monkeypatch.setitem(named.BY_TYPE, "dinov3_vit", (replace(names, gated=None),))
    assert outcome_of("dinov3_vit", FAST["dinov3_vit"], None).word == "refused"


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", sorted(known({*(make().model_type for make in CASES.values()), *ROWS, *composite.PROJECTORS}))
)
def test_every_flip_is_right(model_type):
    found = {str(flip): one for flip, one in outcomes_of(model_type).items()}
    assert found["as it is"].word == "right"
    assert {flip: one for flip, one in found.items() if one.word in ("wrong", "refused")} == {}
