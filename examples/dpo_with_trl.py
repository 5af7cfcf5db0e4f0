"""Train on preferences with TRL's DPOTrainer.

Run it:

    python examples/dpo_with_trl.py
    python examples/dpo_with_trl.py --model HuggingFaceTB/SmolLM2-135M-Instruct

TRL's trainers accept an attached model without changes. DPO compares it with a reference model. `Reference` is the
model itself without its adapter, so that one model is in memory. Without it, TRL would load the base a second time.
The command `s2ft dpo` does the same without Python.

It prints what is trained, the loss, and the share of pairs in which training favours the chosen answer.
"""

from datasets import Dataset
from tiny import load, options
from trl import DPOConfig, DPOTrainer

import s2ft
from s2ft.train.trainers import Reference

PAIRS = [{"prompt": f"{a} + 1 = ", "chosen": f"{a + 1}", "rejected": "no idea"} for a in range(16)]


def main() -> None:
    job = options(__doc__).parse_args()
    model, tokenizer = load(job.model)
    print(s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1, o_ratio=0.25)))
    arguments = DPOConfig(
        output_dir="dpo-run",
        max_steps=10,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        learning_rate=1e-2 if job.model is None else 1e-3,
        max_length=64,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        bf16=False,
        disable_tqdm=True,
    )
    pairs = Dataset.from_list(PAIRS)
    trainer = DPOTrainer(
        model, Reference(model), arguments, train_dataset=pairs, eval_dataset=pairs, processing_class=tokenizer
    )
    trainer.train()
    after = trainer.evaluate()
    print(f"loss: 0.693 before, {after['eval_loss']:.3f} after")  # log 2: both models are the same at the start
    print(f"pairs in which the chosen answer gains: {100 * after['eval_rewards/accuracies']:.0f} %")
    s2ft.save_adapter(model, "dpo-adapter")


if __name__ == "__main__":
    main()
