"""Each family states the release of transformers that it needs, and an older one is refused by name."""

import re
import sys
from pathlib import Path

import pytest
import torch
from support.inside import FLOOR, SINCE, families, is_too_old
from support.models import CASES, model_of
from transformers import CLIPTextModelWithProjection

import s2ft

ROOT = Path(__file__).parents[1]


def test_every_family_states_a_release_that_this_transformers_or_an_older_one_is():
    assert {since for since in SINCE.values() if not re.fullmatch(r"\d+\.\d+", since)} == set()
    assert all(is_too_old(FLOOR, model_type) == (since != FLOOR) for model_type, since in SINCE.items())
    assert f'"transformers>={FLOOR}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", families.FILES)
def test_a_release_is_stated_for_model_types_of_the_family_only(file):
    family = getattr(families, file)
    since = getattr(family, "SINCE", FLOOR)
    assert isinstance(since, str) or (since.keys() <= set(family.MODEL_TYPES) and FLOOR not in since.values())


def test_an_older_transformers_is_refused_by_name_and_the_model_is_unchanged(monkeypatch):
    model = model_of("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setitem(SINCE, "llama", "5.9")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.8.3")
    with pytest.raises(ValueError, match=r"'llama' needs transformers >= 5\.9, and this is transformers 5\.8\.3.*pip"):
        s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.5))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("release,old", [("5.9.0", False), ("5.9.0.dev0", False), ("5.10.1", False), ("5.8.9", True)])
def test_releases_are_compared_as_numbers(monkeypatch, release, old):
    monkeypatch.setitem(SINCE, "llama", "5.9")
    assert is_too_old(release, "llama") is old and not is_too_old("1.0", "a type of no family")


def test_a_family_that_the_user_registers_needs_no_release(monkeypatch):
    from support.inside import registry

    monkeypatch.setitem(registry._REGISTERED, "llama", families.FAMILIES["llama"])
    monkeypatch.setitem(SINCE, "llama", "999.0")
    assert registry.couplings_of(model_of("llama"))


def test_the_layers_of_a_tower_inside_one_more_module_are_found(monkeypatch):
    """CLIP's towers with a projection have no prefix of their own in older releases of transformers."""
    monkeypatch.setattr(CLIPTextModelWithProjection, "base_model_prefix", "clip")
    model = CLIPTextModelWithProjection(CASES["clip-text"]())
    found = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.5, o_ratio=0.5))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert found.trainable > 0 and all(name.startswith("text_model.encoder.layers.") for name in trained)
