"""Train two adapters of one base, switch between them, and use both in one batch.

Run it:

    python examples/many_adapters.py
    python examples/many_adapters.py --model HuggingFaceTB/SmolLM2-135M

It prints the loss of each adapter on its own text, and the continuation of one prompt by the base and by each adapter:
first by switching between them, then in a single batch of an AdapterBank. Both give the same tokens.
"""

import torch
from tiny import load, options, train

import s2ft

TEXTS = {"sea": "the sea is wide and the ships are slow ", "city": "in the city the trains are fast and loud "}


def continuations(model, inputs) -> torch.Tensor:
    """Twelve more tokens for each row, by greedy generation."""
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    return tokens[:, inputs["input_ids"].shape[1] :]


def main() -> None:
    job = options(__doc__).parse_args()
    lr = 3e-2 if job.model is None else 1e-3
    for name, text in TEXTS.items():
        model, tokenizer = load(job.model)
        s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.2, o_ratio=0.5), name)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        before, after = train(model, {"input_ids": ids, "labels": ids}, steps=20, lr=lr)
        print(f"{name}: loss {before:.3f} before, {after:.3f} after")
        s2ft.save_adapter(model, f"adapters/{name}")

    rows = [None, *TEXTS]  # None is the base
    model, tokenizer = load(job.model)
    prompt = tokenizer("the ", return_tensors="pt")
    for name in TEXTS:
        s2ft.load_adapter(model, f"adapters/{name}", active=False)
    one_by_one = []
    for name in rows:
        s2ft.set_adapter(model, name)  # in place, in milliseconds
        one_by_one.append(continuations(model, prompt))
        print(f"{name or 'base'}: {tokenizer.decode(one_by_one[-1][0])!r}")

    model, _ = load(job.model)
    bank = s2ft.AdapterBank(model, "adapters")  # every folder in it
    with bank.batch(rows):  # one adapter for each row of the batch
        mixed = continuations(model, {key: value.repeat(len(rows), 1) for key, value in prompt.items()})
    print(f"one batch gives the same tokens: {torch.equal(mixed, torch.cat(one_by_one))}")


if __name__ == "__main__":
    main()
