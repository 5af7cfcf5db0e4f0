"""Fine-tune a chat model on your own rows, save the adapter, and load it again.

Run it:

    python examples/finetune_own_data.py
    python examples/finetune_own_data.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data rows.jsonl

Each line of --data is a JSON object with "prompt" and "completion". Without --data, made-up sums are used. The trainer
is TRL's SFTTrainer; the command `s2ft sft` does the same without Python.

It prints what is trained, the loss of the base model and the loss with the adapter, and an answer.
"""

import json
from pathlib import Path

import torch
from datasets import Dataset
from tiny import load, options
from trl import SFTConfig, SFTTrainer

import s2ft

SUMS = [{"prompt": f"What is {a} + {b}?", "completion": f"It is {a + b}."} for a in range(8) for b in range(8)]


def as_chats(rows: list[dict]) -> Dataset:
    """Convert rows to conversations, to which TRL applies the chat template of the model."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
            }
            for row in rows
        ]
    )


def answer(model, tokenizer, question: str) -> str:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", help="a file of JSON lines with prompt and completion")
    parser.add_argument("--output", default="my-adapter", help="folder of the adapter")
    parser.add_argument("--steps", type=int, default=20)
    job = parser.parse_args()
    rows = [json.loads(line) for line in Path(job.data).open()] if job.data else SUMS

    model, tokenizer = load(job.model)
    print(s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1, o_ratio=0.25)))  # the paper uses d_ratio=0.03
    arguments = SFTConfig(
        output_dir=f"{job.output}-run",
        max_steps=job.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2 if job.model is None else 1e-3,
        logging_steps=job.steps,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        completion_only_loss=True,
        bf16=False,
        disable_tqdm=True,
    )
    chats = as_chats(rows)
    trainer = SFTTrainer(model, arguments, train_dataset=chats, eval_dataset=chats, processing_class=tokenizer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"loss: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after {job.steps} steps")
    s2ft.save_adapter(model, job.output)

    fresh, _ = load(job.model)  # as a later program does
    s2ft.load_adapter(fresh, job.output)
    print(f"{rows[0]['prompt']} -> {answer(fresh, tokenizer, rows[0]['prompt'])!r}")


if __name__ == "__main__":
    main()
