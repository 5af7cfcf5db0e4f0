"""Five tasks in a row on SmolLM2-135M: S²FT on new units for each task, against one slice and against LoRA.

    python -m bench.evidence.sequence [--output DIR] [--seeds 0 1] [--method NAME ...] [--resume]

It writes the five tasks of tasks.py as files and runs the recipe `sequence` of s2ft on them. Every variant trains as
many weights for a task as S²FT does, and has the learning rate that `make evidence` chose for it on validation
questions of arithmetic. Full fine-tuning trains all weights. Tables are in results/, as sequence-*.
"""

import argparse
import json
import random
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

from bench.evidence import tasks
from bench.evidence.tasks import SUBJECTS, Question, probes
from s2ft.reproduce.experiment import run_recipe
from s2ft.reproduce.recipe import read_recipe
from s2ft.train.demo import default_model

RESULTS = Path(__file__).parent / "results"
TRAIN, TEST = 192, 64
RATES = {"s2ft": 1e-3, "lora": 1e-3, "full": 3e-5}  # each the best of four on validation questions, see evidence.yaml
VARIANTS: dict[str, dict[str, Any]] = {
    "s2ft-disjoint": {"mode": "on_top", "method": "s2ft", "options": {"d_ratio": 0.06}, "learning_rate": RATES["s2ft"]},
    "s2ft-one-slice": {
        "mode": "continue",
        "method": "s2ft",
        "options": {"d_ratio": 0.06},
        "learning_rate": RATES["s2ft"],
    },
    "lora": {"mode": "continue", "method": "lora", "learning_rate": RATES["lora"]},
    "lora-merged": {"mode": "merge", "method": "lora", "learning_rate": RATES["lora"]},
    "full": {"mode": "continue", "method": "full", "learning_rate": RATES["full"]},
}


def orders_of(question: Question, questions: list[Question]) -> list[str]:
    """Return at most four orders of the answer's words, the right one among them."""
    words = question.answer.split(", ")
    others = sorted({", ".join(order) for order in permutations(words)} - {question.answer})
    shuffle = random.Random(question.question)
    found = [question.answer, *shuffle.sample(others, min(3, len(others)))]
    return shuffle.sample(found, len(found))


def answers_of(question: Question, questions: list[Question]) -> list[str]:
    """Return all answers that occur in a task."""
    return sorted({one.answer for one in questions})


# Each task: its questions, and the answers of which the likeliest is scored, or None if a generated number is.
TASKS: dict[str, tuple[Callable, Callable[[Question, list[Question]], list[str]] | None]] = {
    "arithmetic": (tasks.arithmetic, None),
    "subjects": (tasks.subjects, lambda question, questions: list(SUBJECTS)),
    "relations": (tasks.relations, answers_of),
    "reversal": (tasks.reversal, orders_of),
    "sums": (tasks.sums, None),
}


def write_tasks(folder: Path) -> dict[str, dict[str, str]]:
    """Write the rows of all tasks and the other text, and return the recipe's option `tasks`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (make, choices) in TASKS.items():
        task = make(TRAIN, 8, TEST)
        every = [*task.train, *task.test]
        _write(folder / f"{name}.jsonl", [{"question": one.question, "answer": one.output} for one in task.train])
        rows = [{"question": one.question, "answer": one.answer} for one in task.test]
        if choices:
            rows = [row | {"choices": choices(one, every)} for row, one in zip(rows, task.test)]
        _write(folder / f"{name}.test.jsonl", rows)
    _write(folder / "other_text.jsonl", [{"text": text} for text in probes(24)["encyclopedia"]])
    return {
        name: {"train": f"{name}.jsonl", "tests": f"{name}.test.jsonl", "task": "choices" if choices else "arithmetic"}
        for name, (_, choices) in TASKS.items()
    }


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def settings(folder: Path, seeds: list[int], methods: list[str] | None) -> dict[str, Any]:
    """Return the options of the recipe."""
    return {
        "model": str(default_model()),
        "data": str(folder),
        "tasks": write_tasks(folder),
        "other_text": "other_text.jsonl",
        "other_rows": 24,
        "variants": VARIANTS,
        "methods": methods,
        "equal_to": "s2ft-disjoint",
        "seeds": seeds,
        "limit": TRAIN,
        "test_limit": TEST,
        "prompt": None,
        "max_length": 256,
        "epochs": 1,
        "batch_size": 8,
        "warmup_steps": 3,
        "gradient_checkpointing": False,
        "max_new_tokens": 40,
        "eval_batch_size": 32,
        "dtype": "bfloat16",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(".evidence-sequence"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--method", nargs="+", choices=VARIANTS, default=None)
    parser.add_argument("--resume", action="store_true", help="make the runs that are missing in --output")
    args = parser.parse_args()
    options = settings(args.output.with_name(f"{args.output.name}-data"), args.seeds, args.method)
    found = run_recipe(read_recipe("sequence"), args.output, options, resume=args.resume)
    for table in found.tables:
        print(f"\n{table.text()}")
        table.save(RESULTS)
    if found.failed:
        raise SystemExit("a run failed, see the tables")


if __name__ == "__main__":
    main()
