"""Fine-tune an embedding model with sentence-transformers, on pairs of a question and its answer.

Run it:

    python examples/embeddings.py
    python examples/embeddings.py --model sentence-transformers/all-MiniLM-L6-v2

It needs the package sentence-transformers. It prints what is trained, how many questions find their own answer before
and after, and that the saved adapter and the merged model give the same similarities.
"""

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tiny import options, tiny_tokenizer
from transformers import BertConfig, BertModel, set_seed

import s2ft
from s2ft.train.trainer import AdapterCheckpoints

PAIRS = {
    "how do I return a shoe": "send it back within thirty days",
    "where is my parcel": "follow the link in the mail",
    "can I pay by card": "we take every card",
    "do you ship abroad": "yes, to all of europe",
    "is there a shop nearby": "see the map of our stores",
    "how do I reset my password": "click forgot password",
    "what does shipping cost": "five euro for each order",
    "do you repair watches": "our workshop does",
}


class Trainer(AdapterCheckpoints, SentenceTransformerTrainer):
    """Its checkpoints contain the adapter, and training can resume from them."""


def embedding_model(name: str | None) -> SentenceTransformer:
    """The named model, or a tiny BERT with random weights."""
    if name is None:
        name = "tiny-encoder"
        set_seed(0)
        tokenizer = tiny_tokenizer()
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(vocab_size=len(tokenizer), pad_token_id=0, initializer_range=0.2, **sizes, **dropouts)
        BertModel(config).save_pretrained(name)
        tokenizer.save_pretrained(name)
    return SentenceTransformer(name, device="cpu")


def similarities(model: SentenceTransformer) -> torch.Tensor:
    """The similarity of each question and each answer."""
    return model.similarity(*(model.encode(list(texts), convert_to_tensor=True) for texts in zip(*PAIRS.items())))


def found(model: SentenceTransformer) -> str:
    """How many questions are most similar to their own answer."""
    right = similarities(model).argmax(1) == torch.arange(len(PAIRS))
    return f"{int(right.sum())} of {len(PAIRS)}"


def main() -> None:
    job = options(__doc__).parse_args()
    model = embedding_model(job.model)
    before = found(model)

    print(s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1, o_ratio=0.25)))
    arguments = SentenceTransformerTrainingArguments(
        "embeddings-run", num_train_epochs=30, per_device_train_batch_size=len(PAIRS), report_to=[], use_cpu=True,
        learning_rate=1e-2 if job.model is None else 1e-3, save_strategy="no", disable_tqdm=True)  # fmt: skip
    rows = Dataset.from_dict({"question": list(PAIRS), "answer": list(PAIRS.values())})
    Trainer(model=model, args=arguments, train_dataset=rows, loss=MultipleNegativesRankingLoss(model)).train()
    print(f"questions that find their answer: {before} before, {found(model)} after")

    s2ft.save_adapter(model, "answers-adapter")
    trained = similarities(model.eval())
    s2ft.merge(model)
    model.save_pretrained("answers-merged")

    fresh = embedding_model(job.model)
    s2ft.load_adapter(fresh, "answers-adapter")
    for name, again in (("adapter", fresh), ("merged model", SentenceTransformer("answers-merged", device="cpu"))):
        print(f"{name}: the same similarities: {torch.allclose(similarities(again), trained, atol=1e-5)}")


if __name__ == "__main__":
    main()
