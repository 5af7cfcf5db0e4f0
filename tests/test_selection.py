"""A selection is deterministic, in range and of the requested size."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support.inside import Projection, select_units as select

from s2ft import Coupling, S2FTConfig


def ffn(layer, channels=40):
    return Coupling(
        "ffn",
        layer,
        (Projection("u", f"{layer}.up", channels, 1, 0), Projection("g", f"{layer}.gate", channels, 1, 0)),
        Projection("d", f"{layer}.down", channels, 1, 1),
    )


COUPLINGS = [ffn(i) for i in range(4)]


@settings(deadline=None)
@given(u=st.floats(0.02, 1), g=st.floats(0.02, 1), d=st.floats(0.02, 1), seed=st.integers(0, 2**31))
def test_random_selection(u, g, d, seed):
    config = S2FTConfig(u_ratio=u, g_ratio=g, d_ratio=d, seed=seed)
    selection = select(COUPLINGS, config)
    assert selection == select(COUPLINGS, config)
    for path, units in selection.units.items():
        ratio = {"up": u, "gate": g, "down": d}[path.split(".")[1]]
        assert units.numel() == int(ratio * 40 + 0.5) and torch.equal(units, units.unique())
        assert 0 <= units.min() and units.max() < 40
    small, large = sorted((set(selection["0.up"].tolist()), set(selection["0.gate"].tolist())), key=len)
    assert small <= large  # producers are nested


def test_seed_layer_and_side_give_different_units():
    one, two = (select(COUPLINGS, S2FTConfig(u_ratio=0.5, d_ratio=0.5, seed=seed)) for seed in (0, 1))
    assert len({tuple(units.tolist()) for units in [one["0.up"], one["1.up"], one["0.down"], two["0.up"]]}) == 4


def test_the_random_draw_is_pinned():
    """An adapter file contains its units, but a selection by seed must not change between versions either."""
    assert select([ffn(0)], S2FTConfig(d_ratio=0.1))["0.down"].tolist() == [7, 8, 17, 36]


def test_the_smallest_ratio_named_selects_one():
    for channels in (3, 7, 9, 41, 14336):
        with pytest.raises(ValueError, match="ratio that selects one is") as error:
            select([ffn(0, channels)], S2FTConfig(d_ratio=1e-9))
        ratio = float(str(error.value).rpartition(" ")[2])
        assert select([ffn(0, channels)], S2FTConfig(d_ratio=ratio))["0.down"].numel() == 1
