"""Comparing models bit for bit."""

import torch
from torch import nn


def same(ours: nn.Module | dict, theirs: nn.Module | dict) -> bool:
    """Whether two models, or the states of two, have the same names and the same bits."""
    ours, theirs = (one.state_dict() if isinstance(one, nn.Module) else one for one in (ours, theirs))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
