"""Score a model on examples.

The accuracy is that of generated answers. Teacher forcing would overstate it.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from s2ft.text.encoding import context_length, encode_prompts
from s2ft.text.examples import Example
from s2ft.text.generation import generate
from s2ft.text.prompts import PromptFormat
from s2ft.text.scoring import is_right, right_answer


@dataclass(frozen=True)
class Record:
    """One scored example.

    Attributes:
        question: The last message before the answer.
        generated: The model's answer.
        answer: The right answer.
        right: Whether the two agree.
    """

    question: str
    generated: str
    answer: str
    right: bool


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`.

    Attributes:
        task: "arithmetic" or "commonsense".
        records: One record for each answered example.
        left_out: Number of examples whose prompt did not fit into the context.
        seconds: Time of the scoring.
    """

    task: str
    records: list[Record]
    left_out: int
    seconds: float

    @property
    def right(self) -> int:
        """Number of right answers."""
        return sum(record.right for record in self.records)

    @property
    def accuracy(self) -> float:
        """Share of right answers among the answered examples."""
        return self.right / len(self.records)

    def to_dict(self) -> dict:
        """The result as values that JSON can hold."""
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


def evaluate(
    model,
    tokenizer,
    examples: Sequence[Example],
    task: str,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    title: str = "evaluating",
    prompt: PromptFormat | None = None,
    num_beams: int = 1,
) -> Evaluation:
    """Answer examples and score the answers.

    Args:
        model: A causal language model, with or without an attached adapter.
        tokenizer: The model's tokenizer.
        examples: The examples, as :func:`s2ft.text.examples.read_examples` returns them.
        task: "arithmetic" compares the last number of the answer, "commonsense" its first answer word.
        batch_size: Number of prompts that are generated at once.
        max_new_tokens: Longest answer in tokens. A longer one is cut and scored.
        title: The label of the progress bar, which is shown only in a terminal.
        prompt: The format of prompts. The tokenizer must have its template. None uses the tokenizer's chat template.
        num_beams: Number of beams. 1 answers greedily.

    Returns:
        The accuracy and a record for each example. Examples whose prompt is too long are counted in `left_out`.

    Raises:
        ValueError: The task cannot score an example, or no prompt fits into the context.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from s2ft.text.evaluation import evaluate
        >>> from s2ft.text.examples import Example
        >>> tokenizer = ByT5Tokenizer(chat_template="{{ messages[0]['content'] }}")
        >>> examples = [Example(({"role": "user", "content": "2+3="},), output="5")]
        >>> print(evaluate(model, tokenizer, examples, "arithmetic", max_new_tokens=4))
        0.0% right (0 of 1, ... s)
    """
    for name, value in {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "num_beams": num_beams}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    answers = [right_answer(example, task) for example in examples]
    room = (context_length(model) or 1 << 30) - max_new_tokens
    prompts = encode_prompts(tokenizer, examples, room, prompt)
    kept = [(number, prompt) for number, prompt in enumerate(prompts) if prompt is not None]
    start = time.perf_counter()
    texts = generate(model, tokenizer, [prompt for _, prompt in kept], batch_size, max_new_tokens, title, num_beams)
    records = [
        Record(examples[number].question, text, answers[number], is_right(text, answers[number], task))
        for (number, _), text in zip(kept, texts)
    ]
    return Evaluation(task, records, len(prompts) - len(kept), time.perf_counter() - start)
