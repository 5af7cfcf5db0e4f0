"""Tiny runs of TRL's trainers: SFT, DPO and GRPO."""

from train.tiny import tiny_tokenizer


def rewards(completions, **_):
    return [float(len(set(text))) for text in completions]


ROWS = {
    "sft": [{"prompt": f"{a}+1=", "completion": f" {a + 1}"} for a in range(8)],
    "dpo": [{"prompt": f"{a}+1=", "chosen": f" {a + 1}", "rejected": " no"} for a in range(8)],
    "grpo": [{"prompt": f"{a}+1="} for a in range(8)],
}


def trl_trainer(kind, model, folder, beta=0.0, **more):
    """A trainer of a kind in ROWS, and GRPO's weight of its reference. `more` are other arguments of the trainer."""
    import trl
    from datasets import Dataset  # TRL installs it

    tokenizer, settings = tiny_tokenizer(), dict(per_device_train_batch_size=2, max_steps=4, save_steps=2)
    tokenizer.pad_token = "<|endoftext|>"
    if kind == "grpo":
        settings.update(per_device_train_batch_size=4, max_steps=2, save_steps=1)
        settings.update(num_generations=4, max_completion_length=6, beta=beta)
        more["reward_funcs"] = rewards
    else:
        settings["max_length"] = 64
    settings.update(output_dir=str(folder), learning_rate=1e-2, report_to="none", use_cpu=True, bf16=False)
    return getattr(trl, f"{kind.upper()}Trainer")(
        model=model,
        args=getattr(trl, f"{kind.upper()}Config")(**settings, disable_tqdm=True),
        train_dataset=Dataset.from_list(ROWS[kind]),
        processing_class=tokenizer,
        **more,
    )
