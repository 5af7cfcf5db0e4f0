"""Extra weights, trained in full beside the slices, are saved, resumed, switched, merged and removed."""

import json

import pytest
import torch
from adapter.test_pretrained import trainer
from support.inside import INDEX, S2FTTrainer
from support.models import fit, model_of
from support.nets import seeded
from support.states import same, with_adapter
from transformers import BertConfig, BertForSequenceClassification, BertModel, Trainer, TrainerCallback

import s2ft
from s2ft import S2FTConfig

HEAD = ("classifier.weight", "classifier.bias")
BERT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=100,
    num_labels=3,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
IDS = torch.randint(3, 100, (4, 6), generator=torch.Generator().manual_seed(0))
ROWS = [
    {"input_ids": torch.tensor([i, 2, 3, 4]), "attention_mask": torch.ones(4, dtype=torch.int64), "labels": i % 3}
    for i in range(16)
]


def classifier():
    return seeded(BertForSequenceClassification, BertConfig(**BERT))


def attached(how="named", layout="permuted", name="default"):
    """A classifier with an adapter. `how`: the head is named in the config, or unfrozen by hand after attach."""
    model = with_adapter(
        classifier(),
        S2FTConfig(d_ratio=0.1, layout=layout, modules_to_save=["classifier"] if how == "named" else None),
        name=name,
    )
    if how == "by hand":
        model.classifier.requires_grad_(True)
    return model


def train(model, steps=2):
    return fit(model, steps, loss_of=lambda model: model(input_ids=IDS, labels=torch.tensor([0, 1, 2, 0])).loss)


def head_of(model):
    return {name: model.get_parameter(name).detach().clone() for name in HEAD}


BASE = classifier()
BOTH = pytest.mark.parametrize("how", ("named", "by hand"))


# ---- the base and back -------------------------------------------------------------------------------------


def test_a_weight_is_unfrozen_in_the_middle_of_training():
    model = train(attached())
    model.bert.embeddings.LayerNorm.requires_grad_(True)
    train(model.eval())  # without dropout
    found = s2ft.get_adapter(model, "default").extra_weights
    assert set(found) == {*HEAD, "bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"}
    model.bert.embeddings.LayerNorm.requires_grad_(False)  # it is trained nevertheless
    assert same(s2ft.get_adapter(model, "default").extra_weights, found) and same(s2ft.detach(model), BASE)


def test_a_weight_of_an_adapter_below_is_not_unfrozen_by_hand():
    model = train(attached())
    s2ft.freeze_adapter(model)
    s2ft.attach(model, S2FTConfig(d_ratio=0.2), "b", on_top=True)
    head = model.classifier.weight.clone()
    model.load_state_dict(model.state_dict())
    assert torch.equal(model.state_dict()["classifier.weight"], BASE.classifier.weight)  # as those of couplings are
    assert torch.equal(model.classifier.weight, head)  # the adapter below stays active
    model.classifier.requires_grad_(True)
    with pytest.raises(ValueError, match="both have classifier.weight trained in full"):
        train(model)
    assert same(s2ft.detach(model), BASE)


def test_a_state_has_the_trained_weight_while_another_adapter_is_in_its_place():
    model = train(attached())
    s2ft.load_adapter(model, s2ft.get_adapter(model, "default"), "other", active=False)
    trained = head_of(train(model))
    s2ft.set_adapter(model, "other")
    model.load_state_dict(model.state_dict())
    s2ft.set_adapter(model, "default")
    assert same(head_of(model), trained)


def test_a_weight_that_was_unfrozen_by_hand_is_kept_where_a_module_inside_is_called():
    model = attached()
    model.bert.embeddings.LayerNorm.requires_grad_(True)
    fit(model, 1, loss_of=lambda model: model.bert(IDS).last_hidden_state.square().mean())
    assert not torch.equal(model.bert.embeddings.LayerNorm.weight, BASE.bert.embeddings.LayerNorm.weight)
    assert same(s2ft.detach(model), BASE)


# ---- Trainer -----------------------------------------------------------------------------------------------


class Look(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **_):
        self.head, self.step = head_of(model), state.global_step


OPTIONS = dict(rows=ROWS, save_steps=2, learning_rate=0.1, lr_scheduler_type="constant")


@BOTH
@pytest.mark.parametrize("kind", (Trainer, S2FTTrainer))
def test_trainers_save_and_resume_them_exactly(kind, how, tmp_path, caplog):
    whole, first, second = (attached(how) for _ in range(3))
    trainer(whole, tmp_path / "whole", kind=kind, max_steps=4, **OPTIONS).train()
    trainer(first, tmp_path / "cut", kind=kind, max_steps=2, **OPTIONS).train()
    assert set(HEAD) <= json.loads((tmp_path / "cut/checkpoint-2" / INDEX).read_text())["weight_map"].keys()
    look = Look()
    trainer(second, tmp_path / "cut", kind=kind, callbacks=[look], max_steps=4, **OPTIONS).train(
        resume_from_checkpoint=str(tmp_path / "cut/checkpoint-2")
    )
    assert look.step == 2 and same(look.head, head_of(first)) and same(second, whole)
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text
    assert same(s2ft.detach(second), BASE)


@BOTH
def test_the_state_of_accelerate_contains_them(how, tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = train(attached(how))
    accelerator.prepare(model)
    accelerator.save_state(tmp_path)
    accelerator.free_memory()
    other = attached(how)
    accelerator.prepare(other)
    accelerator.load_state(tmp_path)
    assert same(other, model)
    assert same(s2ft.detach(train(other, 1)), BASE)  # loaded before the first training forward


# ---- several adapters --------------------------------------------------------------------------------------


def test_arithmetic_keeps_extra_weights_or_refuses():
    with_head = s2ft.get_adapter(train(attached()), "default")
    without = s2ft.get_adapter(train(attached("frozen", name="plain")), "plain")
    for total in (with_head + without, without + with_head, with_head - without):
        assert same(total.extra_weights, with_head.extra_weights)
        s2ft.load_adapter(model := classifier(), total)
        assert same(head_of(model), with_head.extra_weights) and same(s2ft.detach(model), BASE)
        assert total.config.modules_to_save == ["classifier"]
    for wrong in (lambda: with_head + with_head, lambda: 0.5 * with_head, lambda: without - with_head):
        with pytest.raises(ValueError, match="classifier.weight trained in full"):
            wrong()
    assert (0.5 * without).extra_weights == {}


# ---- modules_to_save, and weights that must stay frozen ----------------------------------------------------


def test_a_tied_head_is_trained_under_the_embeddings_name(tmp_path):
    model = with_adapter(model_of("qwen2-grouped-tied"), S2FTConfig(d_ratio=0.1, modules_to_save=["lm_head"]))
    found = s2ft.get_adapter(model, "default").extra_weights
    assert list(found) == ["model.embed_tokens.weight"] and model.lm_head.weight.requires_grad


@pytest.mark.parametrize("path", ("output.dense.weight", "output.dense.bias", "attention.self.query.weight"))
def test_an_unfrozen_weight_of_a_coupling_is_an_error_at_the_next_training_forward(path):
    model = attached("frozen")
    parameter = model.get_parameter(f"bert.encoder.layer.0.{path}").requires_grad_(True)
    with torch.no_grad():
        model(input_ids=IDS)
    with pytest.raises(RuntimeError, match=f"{path} requires a gradient.*train more units"):
        model.train()(input_ids=IDS)
    parameter.requires_grad_(False)
    model(input_ids=IDS)


# ---- the report --------------------------------------------------------------------------------------------


def test_the_report_lists_them_and_counts_them_once():
    model = classifier()
    config = S2FTConfig(d_ratio=0.1, modules_to_save=["classifier"])
    planned, report = s2ft.plan(model, config), s2ft.attach(model, config)
    assert planned.extra_weights == report.extra_weights == {"classifier.weight": 96, "classifier.bias": 3}
    assert report.trainable == planned.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_report_of_a_loaded_adapter_lists_them_too():
    model = attached("named")
    adapter, report = s2ft.get_adapter(model, "default"), s2ft.status(model)
    found = s2ft.load_adapter(s2ft.detach(model), adapter)
    assert found.extra_weights.keys() == adapter.extra_weights.keys()
    assert found.trainable == report.parameters["default"]


def test_a_head_that_was_resized_since_is_named_and_bfloat16_is_told(caplog):
    model = with_adapter(model_of("llama", torch.bfloat16), S2FTConfig(d_ratio=0.1, modules_to_save=["lm_head"]))
    assert "lm_head.weight is trained in full in torch.bfloat16" in caplog.text
    model.resize_token_embeddings(model.config.vocab_size + 4)
    with pytest.raises(ValueError, match="lm_head.weight has another shape .* before resize_token_embeddings"):
        s2ft.set_adapter(model, None)


def test_new_heads_are_named_with_the_option_that_trains_them(tmp_path):
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    report = s2ft.attach(model, S2FTConfig(d_ratio=0.1))
    assert report.fresh_heads == ("classifier",) and "modules_to_save=['classifier']" in str(report)
    s2ft.detach(model)
    assert s2ft.attach(model, S2FTConfig(d_ratio=0.1, modules_to_save=["classifier"])).fresh_heads == ()
    s2ft.merge(model).save_pretrained(tmp_path)
    assert (
        s2ft.attach(BertForSequenceClassification.from_pretrained(tmp_path), S2FTConfig(d_ratio=0.1)).fresh_heads == ()
    )  # the checkpoint contains the head
