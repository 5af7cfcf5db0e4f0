"""Export an adapter for other programs: as a LoRA for PEFT and vLLM, and merged into a plain checkpoint.

Run it:

    python examples/export_and_reload.py
    python examples/export_and_reload.py --model HuggingFaceTB/SmolLM2-135M

It trains a few steps, writes both forms, loads them with PEFT and with transformers alone, and prints how much their
logits differ from those of the trained model.
"""

import torch
from peft import PeftModel
from tiny import load, options, train
from transformers import AutoModelForCausalLM

import s2ft


def main() -> None:
    job = options(__doc__).parse_args()
    model, tokenizer = load(job.model)
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1, o_ratio=0.25))
    ids = tokenizer("the sea is wide and the ships are slow", return_tensors="pt")["input_ids"]
    before, after = train(model, {"input_ids": ids, "labels": ids}, lr=1e-2 if job.model is None else 1e-3)
    print(f"loss: {before:.3f} before, {after:.3f} after")
    with torch.no_grad():
        trained = model(ids).logits

        s2ft.export_lora(model, "lora")  # one matrix of each pair is one-hot, so that nothing is lost
        with_lora = PeftModel.from_pretrained(load(job.model)[0], "lora").eval()
        print(f"LoRA in PEFT: largest difference {(with_lora(ids).logits - trained).abs().max():.1e}")

        s2ft.merge(model).save_pretrained("merged")
        tokenizer.save_pretrained("merged")
        plain = AutoModelForCausalLM.from_pretrained("merged").eval()
        print(f"merged: largest difference {(plain(ids).logits - trained).abs().max():.1e}")


if __name__ == "__main__":
    main()
