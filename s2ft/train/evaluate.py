"""Generate answers and score them. Accuracy comes from greedy generation, never from teacher forcing."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

import s2ft
from s2ft.text.encoding import TokenRow, context_length, encode_prompts, left_pad
from s2ft.text.examples import Example
from s2ft.text.head import packed_head
from s2ft.text.prompts import end_ids, pad_id
from s2ft.train.scoring import is_right, right_answer


@dataclass(frozen=True)
class Record:
    """One scored example."""

    question: str
    generated: str
    answer: str
    right: bool


@dataclass(frozen=True)
class Evaluation:
    """The records of the rows that were answered, and how many rows were left out as too long."""

    task: str
    records: list[Record]
    left_out: int
    seconds: float

    @property
    def right(self) -> int:
        return sum(record.right for record in self.records)

    @property
    def accuracy(self) -> float:
        return self.right / len(self.records)

    def to_dict(self) -> dict:
        return {
            "task": self.task,
            "accuracy": self.accuracy,
            "right": self.right,
            "of": len(self.records),
            "left_out": self.left_out,
            "seconds": round(self.seconds, 2),
            "records": [asdict(record) for record in self.records],
        }

    def __str__(self) -> str:
        text = f"{self.accuracy:.1%} right ({self.right} of {len(self.records)}, {self.seconds:.0f} s)"
        return text + (f"; {self.left_out} rows left out as too long" if self.left_out else "")


@dataclass(frozen=True)
class HeldOut:
    """Data to evaluate on while training: the loss on rows, and where a task is named the accuracy on examples."""

    rows: Sequence[TokenRow]
    examples: Sequence[Example] = ()
    task: str | None = None
    batch_size: int = 32
    max_new_tokens: int = 256


def evaluate(
    model,
    tokenizer,
    examples: Sequence[Example],
    task: str,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    title: str = "evaluating",
) -> Evaluation:
    """Answer every example greedily and score it.

    Args:
        task: "arithmetic" or "commonsense". batch_size: prompts generated at once.
        max_new_tokens: an answer longer than this is cut, and scored as it is.
    Raises: ValueError for an example that the task can't score, or if no prompt fits the context.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(f"batch_size and max_new_tokens must be at least 1, got {batch_size} and {max_new_tokens}")
    answers = [right_answer(example, task) for example in examples]
    room = (context_length(model) or 1 << 30) - max_new_tokens
    prompts = encode_prompts(tokenizer, examples, room)
    kept = [number for number, prompt in enumerate(prompts) if prompt is not None]
    start = time.perf_counter()
    texts = generate(model, tokenizer, [prompts[number] for number in kept], batch_size, max_new_tokens, title)
    records = [
        Record(examples[number].question, text, answers[number], is_right(text, answers[number], task))
        for number, text in zip(kept, texts)
    ]
    return Evaluation(task, records, len(prompts) - len(kept), time.perf_counter() - start)


def generate(
    model, tokenizer, prompts: Sequence[Sequence[int]], batch_size: int, max_new_tokens: int, title: str = "generating"
) -> list[str]:
    """Greedy answers to token-id prompts, in their order. Longest first: prompts of a batch are of a length,
    and a batch that doesn't fit into memory fails at once."""
    from tqdm.auto import tqdm
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=end_ids(tokenizer, model.generation_config),
    )
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    texts = [""] * len(prompts)
    with for_generation(model), tqdm(total=len(prompts), desc=title, dynamic_ncols=True, disable=None) as bar:
        for first in range(0, len(order), batch_size):
            numbers = order[first : first + batch_size]
            batch = left_pad([prompts[number] for number in numbers], pad_id(tokenizer))
            batch.pop("position_ids")  # generate derives the same from the mask
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            output = model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :]
            for number, text in zip(numbers, tokenizer.batch_decode(output, skip_special_tokens=True)):
                texts[number] = text.strip()
            bar.update(len(numbers))
    return texts


@contextlib.contextmanager
def for_generation(model) -> Iterator[None]:
    """Evaluation mode, no gradients, and the trainable adapter written into the weights for plain speed;
    afterwards all is as it was, the weights bit for bit."""
    was_training = model.training
    state = s2ft.status(model)
    fuse = state.active and not any(row.fused for row in state.rows)
    model.eval()
    if fuse:
        s2ft.fuse(model)
    try:
        with torch.inference_mode(), packed_head(model):
            yield
    finally:
        if fuse:
            s2ft.unfuse(model)
        model.train(was_training)
