"""Train on problems that are made and checked by a program, with GRPO. The problems are those of reasoning-gym.

Run it, on a tiny model or on a real one:

    python examples/grpo_reasoning_gym.py
    python examples/grpo_reasoning_gym.py --model HuggingFaceTB/SmolLM2-135M-Instruct --steps 20 --answers 32

The same from the command line. The function `verified` of this file is the reward:

    python examples/grpo_reasoning_gym.py --write problems.jsonl
    s2ft grpo --model my-model --data problems.jsonl --rewards examples/grpo_reasoning_gym.py:verified --output run

No answer is written by hand: the model answers each problem several times, and the verifier of the problem says which
answers are right. A model must answer rightly now and then at the beginning, or there is nothing to learn from.

It prints the share of right answers to other problems before and after, and the reward of each update.
"""

import json
from pathlib import Path

import reasoning_gym

TASK = "chain_sum"
SIZES = dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)  # 3 + 4 =
CONFIG = dict(d_ratio=0.03, o_ratio=0.12)


def problems(count: int, seed: int) -> list[dict]:
    """Make problems. The columns `answer` and `metadata` are what the verifier needs."""
    made = reasoning_gym.create_dataset(TASK, size=count, seed=seed, **SIZES)
    return [{"question": one["question"], "answer": one["answer"], "metadata": one["metadata"]} for one in made]


def verified(completions, answer, metadata, **_) -> list[float]:
    """The reward: the score of the problem's verifier, 1 for the right answer, less for a text that contains it."""
    score = reasoning_gym.get_score_answer_fn(TASK)
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [
        score(text.strip(), {"answer": right, "metadata": more}) for text, right, more in zip(texts, answer, metadata)
    ]


def share_right(model, tokenizer, rows: list[dict]) -> float:
    """The mean score of the most likely answers."""
    from s2ft.text.generation import generate
    from s2ft.text.prompts import encode_prompt

    asked = [encode_prompt(tokenizer, [{"role": "user", "content": row["question"]}]) for row in rows]
    texts = generate(model, tokenizer, asked, batch_size=32, max_new_tokens=12)
    scores = verified(texts, [row["answer"] for row in rows], [row["metadata"] for row in rows])
    return sum(scores) / len(scores)


def train(job) -> None:
    from datasets import Dataset
    from tiny import load

    import s2ft
    from s2ft.train.grpo import grpo
    from s2ft.train.output import RunFolder, read_log
    from s2ft.train.rewards import checked
    from s2ft.train.rl_arguments import GRPOArguments

    model, tokenizer = load(job.model)
    held_out = problems(32, seed=1)
    before = share_right(model, tokenizer, held_out)
    print(s2ft.attach(model, s2ft.S2FTConfig(**(CONFIG if job.model else dict(d_ratio=0.1, o_ratio=0.25)))))
    arguments = GRPOArguments(
        output_dir=job.output,
        max_steps=job.steps,
        per_device_train_batch_size=min(8, job.answers),
        gradient_accumulation_steps=max(1, job.answers // 8),
        num_generations=4,
        max_completion_length=12,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        save_steps=0,
    )
    rows = [{"prompt": [{"role": "user", "content": row.pop("question")}], **row} for row in problems(512, seed=0)]
    folder = RunFolder(job.output)
    folder.begin({"model": job.model})
    result = grpo(model, tokenizer, Dataset.from_list(rows), [checked(verified, "verified")], arguments, folder)
    rewards = [round(line["reward"], 3) for line in read_log(folder.log)]
    print("reward of each update:", *rewards)
    print(f"score of other problems: {before:.3f} before, {share_right(model, tokenizer, held_out):.3f} after")
    print("adapter:", result.adapter)


def main() -> None:
    from tiny import options

    parser = options(__doc__)
    parser.add_argument("--write", metavar="FILE", help="write problems for s2ft grpo, and train nothing")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--answers", type=int, default=8, help="answers of an update, 4 to each problem")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--output", default="grpo-run")
    job = parser.parse_args()
    if job.write:
        Path(job.write).write_text("".join(json.dumps(row) + "\n" for row in problems(512, seed=0)))
        print(f"problems: {job.write}")
    else:
        train(job)


if __name__ == "__main__":
    main()
