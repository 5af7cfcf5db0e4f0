"""Liger-Kernel and s2ft in one model, whichever comes first: the losses of training without Liger-Kernel."""

from contextlib import contextmanager

import pytest
import torch
from support.gpu import RATIOS, check_frozen, frozen, small_model, train

import s2ft

pytestmark = pytest.mark.cuda
REPLACED = ("LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb")


@contextmanager
def as_it_was():
    """Undo what Liger-Kernel replaces in transformers."""
    from transformers.models.llama import modeling_llama

    kept = {name: getattr(modeling_llama, name) for name in REPLACED}
    forward = modeling_llama.LlamaForCausalLM.forward
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(modeling_llama, name, value)
        modeling_llama.LlamaForCausalLM.forward = forward


@pytest.mark.parametrize("when", ("class", "before attach", "after attach"))
def test_training_with_liger(when):
    liger = pytest.importorskip("liger_kernel.transformers")
    model, ids = small_model("cuda")
    expected = train(model, lambda: model(input_ids=ids, labels=ids).loss)
    with as_it_was():
        if when == "class":
            liger.apply_liger_kernel_to_llama(fused_linear_cross_entropy=False)
        model, ids = small_model("cuda", attach=when != "before attach")
        if when != "class":
            liger.apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=False)
        if when == "before attach":
            s2ft.attach(model, s2ft.S2FTConfig(**RATIOS))
        before = frozen(model)
        got = train(model, lambda: model(input_ids=ids, labels=ids).loss)
        check_frozen(model, before)
    assert got == pytest.approx(expected, rel=2e-2)
    assert all(torch.isfinite(p).all() for p in model.parameters())
