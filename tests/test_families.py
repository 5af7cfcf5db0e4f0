"""Each family states the release of transformers that it needs, and an older one is refused by name."""

import re
import sys

import pytest
import torch
from support.aliases import alias_of
from support.inside import FAMILIES, SINCE, is_too_old, registry
from support.models import CASES, model_of
from transformers import CLIPTextModelWithProjection

import s2ft


def test_releases_are_stated_for_known_types():
    assert SINCE.keys() <= FAMILIES.keys()
    assert all(re.fullmatch(r"5\.\d+", since) and not is_too_old(since, name) for name, since in SINCE.items())


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
    monkeypatch.setitem(registry._REGISTERED, "llama", FAMILIES["llama"])
    monkeypatch.setitem(SINCE, "llama", "999.0")
    assert registry.couplings_of(model_of("llama"))


def test_the_layers_of_a_tower_inside_one_more_module_are_found(monkeypatch):
    """CLIP's towers with a projection have no prefix of their own in older releases of transformers."""
    monkeypatch.setattr(CLIPTextModelWithProjection, "base_model_prefix", "clip")
    model = CLIPTextModelWithProjection(CASES["clip-text"]())
    found = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.5, o_ratio=0.5))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert found.trainable > 0 and all(name.startswith("text_model.encoder.layers.") for name in trained)


@pytest.mark.parametrize("case", ["big_bird", "whisper"])
def test_heads_that_have_numbers_stay_and_long_rows_run(case):
    """A head of BigBird draws blocks of its own, and Whisper's settings name heads of its cross-attention."""
    sparse = dict(attention_type="block_sparse", block_size=4, num_random_blocks=1, max_position_embeddings=64)
    model = alias_of(case, **sparse) if case == "big_bird" else model_of(case)
    names = ("self.key.weight", "encoder_attn.k_proj.weight")
    keys = {name: one.clone() for name, one in model.named_parameters() if name.endswith(names)}
    s2ft.attach(model, s2ft.S2FTConfig(o_ratio=0.5))
    assert keys and all(torch.equal(model.get_parameter(name), key) for name, key in keys.items())
    if case == "big_bird":  # the proof's short row turned its layers into others
        model(input_ids=torch.arange(3, 39)[None] % 30)
