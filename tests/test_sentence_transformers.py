"""Embedding models of sentence-transformers: trained, resumed, saved, loaded and merged through their own classes."""

import pytest
import torch
from datasets import Dataset
from support.encoders import save_encoder
from support.inside import record_of
from support.tolerances import LOGITS, relative_difference

import s2ft

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is not installed: pip install sentence-transformers"
)

from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding, Transformer
from support.inside import AdapterCheckpoints
from support.states import with_adapter, with_loaded

TEXTS = ["where is my parcel", "can I pay by card", "yes", "follow the link in the mail"]
CONFIG = s2ft.S2FTConfig(d_ratio=0.1, o_ratio=0.25)


class Trainer(AdapterCheckpoints, SentenceTransformerTrainer):
    """Its checkpoints hold the adapter only."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_encoder(tmp_path_factory.mktemp("encoder")))


def encoder(folder):
    return SentenceTransformer(folder, device="cpu")


def embeddings(model):
    return model.encode(TEXTS, convert_to_tensor=True)


def trainer(model, output, **options):
    rows = Dataset.from_dict({"anchor": TEXTS * 2, "positive": TEXTS[::-1] * 2})
    arguments = SentenceTransformerTrainingArguments(
        str(output), learning_rate=1e-2, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        lr_scheduler_type="constant", **options,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows, loss=MultipleNegativesRankingLoss(model))


def trained(folder, output, steps=2, **options):
    model = with_adapter(encoder(folder), CONFIG)
    trainer(model, output, max_steps=steps, save_steps=2, **options).train()
    return model


def test_an_adapter_and_a_merged_model_give_the_trained_embeddings_again(folder, tmp_path):
    before = embeddings(encoder(folder))
    model = trained(folder, tmp_path / "run")
    after = embeddings(model)
    assert relative_difference(after, before) > 100 * LOGITS
    s2ft.save_adapter(model, tmp_path / "adapter")
    s2ft.merge(model)
    merged = embeddings(model)
    assert relative_difference(merged, after) <= LOGITS

    model.save_pretrained(str(tmp_path / "merged"))
    assert torch.equal(embeddings(encoder(str(tmp_path / "merged"))), merged)
    fresh = with_loaded(encoder(folder), tmp_path / "adapter")
    assert torch.equal(embeddings(fresh), merged) and torch.equal(embeddings(s2ft.detach(fresh) and fresh), before)


def test_a_resumed_run_ends_with_the_same_slices(folder, tmp_path):
    whole = trained(folder, tmp_path / "whole", steps=4)
    trained(folder, tmp_path / "run")
    again = with_adapter(encoder(folder), CONFIG)
    trainer(again, tmp_path / "run", max_steps=4, save_steps=2).train(resume_from_checkpoint=True)
    expected, found = (record_of(model.transformers_model).slices for model in (whole, again))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_cross_encoder_is_attached(folder):
    model = CrossEncoder(folder, num_labels=1, device="cpu")
    pairs = list(zip(TEXTS, TEXTS[::-1]))
    before = torch.tensor(model.predict(pairs))
    s2ft.attach(model, CONFIG)
    assert relative_difference(torch.tensor(model.predict(pairs)), before) <= LOGITS


def test_a_trainable_layer_outside_is_refused_until_it_is_frozen(folder, tmp_path):
    model = encoder(folder)
    model.append(Dense(64, 16))
    for one in (model, torch.compile(model)):
        with pytest.raises(
            ValueError, match=r"would also train 2\.linear\.weight.*model\[2\]\.requires_grad_\(False\)"
        ):
            s2ft.attach(one, CONFIG)
        with pytest.raises(ValueError, match=r"would also train 2\.linear\.weight"):
            s2ft.load_adapter(one, s2ft.get_adapter(with_adapter(encoder(folder), CONFIG), "default"), trainable=True)
    assert all(parameter.requires_grad for parameter in model.parameters())  # nothing has changed
    model[2].requires_grad_(False)
    s2ft.attach(model, CONFIG)
    model[2].requires_grad_(True)
    with pytest.raises(ValueError, match="would also train"):
        trainer(model, tmp_path)


def test_a_model_without_one_transformers_model_is_refused(folder):
    tokenizer = Transformer(folder).tokenizer.backend_tokenizer
    static = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    with pytest.raises(ValueError, match=r"one model of transformers inside, and it has none \(modules: Static"):
        s2ft.attach(static, CONFIG)
    two = SentenceTransformer(modules=[Transformer(folder), Transformer(folder)], device="cpu")
    with pytest.raises(ValueError, match=r"it has 2, at 0\.model, 1\.model: pass one"):
        s2ft.attach(two, CONFIG)
