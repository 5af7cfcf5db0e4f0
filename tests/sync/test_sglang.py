"""SGLang's custom weight loader, with a stand-in for its model."""

import pytest
import torch
from support.engines import Engine, checkpoint

from s2ft.sync.sglang import load, tensors_of
from s2ft.sync.wire import SliceSpec, hashes_of, to_message

NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def engine():
    made = Engine()
    made.load_weights(checkpoint().items())
    return made


def init(base, **changes):
    index = torch.tensor([1, 20])
    spec = SliceSpec(NAME, tuple(base[NAME].shape), 1, index, hashes_of(base[NAME][:, index], 1))
    return tensors_of({"sender": "a", "dtype": "float32", "slices": to_message([spec]), **changes})


def test_a_run(engine):
    before = engine.checksums()
    load(engine, init(checkpoint()))
    for step in (1, 2):
        numbers = torch.randn(16, 2)
        load(engine, tensors_of({"sender": "a", "step": step}, numbers))
        assert torch.equal(engine.down[:, [1, 20]], numbers)
    load(engine, tensors_of({"base": True, "sender": "a"}))
    assert all(torch.equal(one, before[name]) for name, one in engine.checksums().items())


def test_bad_input(engine):
    before = engine.checksums()
    with pytest.raises(RuntimeError, match="before init"):
        load(engine, tensors_of({"sender": "a", "step": 1}, torch.zeros(32)))
    base = checkpoint()
    base[NAME][3, 20] += 1
    with pytest.raises(ValueError, match=f"the first is {NAME}"):
        load(engine, init(base))
    load(engine, init(checkpoint()))
    with pytest.raises(ValueError, match="31 numbers"):
        load(engine, tensors_of({"sender": "a", "step": 1}, torch.zeros(31)))
    with pytest.raises(RuntimeError, match="so sender 'b' is refused"):
        load(engine, init(checkpoint(), sender="b"))
    with pytest.raises(ValueError, match="takes what tensors_of makes, not tensors named lm_head.weight"):
        load(engine, [("lm_head.weight", torch.zeros(2))])
    with pytest.raises(ValueError, match="damaged"):
        load(engine, [("s2ft.message", torch.tensor([1, 2], dtype=torch.uint8))])
    assert all(torch.equal(one, before[name]) for name, one in engine.checksums().items())
