"""The folder in which the blocks of a page run. It holds the files that the pages name."""

from pathlib import Path

from support.convert_hf_to_gguf import convert
from support.encoders import save_encoder
from support.images import qwen2_5_vl
from train.tiny import base_of, sums, write_jsonl
from transformers.utils import is_torchvision_available

SHAPE = dict(
    hidden_size=64, intermediate_size=128, max_position_embeddings=1024
)  # 4 heads, 2 key/value heads, 2 layers


def fill(folder: Path) -> Path:
    """Write the model and the data files.

    - path/to/model: a LLaMA with a tokenizer and a chat template
    - model.gguf: the same LLaMA in Q4_1
    - path/to/encoder: a BERT with a tokenizer
    - path/to/vision-model: a Qwen2.5-VL with a processor, where torchvision is installed
    - data.jsonl: 16 rows of instruction, output and answer; held-out.jsonl: 4 of them; other.jsonl: 2 texts
    - chats.jsonl: 8 conversations
    - preferences.jsonl, problems.jsonl: 8 pairs of answers, and 8 questions with answers; trl-preferences.jsonl: texts
    """
    convert(base_of(folder / "path/to/model", **SHAPE), folder / "model.gguf", "q4_1")
    save_encoder(folder / "path/to/encoder")
    if is_torchvision_available():  # the processor needs it
        for part in qwen2_5_vl():
            part.save_pretrained(folder / "path/to/vision-model")
    write_jsonl(folder / "data.jsonl", sums(16))
    write_jsonl(folder / "held-out.jsonl", sums(4))
    write_jsonl(folder / "other.jsonl", [{"text": "A heron stands in the water."}, {"text": "Iron rusts in the rain."}])
    pairs = [{"question": row["instruction"], "chosen": row["answer"], "rejected": "no idea"} for row in sums(8)]
    write_jsonl(folder / "preferences.jsonl", pairs)
    texts = [{"prompt": row["question"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in pairs]
    write_jsonl(folder / "trl-preferences.jsonl", texts)
    problems = [{"question": row["instruction"], "answer": row["answer"]} for row in sums(8)]
    write_jsonl(folder / "problems.jsonl", problems)
    write_jsonl(folder / "chats.jsonl", [{"messages": messages(row)} for row in sums(8)])
    return folder


def messages(row: dict) -> list[dict]:
    """The conversation of a row of instruction and output."""
    return [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
