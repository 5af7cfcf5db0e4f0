"""Score a model: by its generated answers to examples, and beside its base on rows that were not trained on.

The accuracy is that of generated answers. Teacher forcing would overstate it.
"""

import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import partial
from itertools import islice, takewhile
from typing import Any

from s2ft.config import refuse
from s2ft.text.data import DataOptions, load_rows
from s2ft.text.data.data_options import TASKS
from s2ft.text.divergence import base_switch, mean_loss, prompts_of, some
from s2ft.text.encoding import IGNORED, context_length
from s2ft.text.generation import generate
from s2ft.text.prompts import PromptFormat, encode_prompt
from s2ft.text.templates import plain_text, shorten

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A prompt and the answer to it.

    Attributes:
        conversation: Messages with the keys "role" and "content", of which the last one is not the assistant's. Or a
            text.
        output: The answer of the data.
        answer: The short answer that is scored. None takes it from `output`.
        tools: Schemas of the tools that the assistant can call, or None.
    """

    conversation: tuple[dict[str, Any], ...] | str
    output: str
    answer: str | None = None
    tools: list | None = None

    @property
    def question(self) -> str:
        """The last message before the answer, or the text."""
        return self.conversation if isinstance(self.conversation, str) else plain_text(self.conversation[-1])

    def prompt_for(self, prompt: PromptFormat) -> list[dict[str, Any]] | str:
        """Return what :func:`s2ft.text.prompts.encode_prompt` encodes.

        Args:
            prompt: The format of prompts. In form "chat" a text becomes a message of the user.
        """
        is_text = isinstance(self.conversation, str)
        if is_text and prompt.form == "text":
            return self.conversation
        return prompt.conversation([{"role": "user", "content": self.conversation}] if is_text else self.conversation)


def examples_of(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """Convert normalised rows to examples. The last answer of a chat is the output.

    Args:
        rows: Rows as :func:`s2ft.text.data.load_rows` returns them.

    Raises:
        ValueError: A row has neither a question nor a prompt.
    """
    for row in rows:
        scored = (row.get("answer"), row.get("tools"))
        if row.get("text") is not None:
            raise ValueError(f"{row.get('place', 'a row')}: a row with only 'text' has no question to answer")
        if isinstance(row.get("prompt"), str):
            yield Example(row["prompt"], row["completion"], *scored)
            continue
        messages = row.get("messages") or [*row["prompt"], *row["completion"]]
        yield Example(tuple(messages[:-1]), plain_text(messages[-1]), *scored)


def read_examples(*files: str) -> list[Example]:
    """Read examples from files or data sets.

    Args:
        *files: Their names.

    Returns:
        The examples in the order of the rows.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A row cannot be used. The message names the file, the row or line, and the problem.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("data.jsonl").write_text('{"instruction": "2+3=", "output": "The answer is 5."}')
        >>> (example,) = s2ft.text.evaluation.read_examples("data.jsonl")
        >>> example.question, example.output
        ('2+3=', 'The answer is 5.')
    """
    return list(examples_of(load_rows(DataOptions(data=[*files]), scored=True)))


@dataclass(frozen=True)
class HeldOut:
    """Rows for the evaluation loss and, with a task, examples for the accuracy.

    Attributes:
        rows: Token rows whose loss is computed, a Dataset with the columns input_ids and labels.
        examples: The same data as examples. They are answered only if `task` is set.
        task: One of TASKS, or None for the loss alone.
        max_new_tokens: Longest answer in tokens.
        prompt: The format of their prompts; None for the tokenizer's.
    """

    rows: Any
    examples: Sequence[Example] = ()
    task: str | None = None
    max_new_tokens: int = 256
    prompt: PromptFormat | None = None


# ---- scores ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoredAnswer:
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
        task: One of TASKS.
        records: One record for each answered example.
        left_out: Number of examples whose prompt did not fit into the context.
        seconds: Time of the scoring.
    """

    task: str
    records: list[ScoredAnswer]
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


def fitting(lengths: Sequence[int], room: int) -> list[int]:
    """Return the numbers of the prompts that fit, and log a warning with the number of the others.

    Args:
        lengths: Tokens of each prompt.
        room: Longest prompt in tokens.

    Raises:
        ValueError: No prompt fits.
    """
    kept = [number for number, length in enumerate(lengths) if length <= room]
    left_out, count = len(lengths) - len(kept), len(lengths)
    if not kept:
        raise ValueError(
            f"none of {count} prompts fits into the {room} tokens that the model's context leaves for the prompt"
        )
    if left_out:
        logger.warning("left out %d of %d rows: the prompt is longer than %d tokens", left_out, count, room)
    return kept


def encode_prompts(
    tokenizer, examples: Sequence[Example], room: int, prompt: PromptFormat | None = None
) -> dict[int, list[int]]:
    """Encode the prompts of examples that fit, see :func:`fitting`.

    Args:
        tokenizer: The model's tokenizer.
        examples: The examples whose prompts are encoded.
        room: Longest prompt in tokens.
        prompt: The format of prompts. None uses the tokenizer's chat template.

    Returns:
        The token ids by the number of the example.

    Raises:
        ValueError: No prompt fits.
    """
    form = prompt or PromptFormat()
    prompts = [encode_prompt(tokenizer, example.prompt_for(form), example.tools) for example in examples]
    return {number: prompts[number] for number in fitting(list(map(len, prompts)), room)}


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
        examples: The examples, as :func:`s2ft.text.evaluation.read_examples` returns them.
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
        >>> from s2ft.text.evaluation import Example
        >>> tokenizer = ByT5Tokenizer(chat_template="{{ messages[0]['content'] }}")
        >>> examples = [Example(({"role": "user", "content": "2+3="},), output="5")]
        >>> print(evaluate(model, tokenizer, examples, "arithmetic", max_new_tokens=4))
        0.0% right (0 of 1, ... s)
    """
    refuse(
        (batch_size < 1, f"batch_size must be at least 1, got {batch_size}"),
        (max_new_tokens < 1, f"max_new_tokens must be at least 1, got {max_new_tokens}"),
        (num_beams < 1, f"num_beams must be at least 1, got {num_beams}"),
    )
    answers = [right_answer(example, task) for example in examples]
    prompts = encode_prompts(tokenizer, examples, context_length(model) - max_new_tokens, prompt)
    start = time.perf_counter()
    texts = generate(model, tokenizer, list(prompts.values()), batch_size, max_new_tokens, title, num_beams)
    records = [
        ScoredAnswer(examples[number].question, text, answers[number], is_right(text, answers[number], task))
        for number, text in zip(prompts, texts)
    ]
    return Evaluation(task, records, len(examples) - len(prompts), time.perf_counter() - start)


# ---- an adapter beside its base ------------------------------------------------------------------------

WIDTH = 100  # characters of a text in a line
SAMPLE = ("prompt", "right", "base", "tuned")


@dataclass(frozen=True)
class Comparison:
    """What an adapter has changed.

    Attributes:
        rows: Number of rows whose loss was computed.
        loss_before: Loss of the base on the answers of these rows, in nats a token; None without an adapter.
        loss_after: Loss with the adapter.
        samples: For some of the rows the `prompt` as text, and the answers: `right` is that of the data, `base` that
            of the base or None without an adapter, `tuned` that of the adapter.
    """

    rows: int
    loss_before: float | None
    loss_after: float
    samples: tuple[dict[str, str | None], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The comparison as values that JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        if self.loss_before is None:
            lines = [f"loss on {self.rows} rows: {self.loss_after:.4f}"]
        else:
            word = "lower" if self.loss_after < self.loss_before else "NOT lower"
            lines = [f"loss on {self.rows} rows: {self.loss_before:.4f} before, {self.loss_after:.4f} after ({word})"]
        for one in self.samples:
            alone = {"tuned": None, "model": one["tuned"]} if self.loss_before is None else {}
            lines += answer_lines(**{**one, **alone})
        return "\n".join(lines)


def answer_lines(prompt: str, **answers: str | None) -> list[str]:
    """Return a prompt and the answers to it as lines of text.

    Args:
        prompt: The prompt, of which the end is shown: a chat's question is there.
        answers: The answers by whose they are. Those that are None are left out.
    """
    words = " ".join(prompt.split())
    shown = {f"{name}:": shorten(text, WIDTH) for name, text in answers.items() if text is not None}
    width = max(map(len, shown))
    asked = words if len(words) <= WIDTH else "…" + words[1 - WIDTH :]
    return ["", f"  {asked}", *(f"    {name:<{width}} {text}" for name, text in shown.items())]


def compare(
    model, tokenizer, rows: Any, *, most: int = 64, samples: int = 3, max_new_tokens: int = 64, batch_size: int = 8
) -> Comparison:
    """Compare a model with its base: the loss of the answers, and some answers side by side.

    Args:
        model: A causal language model, with an adapter that is on or without one.
        tokenizer: The model's tokenizer.
        rows: Token rows with input_ids and labels that were not trained on.
        most: Number of rows to draw.
        samples: Number of rows to answer. Rows without a prompt, such as plain text, are not answered.
        max_new_tokens: Longest answer in tokens.
        batch_size: Rows of a forward pass.

    Returns:
        The comparison.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from s2ft.text.evaluation import compare
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}]
        >>> found = compare(model, ByT5Tokenizer(), rows, max_new_tokens=4)
        >>> found.rows, found.loss_after - found.loss_before, len(found.samples)
        (1, 0.0, 1)
    """
    drawn, switch = some(rows, most), base_switch(model)
    after = mean_loss(model, drawn, batch_size)
    room = context_length(model) - max_new_tokens
    asked = ((row, prompts_of([row])[0]) for row in drawn if list(row["labels"])[1:2] == [IGNORED])
    answered = list(islice((one for one in asked if len(one[1]) <= room), samples))
    prompts = [prompt for _, prompt in answered]
    answer = partial(generate, model, tokenizer, prompts, batch_size, max_new_tokens, "answering")
    tuned, before, base = answer(), None, [None] * len(prompts)
    if switch is not None:
        with switch():
            before, base = mean_loss(model, drawn, batch_size), answer()
    labels = [list(row["labels"])[len(prompt) :] for row, prompt in answered]
    right = [list(takewhile(lambda label: label != IGNORED, answer)) for answer in labels]  # up to the next question
    texts = zip(_texts(tokenizer, prompts), _texts(tokenizer, right), base, tuned)
    return Comparison(len(drawn), before, after, tuple(dict(zip(SAMPLE, each)) for each in texts))


def _texts(tokenizer, rows: Sequence[Sequence[int]]) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


# ---- is a generated answer right? ----------------------------------------------------------------------

TOLERANCE = 1e-3
LETTERS = re.compile(r"\b([A-E])\b")  # choices, as in AQuA
# A minus is a sign only if it cannot be a subtraction: "8-3" ends in 3, "= -3" ends in -3.
NUMBER = re.compile(r"((?<![\w.)\]])-\$?|\$-?)?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
# Families of answer words. The right answer determines which family is searched for.
FAMILIES = (r"true|false", r"answer\d", r"solution\d", r"ending\d", r"option\d")


def last_number(text: str) -> float | None:
    """Return the last number in the text, or None if there is none.

    Example:
        >>> s2ft.text.evaluation.last_number("3 times $400 is $1,200.")
        1200.0
    """
    found = NUMBER.findall(text.replace("\u2212", "-"))
    if not found:
        return None
    sign, digits = found[-1]
    return float(digits.replace(",", "")) * (-1 if "-" in sign else 1)


def first_word(text: str, answer: str) -> str | None:
    """Return the first answer word in the text that belongs to the same family as `answer`, or None.

    Raises:
        ValueError: `answer` is not an answer word.

    Example:
        >>> s2ft.text.evaluation.first_word("I think option2 is better than option1.", answer="option1")
        'option2'
    """
    family = next((words for words in FAMILIES if re.fullmatch(words, answer)), None)
    if family is None:
        raise ValueError(f"{answer!r} is not an answer word (true, false, answer1, solution1, ending1, option1 …)")
    found = re.search(rf"\b(?:{family})\b", text.lower())
    return found.group() if found else None


def right_answer(example: Any, task: str) -> str:
    """Return the answer that an example is scored against.

    Args:
        example: The :class:`~s2ft.text.evaluation.Example`. Its `answer` is used, or the answer in its `output`.
        task: One of TASKS.

    Raises:
        ValueError: The task is unknown, or the example has no answer that the task can score.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    source = example.output if example.answer is None else example.answer
    if task == "exact":
        return source
    if task == "arithmetic":
        if example.answer is not None and LETTERS.fullmatch(source.strip()):
            return source.strip()
        number = last_number(source)
        if number is None:
            raise ValueError(f"{source!r} has no number, which task arithmetic needs")
        return format(Decimal(repr(number)), "f") if example.answer is None else source
    found = re.search(rf"\b(?:{'|'.join(FAMILIES)})\b", source.lower())
    if found is None:
        raise ValueError(f"{source!r} has no answer word, which task commonsense needs (true, answer1, ending1 …)")
    return found.group()


def is_right(text: str, answer: str, task: str) -> bool:
    """Whether generated text contains the right answer.

    Args:
        text: The generated text.
        answer: The right answer, as :func:`right_answer` returns it.
        task: One of TASKS. For "exact", case, white space and a full stop at the end make no difference.
    """
    if task == "exact":
        return _plain(text) == _plain(answer)
    if task == "commonsense":
        return first_word(text, answer) == answer
    if LETTERS.fullmatch(answer):
        return LETTERS.findall(text)[-1:] == [answer]
    number, expected = last_number(text), last_number(answer)
    return number is not None and expected is not None and abs(number - expected) <= TOLERANCE


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")
