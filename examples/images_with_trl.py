"""Train a model on images with TRL's SFTTrainer.

Run it:

    python examples/images_with_trl.py
    python examples/images_with_trl.py --model Qwen/Qwen2.5-VL-3B-Instruct

The whole model is attached. By default its language model is trained, and the vision tower and the projector are frozen;
--towers names what to train instead. The rows are chats with a picture of one color.

It prints what is trained, the loss, and that the merged model gives the same output after reloading.
"""

import torch
from datasets import Dataset
from PIL import Image
from tiny import options, tiny_tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from trl import SFTConfig, SFTTrainer

import s2ft

COLORS = ["red", "green", "blue", "yellow"]
MARKS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "start": "<|vision_start|>"}
IMAGE = "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|>{% else %}{{ c['text'] }}{% endif %}"
CHAT = "{% for m in messages %}{% for c in m['content'] %}" + IMAGE + "{% endfor %}<|im_end|>{% endfor %}"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--towers", nargs="+", help="what to train: language, vision, projector")
    job = parser.parse_args()
    model, processor = load(job.model)
    print(s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1, o_ratio=0.25, towers=job.towers)))
    rows = Dataset.from_list([chat_about(color) for color in COLORS * 4])
    arguments = SFTConfig(
        output_dir="images-run",
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=1e-2 if job.model is None else 2e-4,
        max_length=None,  # a cut could fall between the tokens of an image
        logging_steps=1,
        logging_strategy="steps",
        save_strategy="no",
        report_to="none",
        bf16=False,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=processor)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    print(f"loss: {losses[0]:.3f} before, {losses[-1]:.3f} after")
    s2ft.save_adapter(model, "images-adapter")

    batch = trainer.data_collator([rows[0]]).to(model.device)
    merged = s2ft.merge(model).eval()
    merged.save_pretrained("images-merged")
    processor.save_pretrained("images-merged")
    again = AutoModelForImageTextToText.from_pretrained("images-merged", dtype="auto").to(model.device).eval()
    with torch.no_grad():
        print("the same after reloading:", torch.equal(again(**batch).logits, merged(**batch).logits))


def chat_about(color: str) -> dict:
    """A row for TRL: a picture of one color, and a question with its answer."""
    question, answer = {"role": "user", "content": "What color is it?"}, {"role": "assistant", "content": color}
    return {"images": [Image.new("RGB", (16, 16), color)], "messages": [question, answer]}


def load(name: str | None):
    """Load a model and its processor, or make tiny ones."""
    if name is not None:
        return AutoModelForImageTextToText.from_pretrained(name, dtype="auto"), AutoProcessor.from_pretrained(name)
    torch.manual_seed(0)
    letters = tiny_tokenizer()
    tokens = {"bos_token": letters.bos_token, "eos_token": letters.eos_token, "pad_token": letters.pad_token}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters.backend_tokenizer, **tokens, extra_special_tokens=MARKS
    )
    sizes = dict(patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=256)
    images, videos = Qwen2VLImageProcessor(**sizes), Qwen2VLVideoProcessor(**sizes)
    image, video, start = tokenizer.convert_tokens_to_ids(list(MARKS.values()))
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    text = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope)  # fmt: skip
    vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=4, out_hidden_size=64, patch_size=4,
                  window_size=16, fullatt_block_indexes=[1])  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=image, video_token_id=video,
                              vision_start_token_id=start)  # fmt: skip
    processor = Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=CHAT)
    return Qwen2_5_VLForConditionalGeneration(config), processor


if __name__ == "__main__":
    main()
