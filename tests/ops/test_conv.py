"""Trainable layers equal PyTorch's convolution with the effective weight. test_products.py has the common hazards."""

import pytest
import torch
from support.inside import S2ColumnConv, S2RowConv
from support.tolerances import relative_difference

PLAIN = {
    "1d": lambda: torch.nn.Conv1d(5, 6, 3, stride=2, padding=1),
    "2d": lambda: torch.nn.Conv2d(5, 6, (3, 2), padding=(1, 0), dilation=(1, 2), bias=False),
    "3d": lambda: torch.nn.Conv3d(5, 6, 2),
    "same": lambda: torch.nn.Conv2d(5, 6, (3, 4), padding="same"),
    "valid": lambda: torch.nn.Conv2d(5, 6, 3, padding="valid"),
    "reflected": lambda: torch.nn.Conv2d(5, 6, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: torch.nn.Conv1d(5, 6, 3, padding=2, padding_mode="circular"),
}


@pytest.mark.parametrize("batched", (True, False))
@pytest.mark.parametrize("kind", (S2ColumnConv, S2RowConv))
@pytest.mark.parametrize("plain", PLAIN)
def test_layers_equal_the_convolution_they_replace(plain, kind, batched):
    conv = PLAIN[plain]()
    x = torch.randn(*[2] * batched, 5, *[7] * len(conv.kernel_size))
    expected = conv(x).detach()
    for where in ({"start": 1, "end": 4}, {"index": torch.tensor([4, 1])}):
        layer, weight = kind.from_module(conv, **where), conv.weight.clone()
        assert relative_difference(layer(x), expected) <= 1e-6
        torch.nn.init.normal_(layer.s2)
        y = layer(x)
        assert relative_difference(y, expected) > 1e-2
        y.square().sum().backward()
        assert layer.s2.grad.shape == layer.s2.shape and layer.s2.grad.abs().sum() > 0
        assert torch.equal(conv(x), y)  # conv and the layer share the weight
        layer.unfuse()
        assert torch.equal(layer.weight, weight)
        layer.enabled = False
        assert relative_difference(layer(x), expected) <= 1e-6
        assert "units" in repr(layer) or "start" in repr(layer)
