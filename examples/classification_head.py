"""Train a new classification head in full, together with slices of the base model.

Run it:

    python examples/classification_head.py
    python examples/classification_head.py --model HuggingFaceTB/SmolLM2-135M

`modules_to_save` names the head: it is trained in full and saved in the adapter. It prints what is trained, the loss
before and after, and that the reloaded adapter gives the same logits within rounding.
"""

import torch
from tiny import load, options, train
from transformers import AutoModelForSequenceClassification

import s2ft

TEXTS = ["a good film", "a fine film", "a bad film", "a poor film"]
LABELS = torch.tensor([1, 1, 0, 0])


def classifier(name: str | None):
    """A model with a new head of two classes, and its tokenizer."""
    torch.manual_seed(0)
    base, tokenizer = load(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base.config.num_labels = 2
    model = AutoModelForSequenceClassification.from_config(base.config).to(base.dtype)
    model.model.load_state_dict(base.model.state_dict())
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def main() -> None:
    job = options(__doc__).parse_args()
    model, tokenizer = classifier(job.model)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)

    print(s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1, modules_to_save=["score"])))
    before, after = train(model, {**inputs, "labels": LABELS}, lr=1e-2 if job.model is None else 1e-3)
    print(f"loss: {before:.3f} before, {after:.3f} after")
    s2ft.save_adapter(model, "film-adapter")

    fresh, _ = classifier(job.model)
    s2ft.load_adapter(fresh, "film-adapter")  # its head replaces the new one
    with torch.no_grad():
        logits, again = model(**inputs).logits, fresh(**inputs).logits
    print(f"classes: {again.argmax(-1).tolist()}, the same after reloading: {torch.allclose(logits, again, atol=1e-4)}")


if __name__ == "__main__":
    main()
