"""The chunked loss equals the model's own loss, or a message names the reason why it is not used."""

from functools import partial

import pytest
import torch
from support.inside import (
    CHUNK,
    IGNORED,
    ChunkedLoss,
    chunk_of,
    chunked_loss,
    loss_in_chunks,
    sum_of_losses,
    why_not_chunked,
)
from support.models import CASES, inputs_of, model_of
from support.pairs import in_turn
from support.states import with_adapter
from support.tolerances import GEMM
from torch import nn
from train.tiny import tiny_model

import s2ft

# These cases have another loss than that of a causal language model, or change their logits.
NOT = {
    "gemma2": "changes its logits by more than a scale",
    "gemma2-grouped": "changes its logits by more than a scale",
    "bert": "does not use the standard loss",
    "roberta": "does not use the standard loss",
}


def batch_of(model):
    labels = inputs_of(model)["input_ids"].clone()
    labels[:, :4] = -100
    return {**inputs_of(model), "labels": labels}


def gradients(model, batch, **options):
    loss = model(**batch, **options).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize(
    "case, dtype",
    in_turn(
        [case for case in CASES if not case.startswith(("vit", "clip", "t5", "whisper"))],
        (torch.float32, torch.bfloat16),
    ),
    ids=str,
)
def test_loss_and_gradients_equal_the_models_own_or_it_is_refused(case, dtype):
    model = model_of(case, dtype)
    batch = batch_of(model)
    assert NOT.get(case, "") in why_not_chunked(model, batch) and bool(why_not_chunked(model, batch)) == (case in NOT)
    if case in NOT or "moe" in case and dtype != torch.float32:  # a rounding error can send a token to another expert
        return
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.2))
    model.train()
    for options in ({}, {"num_items_in_batch": torch.tensor(7)}):
        expected, theirs = gradients(model, batch, **options)
        with chunked_loss(model):
            loss, ours = gradients(model, batch, **options)
        rtol, _ = GEMM[dtype]
        torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=rtol, atol=rtol)
        assert ours.keys() == theirs.keys() and ours
        for name, gradient in ours.items():
            torch.testing.assert_close(
                gradient, theirs[name], rtol=10 * rtol, atol=rtol * float(theirs[name].abs().max())
            )


def test_logits_that_the_model_computes_in_float32():
    model = model_of("llama", torch.bfloat16)
    batch = batch_of(model)
    expected = model(**batch).loss
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.float())
    assert why_not_chunked(model, batch) == ""
    torch.testing.assert_close(loss_in_chunks(model.train(), batch), expected, rtol=1e-2, atol=0, check_dtype=False)


@pytest.mark.parametrize("wrap", [nn.Module.train, partial(torch.compile, backend="eager")], ids=["plain", "compiled"])
def test_several_chunks_equal_one(monkeypatch, wrap):
    """Several chunks, of which the last is shorter, give the loss of one chunk."""
    model, ids = wrap(tiny_model()), torch.randint(3, 200, (3, 11))
    expected = model(input_ids=ids, labels=ids).loss
    monkeypatch.setitem(CHUNK, "cpu", 7 * model.config.vocab_size)  # 30 tokens in chunks of 7
    with chunked_loss(model.train()):
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "vocabulary, width, rows",
    ((128256, 4096, 512), (151936, 3584, 256), (49152, 576, 1280), (32000, 4096, 2048), (300_000, 1024, 223)),
)
def test_torch_does_not_split_a_chunk_on_a_gpu(vocabulary, width, rows, dtype):
    """Without our chunk size, torch takes 16 rows of 512 and reads the weight 32 times as often."""
    piece, options = chunk_of("cuda", vocabulary)
    chosen = options._adjust(
        num_batches=piece, in_features=width, num_classes=vocabulary, dtype=dtype, device=torch.device("cuda")
    )
    assert piece == chosen.batch_chunk_size == rows and chosen.acc_policy == "compact"
    assert options.acc_policy == "auto"  # torch then forms sums of half-precision numbers in float32


def test_the_host_does_not_wait_for_a_gpu():
    """A tensor on "meta" has no values, so an operator whose output shape depends on values raises an error."""
    model = tiny_model().to("meta")
    fused = ChunkedLoss(model)
    hidden = torch.empty(2, 9, model.config.hidden_size, device="meta")
    labels = torch.empty(2, 9, dtype=torch.int64, device="meta")
    for items in (None, torch.empty((), dtype=torch.int64, device="meta")):
        fused.enabled = True
        assert fused.loss(hidden, labels, model.config.vocab_size, items).shape == ()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_rows_without_a_label_may_be_kept_or_removed(dtype):
    """On a GPU they are kept. Loss and gradients are those of the rows that have a label."""
    hidden = torch.randn(30, 16).to(dtype).requires_grad_()
    weight, targets = torch.randn(50, 16).to(dtype), torch.randint(0, 50, (30,))
    targets[::3] = IGNORED
    stay = sum_of_losses(hidden, weight, None, targets)
    (ours,) = torch.autograd.grad(stay, hidden)
    go = sum_of_losses(hidden[targets != IGNORED], weight, None, targets[targets != IGNORED])
    (theirs,) = torch.autograd.grad(go, hidden)
    rtol, atol = GEMM[dtype]
    torch.testing.assert_close(stay, go, rtol=rtol, atol=atol)
    torch.testing.assert_close(
        ours, theirs, rtol=3 * rtol, atol=3 * atol
    )  # the logits, their gradient and that of hidden are rounded
    assert not ours[::3].any()


def test_evaluation_and_a_forward_without_labels_have_the_models_own_loss_and_logits():
    model, ids = tiny_model(), torch.randint(3, 200, (2, 9))
    expected = model(input_ids=ids, labels=ids)
    with chunked_loss(model):
        found = model(input_ids=ids, labels=ids)
        model.train()(input_ids=ids, labels=ids)
        assert torch.equal(model(ids).logits, expected.logits)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.logits, expected.logits)


def test_the_logits_are_not_kept(monkeypatch):
    monkeypatch.setitem(CHUNK, "cpu", 2**16)
    model = with_adapter(tiny_model(vocab_size=5000), s2ft.S2FTConfig(d_ratio=0.1)).train()
    ids = torch.randint(3, 200, (4, 64))

    def largest():
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.numel()) or t, lambda t: t):
            model(input_ids=ids, labels=ids).loss.backward()
        return max(seen)

    assert largest() >= 4 * 64 * 5000
    with chunked_loss(model):
        assert largest() < 4 * 64 * 5000 / 2


def test_the_model_is_restored_after_an_error():
    model = tiny_model()
    own = model.loss_function = lambda logits, labels, **_: logits.sum()
    with pytest.raises(RuntimeError), chunked_loss(model):
        raise RuntimeError
    assert model.loss_function is own and not model._forward_pre_hooks and "forward" not in model.lm_head.__dict__
    assert why_not_chunked(model, {}) == "the model does not use the standard loss of causal language models"


def test_the_reason_names_an_old_torch_or_a_changed_head(monkeypatch):
    model = tiny_model()
    model.lm_head.forward = lambda x: x
    assert why_not_chunked(model, {}) == "the output layer is a Linear whose forward was replaced"
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy")
    assert "has no linear_cross_entropy" in why_not_chunked(tiny_model(), {})
