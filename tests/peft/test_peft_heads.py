"""Weights that PEFT trains in full beside the slices: heads, embeddings, single tokens."""

import copy
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from support import models
from support.models import model_of, output_of, token_batch
from support.nets import seeded
from support.states import same
from support.tolerances import LOGITS, relative_difference
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from s2ft.peft import S2FTPeftConfig, to_native

SHAPE = dict(hidden_size=24, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4, vocab_size=61)
CLASSIFIERS = {
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=3, pad_token_id=0)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SHAPE, num_labels=3)),
    "bert-tokens": lambda: BertForTokenClassification(BertConfig(**SHAPE, num_labels=3)),
}
TASKS = {"llama": "SEQ_CLS", "bert": "SEQ_CLS", "bert-tokens": "TOKEN_CLS"}


def classifier(name):
    return seeded(CLASSIFIERS[name]).eval()


fit = partial(models.fit, steps=2, lr=0.02, loss_of=lambda model: output_of(model).square().mean())


def check_round_trip(base, model, folder):
    """Save, load and merge. Returns the merged model."""
    output = output_of(model)
    assert relative_difference(output, output_of(base)) > 1e-3
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    assert torch.equal(output_of(again), output)
    merged = model.merge_and_unload()
    assert same(merged, again.merge_and_unload()) and relative_difference(output_of(merged), output) <= LOGITS
    return merged


@pytest.mark.parametrize("choice", (dict(target_modules="all-linear", ratio=0.5), dict(d_ratio=0.5)), ids=("all", "d"))
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_with_its_head(name, choice, tmp_path):
    """PEFT puts the head into modules_to_save by itself, from the task."""
    base = classifier(name)
    model = fit(get_peft_model(copy.deepcopy(base), S2FTPeftConfig(**choice, task_type=TASKS[name])))
    head = "score" if name == "llama" else "classifier"
    merged = check_round_trip(base, model, tmp_path)
    assert type(getattr(merged, head)) is nn.Linear
    assert not torch.equal(getattr(merged, head).weight, getattr(base, head).weight)


def test_tied_head_stays_tied_where_the_config_says_so(tmp_path):
    base = model_of("qwen2-grouped-tied")
    config = dict(d_ratio=0.2, modules_to_save=["embed_tokens"])
    model = fit(get_peft_model(copy.deepcopy(base), S2FTPeftConfig(**config, ensure_weight_tying=True)))
    merged = check_round_trip(base, model, tmp_path)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert not torch.equal(merged.lm_head.weight, base.lm_head.weight)
    with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True"):
        get_peft_model(copy.deepcopy(base), S2FTPeftConfig(**config))


@pytest.mark.parametrize("case", ("llama", "qwen2-grouped-tied"))
def test_single_tokens_are_trained(case, tmp_path):
    base = model_of(case)
    tokens = token_batch(base)[0, :2].unique().tolist()
    model = fit(get_peft_model(copy.deepcopy(base), S2FTPeftConfig(d_ratio=0.2, trainable_token_indices=tokens)))
    with pytest.raises(ValueError, match="trainable_token_indices"):
        to_native(model)
    model.add_adapter("b", S2FTPeftConfig(d_ratio=0.2))
    with pytest.raises(ValueError, match="trainable_token_indices"):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum")
    model.delete_adapter("b")
    merged = check_round_trip(base, model, tmp_path)
    changed = (merged.model.embed_tokens.weight != base.model.embed_tokens.weight).any(1).nonzero().flatten()
    assert changed.tolist() == tokens
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == ("tied" in case)
