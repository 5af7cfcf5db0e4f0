"""The input of the output layer is contiguous, the logits are the same, and the hook is removed afterwards."""

import pytest
import torch
from train.tiny import tiny_model

from s2ft.text.output_head import contiguous_head


def test_a_frozen_head_has_a_contiguous_input_and_the_same_logits():
    model, ids, seen = tiny_model().requires_grad_(False), torch.randint(3, 200, (4, 7)), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].is_contiguous()))
    expected = model(ids, logits_to_keep=2).logits
    with contiguous_head(model):
        logits = model(ids, logits_to_keep=2).logits
    assert seen == [False, True]  # if the model packs its positions itself, the hook can be removed from s2ft
    torch.testing.assert_close(logits, expected)


def test_the_head_is_restored_afterwards():
    model = tiny_model()
    with pytest.raises(RuntimeError), contiguous_head(model):
        assert model.lm_head._forward_pre_hooks
        raise RuntimeError
    assert not model.lm_head._forward_pre_hooks
