"""DPO: the reference is the model without its adapter, one model is in memory, and a resumed run is exact."""

import pytest
import torch
from datasets import Dataset
from support.inside import (
    DPOArguments,
    Reference,
    RunFolder,
    RunOptions,
    dpo,
    encode_pairs,
    pair,
    prompt_format,
    read_log,
    refuse_sharding,
)
from support.states import randomize, same, tensors_of, with_adapter
from train.tiny import tiny_model, tiny_tokenizer

import s2ft

ROWS = [{"question": f"{a}+1=", "chosen": f"{a + 1}", "rejected": "no idea"} for a in range(12)]
# No layer is permuted and no kernel replaces the FFN's, so that every sum has the order of the untouched base.


def arguments(path, **changes):
    more = dict(per_device_train_batch_size=4, learning_rate=1e-2, warmup_steps=0, save_steps=2, max_steps=4, seed=3)
    return DPOArguments(output_dir=str(path), **{**more, **changes})


def run(path, config=s2ft.S2FTConfig(d_ratio=0.1, o_ratio=0.25), resume=False, options=RunOptions(), **changes):
    """Train the tiny model. Returns the model and the folder."""
    model, tokenizer, folder = with_adapter(tiny_model(), config), tiny_tokenizer(), RunFolder(path)
    folder.begin({}, resume)
    found = Dataset.from_list([{**pair(row, {}), "tools": None, "place": "row"} for row in ROWS])
    rows = encode_pairs(found, tokenizer, prompt_format(tokenizer), max_length=100).dataset
    dpo(model, tokenizer, rows, arguments(path, **changes), folder, resume=resume, options=options, held_out=None)
    return model, folder


def losses(folder):
    return [(line["step"], line["loss"], line["rewards/margins"]) for line in read_log(folder.log) if "loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("dpo") / "whole", save_steps=0)


def test_the_loss_begins_at_log_2_and_the_chosen_answers_gain(whole):
    first, *_, last = losses(whole[1])
    assert first[1] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6) and first[2] == 0
    assert last[1] < first[1] and last[2] > 0 and s2ft.read_adapter(whole[1].adapter).parameters > 0


# ---- the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [None, ["norm"]], ids=["slices", "extra weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_reference_equals_the_untouched_base_bit_for_bit(dtype, extra):
    base, model = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
    randomize(
        with_adapter(
            model,
            s2ft.S2FTConfig(
                d_ratio=0.1, u_ratio=0.1, v_ratio=0.5, modules_to_save=extra, layout="indexed", ffn_kernel=False
            ),
        )
    )
    ids = torch.arange(60).view(3, 20)
    assert not torch.equal(model(ids).logits, base(ids).logits)
    assert torch.equal(Reference(model)(input_ids=ids).logits, base(ids).logits)


def test_the_state_of_the_reference_has_the_adapters_below():
    """TRL finds its cache of reference log-probabilities by the hash of the state."""
    model = randomize(with_adapter(tiny_model(), s2ft.S2FTConfig(d_ratio=0.1)))
    s2ft.freeze_adapter(model)
    weight = model.model.layers[0].mlp.down_proj.weight.clone()
    s2ft.attach(model, s2ft.S2FTConfig(v_ratio=0.5), "second", on_top=True)
    found = Reference(model).state_dict()["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(found, weight) and not torch.equal(found, tiny_model().model.layers[0].mlp.down_proj.weight)


@pytest.mark.parametrize("extra", [None, ["norm", "embed_tokens"]], ids=["slices", "extra weights"])
def test_the_reference_may_run_between_forward_and_backward(extra):
    """It must not write into weights that the backward pass needs."""
    model = randomize(
        with_adapter(tiny_model().train(), s2ft.S2FTConfig(d_ratio=0.1, o_ratio=0.25, modules_to_save=extra))
    )
    ids, found = torch.arange(60).view(3, 20), []
    for runs in (False, True):
        loss = model(ids, labels=ids).loss
        if runs:
            Reference(model)(input_ids=ids)
        loss.backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        model.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*found))
    assert model.training and s2ft.status(model).active == {"default": 1.0}


# ---- runs ----------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, whole):
    run(tmp_path, options=RunOptions(stop_after=2))
    _, folder = run(tmp_path, resume=True)
    assert losses(folder) == losses(whole[1]) and same(tensors_of(folder.adapter), tensors_of(whole[1].adapter))


@pytest.mark.parametrize("name", ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))
def test_a_model_that_accelerate_would_shard_is_refused(name, tmp_path, monkeypatch):
    """accelerate launch says so by the environment alone."""
    given = arguments(tmp_path)
    refuse_sharding(given, "s2ft dpo")
    monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match="s2ft dpo does not shard"):
        refuse_sharding(given, "s2ft dpo")
