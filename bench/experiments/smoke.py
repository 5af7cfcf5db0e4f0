"""What smoke runs use: a tiny random model, and made-up rows in files with the names and fields of the public ones.

No number that a smoke run measures means anything.
"""

import json
import random
from pathlib import Path

from bench.experiments.tasks import COMMONSENSE, MATH, PUBLIC

WORDS = ("river", "stone", "lamp", "garden", "window", "paper", "bread", "cloud", "horse", "violin")
# The words of the answers of each set, see s2ft.text.evaluation; the others have numbers, and AQuA letters
ANSWERS = {
    "boolq": ("true", "false"), "piqa": ("solution1", "solution2"), "social_i_qa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"), "winogrande": ("option1", "option2"),
    **dict.fromkeys(("ARC-Easy", "ARC-Challenge", "openbookqa"), ("answer1", "answer2", "answer3", "answer4")),
    "AQuA": ("A", "B", "C", "D", "E"),
}  # fmt: skip


def smoke_model(folder: Path) -> str:
    """Write a random Llama with 2 layers and 25,000 weights and a tokenizer of bytes. Returns the folder as text."""
    import torch
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def smoke_data(folder: Path) -> str:
    """Write made-up rows: training and test sets, other text, questions and PEFT's sets. Returns the folder as text."""
    draw = random.Random(0)
    tests = {test for _, _, tests, _ in PUBLIC.values() for test in tests}
    _write(folder / COMMONSENSE, [_row(draw, test) for _ in range(4) for test in [*ANSWERS][:-1]])
    _write(folder / MATH, [_row(draw, "AddSub") for _ in range(32)])
    _write(folder / "alpaca_gpt4_data.json", [_row(draw, "AddSub") for _ in range(32)])
    for test in sorted(tests):
        _write(folder / "dataset" / test / "test.json", [_row(draw, test) for _ in range(3)])
    sentences = [f"The {draw.choice(WORDS)} is near the {draw.choice(WORDS)}." for _ in range(140)]
    _write_lines(folder / "other_text.jsonl", [{"text": text} for text in sentences[:4]])
    sums = [(f"What is {a} plus {b}?", a + b) for a in range(6) for b in range(10)]
    rows = [{"query": text, "response": f"It makes {n}.\nThe answer is: {n}"} for text, n in sums]
    _write_lines(folder / "metamathqa.jsonl", rows)
    for split, count in (("train", 60), ("test", 6)):
        rows = [{"question": text, "answer": f"It makes {n}.\n#### {n}"} for text, n in sums[:count]]
        _write_lines(folder / f"gsm8k-{split}.jsonl", rows)
    _write_lines(folder / "encyclopedia.jsonl", [{"text": text} for text in sentences])
    return str(folder)


def _row(draw: random.Random, test: str) -> dict[str, str]:
    words = ANSWERS.get(test)
    if words is None:
        first, second, thing = draw.randint(1, 9), draw.randint(1, 9), draw.choice(WORDS)
        question, answer = f"Ann has {first} of the {thing}s and finds {second}. How many has she?", str(first + second)
    else:
        question, answer = f"Which {draw.choice(WORDS)} is it?\n\nAnswer format: {'/'.join(words)}", draw.choice(words)
    return {"instruction": question, "input": "", "output": f"The answer is {answer}.", "answer": answer}


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
