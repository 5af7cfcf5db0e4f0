"""Modules outside any family that PEFT can adapt by their names."""

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from s2ft.peft import S2FTPeftConfig, S2FTPeftLayer
from support.nets import seeded

MODULES = {  # a module and an input
    "linear": lambda: (nn.Linear(9, 11), torch.randn(4, 3, 9)),
    "linear-unbiased": lambda: (nn.Linear(9, 11, bias=False), torch.randn(4, 9)),
    "Conv1D": lambda: (Conv1D(11, 9), torch.randn(4, 3, 9)),
    "conv1d-same": lambda: (nn.Conv1d(6, 8, 3, padding="same", dilation=2), torch.randn(4, 6, 12)),
    "conv2d-reflect": lambda: (
        nn.Conv2d(6, 8, 3, stride=2, padding=1, padding_mode="reflect"),
        torch.randn(4, 6, 7, 7),
    ),
    "conv3d": lambda: (nn.Conv3d(6, 8, 2, padding=1), torch.randn(4, 6, 4, 4, 4)),
}


def net_of(kind, dtype=torch.float32):
    """A net of the module and an activation; the same each time."""
    return seeded(lambda: nn.Sequential(MODULES[kind]()[0], nn.Tanh())).to(dtype).eval()


class Router(nn.Linear):
    """Returns more than one tensor, as routers do."""

    def forward(self, x):
        logits = super().forward(x)
        return logits, logits.softmax(-1)


def layers_of(model):
    """The layers that s2ft trains in a PEFT model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, S2FTPeftLayer)}


def injected(model: nn.Module, **config) -> PeftModel:
    """The model in PEFT, with slices that change its output."""
    return get_peft_model(model, S2FTPeftConfig(**config, init_weights=False)).eval()
