"""What smoke runs use: a tiny random model, and made-up rows in the form of the public task files.

No number that a smoke run measures means anything. The files have the names and the fields of the public ones, so that
a smoke run reads them as a real run reads the real ones.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

LETTERS = "ABCDE"
WORDS = ("river", "stone", "lamp", "garden", "window", "paper", "bread", "cloud", "horse", "violin")


def smoke_model(folder: Path) -> str:
    """Write a random Llama with 2 layers and 25,000 weights and a tokenizer of bytes, like a checkpoint of the hub.

    Args:
        folder: The folder to write to.

    Returns:
        The folder as text.

    Example:
        >>> from pathlib import Path
        >>> from s2ft.reproduce.smoke import smoke_model
        >>> tiny, tokenizer = s2ft.text.models.load_model(smoke_model(Path("tiny")))
        >>> tiny.config.num_hidden_layers, tokenizer("5")["input_ids"]
        (2, [56, 1])
    """
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
    """Write made-up rows: training sets, the test sets of both suites, instructions, other text and questions.

    Args:
        folder: The folder to write to, which then looks like a checkout of LLM-Adapters with further files.

    Returns:
        The folder as text.
    """
    draw = random.Random(0)
    tasks = [make for suite in TASKS.values() for make in suite.values()]
    _write(folder / "ft-training_set" / "commonsense_170k.json", [tasks[7 + n % 8](draw) for n in range(32)])
    _write(folder / "ft-training_set" / "math_10k.json", [_sum(draw) for _ in range(32)])
    for suite in TASKS.values():
        for name, make in suite.items():
            _write(folder / "dataset" / name / "test.json", [make(draw) for _ in range(3)])
    _write(folder / "alpaca_gpt4_data.json", [_instruction(draw) for _ in range(32)])
    _write_lines(folder / "other_text.jsonl", [{"text": _sentence(draw)} for _ in range(4)])
    _write_lines(folder / "question.jsonl", [_question(draw, number) for number in (81, 82)])
    return str(folder)


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---- rows ----------------------------------------------------------------------------------------------


def _row(question: str, output: str, answer: str) -> dict[str, str]:
    return {"instruction": question, "input": "", "output": output, "answer": answer}


def _sum(draw: random.Random) -> dict[str, str]:
    first, second, thing = draw.randint(1, 9), draw.randint(1, 9), draw.choice(WORDS)
    total = first + second
    question = f"Ann has {first} of the {thing}s and finds {second}. How many has she?"
    return _row(question, f"{first} + {second} = {total}. The answer is {total}.", f"{total}.0")


def _letter(draw: random.Random) -> dict[str, str]:
    right, numbers = draw.randrange(5), draw.sample(range(10, 99), 5)
    options = ", ".join(f"{letter}){number}" for letter, number in zip(LETTERS, numbers))
    question = f"Which number is {numbers[right]}?\nAnswer Choices: {options}"
    return _row(question, f"The answer is {LETTERS[right]}.", LETTERS[right])


def _yes_or_no(draw: random.Random) -> dict[str, str]:
    answer = draw.choice(("true", "false"))
    question = f"Please answer the following question with true or false, question: is a {draw.choice(WORDS)} red?"
    return _row(f"{question}\n\nAnswer format: true/false", f"the correct answer is {answer}", answer)


def _choice(word: str, count: int) -> Callable[[random.Random], dict[str, str]]:
    def make(draw: random.Random) -> dict[str, str]:
        words, right = draw.sample(WORDS, count), draw.randrange(count)
        options = " ".join(f"{word.capitalize()}{number}: {text}" for number, text in enumerate(words, 1))
        allowed = "/".join(f"{word}{number}" for number in range(1, count + 1))
        question = f"Please choose the correct {word} to the question: Which one is a {words[right]}?"
        answer = f"{word}{right + 1}"
        return _row(f"{question}\n\n{options}\n\nAnswer format: {allowed}", f"the correct answer is {answer}", answer)

    return make


# The made-up rows of each task, by the names of LLM-Adapters' folders.
TASKS: dict[str, dict[str, Callable[[random.Random], dict[str, str]]]] = {
    "arithmetic": {
        "MultiArith": _sum,
        "gsm8k": _sum,
        "AddSub": _sum,
        "AQuA": _letter,
        "SingleEq": _sum,
        "SVAMP": _sum,
        "mawps": _sum,
    },
    "commonsense": {
        "boolq": _yes_or_no,
        "piqa": _choice("solution", 2),
        "social_i_qa": _choice("answer", 3),
        "hellaswag": _choice("ending", 4),
        "winogrande": _choice("option", 2),
        "ARC-Easy": _choice("answer", 4),
        "ARC-Challenge": _choice("answer", 4),
        "openbookqa": _choice("answer", 4),
    },
}


def _sentence(draw: random.Random) -> str:
    return f"The {draw.choice(WORDS)} is near the {draw.choice(WORDS)}."


def _instruction(draw: random.Random) -> dict[str, str]:
    word = draw.choice(WORDS)
    return {"instruction": "Write a sentence about this.", "input": word, "output": f"{_sentence(draw)} {word}."}


def _question(draw: random.Random, number: int) -> dict[str, Any]:
    turns = [f"Write about a {draw.choice(WORDS)}.", "Make it shorter."]
    return {"question_id": number, "category": "writing", "turns": turns}
