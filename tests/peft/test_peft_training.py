"""S²FT in PEFT with the Trainer and the adapters of transformers, and with TRL by peft_config."""

import copy

import pytest
import torch
from adapter.test_pretrained import trainer
from peft import PeftModel, get_peft_model
from support.states import same
from support.trl_trainers import ROWS, trl_trainer
from train.tiny import tiny_model

from s2ft.peft import S2FTPeftConfig, S2FTPeftLayer

RATIOS = dict(o_ratio=0.5, u_ratio=0.1, d_ratio=0.1)
CONFIG = dict(RATIOS, task_type="CAUSAL_LM")


def deltas_of(model, name="default"):
    return {
        path: module.s2ft_delta[name].values.detach().clone()
        for path, module in model.named_modules()
        if isinstance(module, S2FTPeftLayer) and name in module.s2ft_delta
    }


def moved(deltas):
    return bool(deltas) and all((delta != 0).any() for delta in deltas.values())


# ---- transformers' Trainer -------------------------------------------------------------------------------


def fresh(**config):
    return get_peft_model(tiny_model(), S2FTPeftConfig(**{**CONFIG, **config}))


@pytest.mark.parametrize("reentrant", (True, False))
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(reentrant, tmp_path):
    """With gradient checkpointing, where the uninterrupted one keeps its activations."""
    model, resumed = fresh(), fresh()
    trainer(model, tmp_path / "through").train()
    assert moved(deltas_of(model))
    assert (tmp_path / "through/checkpoint-4/adapter_model.safetensors").exists()
    assert not (tmp_path / "through/checkpoint-4/model.safetensors").exists()
    how = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    trainer(resumed, tmp_path / "resumed", **how).train(resume_from_checkpoint=str(tmp_path / "through/checkpoint-4"))
    assert same(deltas_of(resumed), deltas_of(model)) and same(model.unload(), tiny_model())


def test_resuming_with_other_units_is_refused(tmp_path):
    """The shapes are equal, and Trainer loads the weights without the config."""
    trainer(fresh(), tmp_path).train()
    other = fresh(seed=1)
    with pytest.raises(ValueError, match="have other units than its config"):
        trainer(other, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert not any((delta != 0).any() for delta in deltas_of(other).values())


# ---- adapters of transformers ----------------------------------------------------------------------------


def test_adapters_of_transformers(tmp_path, monkeypatch):
    """transformers 5.24 requires a version of PEFT that is not published yet, for any method."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")
    model, tokens = tiny_model(), torch.randint(3, 259, (2, 9))
    base = tiny_model()(tokens).logits
    model.add_adapter(S2FTPeftConfig(**RATIOS, init_weights=False), "one")
    model.add_adapter(S2FTPeftConfig(**RATIOS, init_weights=False, seed=2), "two")
    model.set_adapter("one")
    one = model.eval()(tokens).logits
    model.save_pretrained(tmp_path / "one")
    model.set_adapter("two")
    assert not torch.equal(one, model(tokens).logits) and not torch.equal(one, base)
    model.disable_adapters()
    assert torch.allclose(model(tokens).logits, base, rtol=1e-5, atol=1e-6)
    model.enable_adapters()
    loaded = tiny_model()
    loaded.load_adapter(str(tmp_path / "one"), "mine")
    assert torch.equal(loaded.eval()(tokens).logits, one) and loaded.active_adapters() == ["mine"]
    assert torch.equal(PeftModel.from_pretrained(tiny_model(), tmp_path / "one").eval()(tokens).logits, one)
    model.delete_adapter("two")
    assert torch.equal(model(tokens).logits, one)


# ---- TRL -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROWS)
def test_trl_with_peft_config(kind, tmp_path):
    """TRL trains only the adapter, saves it, and resumes from it."""
    done, resumed = (
        trl_trainer(kind, tiny_model(), tmp_path, beta=0.1, peft_config=S2FTPeftConfig(**CONFIG)) for _ in range(2)
    )
    assert isinstance(done.model, PeftModel)
    done.train()
    assert moved(deltas_of(done.model))
    last = tmp_path / f"checkpoint-{done.state.global_step}"
    assert (last / "adapter_config.json").exists() and not (last / "model.safetensors").exists()
    resumed.train(resume_from_checkpoint=str(last))
    assert same(deltas_of(resumed.model), deltas_of(done.model)) and same(done.model.unload(), tiny_model())


def test_dpo_on_an_adapter_that_was_trained_before(tmp_path):
    """TRL copies its deltas by name to a second adapter, the reference; otherwise the reference would be the base."""
    fresh(init_weights=False).save_pretrained(tmp_path / "sft")
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "sft", is_trainable=True)
    before = copy.deepcopy(deltas_of(model))
    done = trl_trainer("dpo", model, tmp_path / "dpo")
    assert same(deltas_of(done.model, "ref"), before)
    assert done.model.peft_config["ref"].units == done.model.peft_config["default"].units
    done.train()
    assert not same(deltas_of(done.model), before) and same(deltas_of(done.model, "ref"), before)
