"""Optimizers of all kinds."""

import copy
import warnings

import pytest
import torch
from support.models import model_of, token_batch, train
from support.pairs import in_turn, pairs_mostly_slow
from support.slices import attached, everything, frozen, slices
from support.states import with_adapter

import s2ft

# ---- optimizers ----------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.5),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-1, weight_decay=0.5),
    "muon": lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.5),
}


@pytest.mark.parametrize(
    "which, layout, dtype",
    pairs_mostly_slow(OPTIMIZERS, ("permuted", "indexed"), (torch.float32, torch.bfloat16)),
    ids=str,
)
def test_only_slices_move(which, layout, dtype):
    """The optimizer has all parameters, also frozen ones, and weight decay. The loss falls, the optimizer's state is no
    larger than the slices, and frozen weights stay the same, bit for bit, before and after detach."""
    base = model_of("llama-grouped", dtype)
    model = copy.deepcopy(base)
    model(token_batch(model)).logits.float().square().sum().backward()  # gradients with which AdamW would step
    with_adapter(model, everything("llama-grouped", layout=layout))
    before = frozen(model)
    # Muon takes only matrices
    optimizer = OPTIMIZERS[which]([p for p in model.parameters() if which != "muon" or p.requires_grad])
    losses = train(model, 8, optimizer=optimizer)
    assert losses[-1] < losses[0] and {id(p) for p in optimizer.state} == {id(p) for p in slices(model).values()}
    for p, state in optimizer.state.items():
        assert all(value.numel() <= p.numel() for value in state.values() if isinstance(value, torch.Tensor))
    after = frozen(model)
    assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())
    s2ft.detach(model)
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("which", ("adamw-fused", "sgd", "adafactor"))
def test_an_optimizer_resumes_from_its_state(which):
    """Four steps equal two steps, saving, loading and two more steps, bit for bit."""
    through, first, second = attached("llama-grouped"), attached("llama-grouped"), attached("llama-grouped")
    train(through, 4, optimizer=OPTIMIZERS[which](list(slices(through).values())))
    optimizer = OPTIMIZERS[which](list(slices(first).values()))
    train(first, 2, optimizer=optimizer)
    second.load_state_dict(first.state_dict())
    other = OPTIMIZERS[which](list(slices(second).values()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(second, 2, optimizer=other)
    assert all(torch.equal(p, slices(second)[name]) for name, p in slices(through).items())


# ---- bitsandbytes --------------------------------------------------------------------------------------------

# The moments of slices with 4096 or more values are kept in eight bits, and those of smaller slices in float32.
EIGHT_BITS = ("AdamW8bit", "Adam8bit", "Lion8bit", "PagedAdamW8bit", "PagedLion8bit")
WIDE = ("AdamW32bit", "PagedAdamW32bit", "PagedAdamW")


def wide(layout, dtype=torch.float32):
    """A model whose d slices [256, 32] are above that limit and whose u slices [4, 256] are below."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    return with_adapter(
        AutoModelForCausalLM.from_config(
            LlamaConfig(
                hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=67
            )
        ).to(dtype),
        s2ft.S2FTConfig(u_ratio=4 / 512, d_ratio=32 / 512, layout=layout),
    ).train()


def run_bitsandbytes(which, layout, device, dtype=torch.float32):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = wide(layout, dtype).to(device)
    batch = token_batch(model).to(device)
    before = frozen(model)
    optimizer = getattr(bitsandbytes.optim, which)(slices(model).values(), lr=1e-3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
        losses = train(
            model,
            8,
            loss_of=lambda model: model(input_ids=batch, labels=batch, use_cache=False).loss,
            optimizer=optimizer,
        )
    assert losses[-1] < losses[0] and all(torch.equal(value, before[name]) for name, value in frozen(model).items())
    for name, p in slices(model).items():
        expected = torch.uint8 if which in EIGHT_BITS and p.numel() >= 4096 else torch.float32
        assert optimizer.state[p]["state1"].dtype is expected, name
        assert optimizer.state[p]["state1"].numel() == p.numel() and p.any()
    assert {p.numel() < 4096 for p in slices(model).values()} == {True, False}


@pytest.mark.parametrize("which, layout", in_turn(EIGHT_BITS + WIDE, ("permuted", "indexed")))
def test_bitsandbytes(which, layout):
    """Paged optimizers are plain ones on the CPU, and bitsandbytes warns about it."""
    run_bitsandbytes(which, layout, "cpu")


@pytest.mark.cuda
@pytest.mark.parametrize("layout", ("permuted", "indexed"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("which", EIGHT_BITS + WIDE)
def test_bitsandbytes_on_a_gpu(which, layout, dtype):
    run_bitsandbytes(which, layout, "cuda", dtype)
