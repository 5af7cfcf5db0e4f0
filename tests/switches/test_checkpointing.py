"""Gradient checkpointing does not change the gradients, whichever layers below are frozen."""

import copy
import functools

import pytest
import torch
from support.inside import record_of
from support.models import inputs_of, loss_of, token_batch
from support.pairs import pairs_mostly_slow
from support.slices import assert_same, attached, everything, gradients, plain_model
from support.states import randomize, with_adapter
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import s2ft
from s2ft import S2FTConfig

# llama-grouped and gemma2 have the FFN kernel, phi3 and gpt-neox several projections in a weight, gpt2 has Conv1D, vit
# and whisper have no tokens, t5 and whisper an encoder and a decoder, qwen3-moe has experts.
FAMILIES = ("llama-grouped", "qwen2", "gemma2", "phi3", "gpt2", "gpt-neox", "bert", "vit", "t5", "whisper", "qwen3-moe")
# transformers itself rounds these models differently when it checkpoints: t5's forward runs without its cache, and the
# gradients that several decoder layers give whisper's encoder are added up in another order.
reentrants = pytest.mark.parametrize("reentrant", (False, True), ids=("inside", "reentrant"))


def enable(model, reentrant, **more):
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant}, **more)
    return model


def without_transformers_hook(model):
    """Remove the hook of transformers. Old versions have none, and the newest have it only for models with tokens."""
    model.disable_input_require_grads()
    return model


@pytest.mark.parametrize("case,layout,reentrant", pairs_mostly_slow(FAMILIES, ("permuted", "indexed"), (False, True)))
def test_gradients_equal_those_without_checkpointing(case, layout, reentrant):
    """Checkpointing is enabled before or after attach, with the hook of transformers and with only that of s2ft."""
    expected = gradients(attached(case, layout=layout))
    before = randomize(with_adapter(enable(plain_model(case), reentrant), everything(case, layout=layout)))
    for model in (before, without_transformers_hook(enable(attached(case, layout=layout), reentrant))):
        assert_same(gradients(model), expected, {"t5": 1e-5, "whisper": 1e-5}.get(case, 0.0))


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant parameter")
@pytest.mark.parametrize(
    "options", (dict(every_n_layers=2), dict(activation_checkpointing_kwargs={"preserve_rng_state": True}))
)
def test_other_ways_to_enable_it(options):
    """PyTorch uses its default without use_reentrant, which has been the reentrant variant."""
    model, expected = attached("llama-grouped"), gradients(attached("llama-grouped"))
    model.activation_checkpointing_enable(**options)
    assert_same(gradients(without_transformers_hook(model)), expected)


@reentrants
def test_dropout_is_the_same_in_the_second_forward(reentrant):
    found = []
    for on in (False, True):
        model = attached("llama-grouped")
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        torch.manual_seed(5)
        found.append(gradients(enable(model, reentrant) if on else model))
    assert_same(found[1], found[0])
    assert not torch.equal(next(iter(gradients(model).values())), next(iter(found[0].values())))


@reentrants
def test_embeddings_from_the_caller(reentrant):
    """inputs_embeds need no gradient, and the module with the hook of transformers is skipped."""

    def loss(model):
        batch = token_batch(model)
        return model(inputs_embeds=model.get_input_embeddings()(batch).detach(), labels=batch).loss

    expected = gradients(attached("llama-grouped"), loss)
    assert_same(gradients(enable(attached("llama-grouped"), reentrant), loss), expected)


# ---- the backward ends at the lowest trained layer -----------------------------------------------------------


@pytest.mark.parametrize("on", (None, "inside", "reentrant"))
def test_no_gradient_below_the_lowest_trained_layer(on):
    model = randomize(with_adapter(plain_model("llama-grouped"), S2FTConfig(d_ratio=0.2, layers=[1])))
    if on:
        without_transformers_hook(enable(model, on == "reentrant"))
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    loss_of(model).backward()
    assert seen == [False, True, True]
    assert record_of(model).mounts["model.layers.1.mlp.down_proj"].layer.s2.grad.any()


def test_the_lowest_trained_layer_computes_no_input_gradient(monkeypatch):
    """Two of three down projections compute a gradient of their input, because the lowest one does not need it. This
    holds before checkpointing is enabled and after it is disabled again."""
    model = randomize(with_adapter(plain_model("llama-grouped"), S2FTConfig(d_ratio=0.2)))
    kind, calls = type(next(iter(record_of(model).mounts.values())).layer.kind), []
    grad_of_x = kind.grad_of_x
    monkeypatch.setattr(kind, "grad_of_x", lambda *given: calls.append(given) or grad_of_x(*given))
    for _ in range(2):
        calls.clear()
        loss_of(model).backward()
        assert len(calls) == 2
        without_transformers_hook(enable(model, True)).activation_checkpointing_disable()


# ---- transformers up to 5.20 ------------------------------------------------------------------------------------------


@pytest.fixture
def up_to_5_20(monkeypatch):
    """Checkpoint blocks as transformers does up to 5.20: the hooks of a block run inside its checkpoint."""

    def call(self, *args, **kwargs):
        run = functools.partial(nn.Module.__call__, self, **kwargs)
        on = self.gradient_checkpointing and self.training
        return self._gradient_checkpointing_func(run, *args) if on else run(*args)

    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", call, raising=False)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", LlamaDecoderLayer.forward.__wrapped__)


@reentrants
def test_blocks_whose_hooks_are_inside_the_checkpoint(up_to_5_20, reentrant):
    """The hook is on the embeddings then. The hook of a copy checks the copy's blocks, and detach removes it."""
    model = attached("llama-grouped")
    expected = gradients(model)
    other = without_transformers_hook(enable(copy.deepcopy(model), reentrant))
    assert_same(gradients(other), expected)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    assert_same(gradients(model), expected)
    without_transformers_hook(enable(model, reentrant))
    assert_same(gradients(model), expected)
    assert seen == [False, reentrant]
    s2ft.detach(other)
    assert not other.get_input_embeddings()._forward_hooks
    assert not any(module._forward_pre_hooks for module in other.modules())


# ---- by hand -------------------------------------------------------------------------------------------------


def checkpoint_by_hand(model, reentrant):
    for layer in model.model.layers:

        def forward(x, forward=layer.forward, **more):
            return checkpoint(lambda x: forward(x, **more), x, use_reentrant=reentrant)

        layer.forward = forward
    return model


def test_checkpoints_in_user_code():
    """s2ft can't detect a reentrant checkpoint that user code calls. If no input needs a gradient, PyTorch warns.
    enable_input_require_grads of transformers, or an input that needs a gradient, solves it."""
    expected = gradients(attached("llama-grouped"))
    model = checkpoint_by_hand(attached("llama-grouped"), reentrant=False)
    assert_same(gradients(model), expected)
    model = checkpoint_by_hand(attached("llama-grouped"), reentrant=True)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        loss_of(model)
    model.enable_input_require_grads()
    assert_same(gradients(model), expected)


def test_pytorchs_wrapper_around_attached_blocks():
    """FSDP's checkpointing wraps blocks like this. The wrapper is part of module paths but not of the adapter."""
    plain_model = attached("llama-grouped")
    model = attached("llama-grouped")
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(layer)
    ours = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in gradients(model).items()}
    assert_same(ours, gradients(plain_model))
    ours, theirs = (s2ft.get_adapter(one, "default").deltas for one in (model, plain_model))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(delta.values, theirs[path].values) for path, delta in ours.items())
    s2ft.detach(model)
    assert torch.equal(model(**inputs_of(model)).logits, s2ft.detach(plain_model)(**inputs_of(model)).logits)
