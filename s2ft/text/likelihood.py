"""Score the likeliest of the allowed answers, by the log-probability that the model gives to each.

Rows of a batch are padded on the right. No token of a causal model reads what comes after it, and positions count from
the first token, so the padding changes nothing but rounding. Answers that differ in their last token only, such as the
numbers of options, share one forward pass. The output layer runs at the positions that are read, and at no others.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2ft.text.encoding import context_length
from s2ft.text.evaluation import Evaluation, Record
from s2ft.text.examples import Example
from s2ft.text.generation import generation_mode
from s2ft.text.prompts import PromptFormat, pad_id, rendered_prompt
from s2ft.text.running_batch import rows_interact
from s2ft.text.scoring import CHOICES, allowed_answers, right_answer
from s2ft.text.templates import Rendered, in_common
from s2ft.text.tokens import encode_rendered

# The text of an answer. Data of LLM-Adapters has its answers in these sentences.
ANSWER_FORMS = {"arithmetic": "The answer is {}", "commonsense": "the correct answer is {}", CHOICES: "{}"}
PART = 64  # positions whose logits are converted to float32 at once


@dataclass(frozen=True)
class LikelihoodRecord(Record):
    """One example whose answers were compared. `generated` is the likeliest answer.

    Attributes:
        logprobs: Sum of the natural log-probabilities of an answer's tokens, by answer.
        right_if_normalized: Whether the answer with the highest sum for each of its characters is right.
    """

    logprobs: dict[str, float]
    right_if_normalized: bool


def evaluate_likelihood(
    model,
    tokenizer,
    examples: Sequence[Example],
    task: str,
    batch_size: int = 32,
    length_normalized: bool = False,
    answer_form: str | None = None,
    prompt: PromptFormat | None = None,
    title: str = "evaluating",
) -> Evaluation:
    """Compare the likelihood of the allowed answers of each example. An example is right if its answer is likeliest.

    Args:
        model: A causal language model, with or without an attached adapter.
        tokenizer: The model's tokenizer.
        examples: The examples, as :func:`s2ft.text.examples.read_examples` returns them.
        task: "arithmetic", "commonsense" or "choices"; see :func:`s2ft.text.scoring.allowed_answers`.
        batch_size: Number of sequences in a forward pass.
        length_normalized: Whether the sum of an answer's log-probabilities is divided by the number of its characters,
            as lm-eval's acc_norm does. The sum alone is the probability of the answer, but it falls with the length of
            a text.
        answer_form: The text in which an answer stands, with {} in its place. None is the sentence of LLM-Adapters'
            data for its tasks, and the bare answer for "choices".
        prompt: The format of prompts. The tokenizer must have its template. None uses the tokenizer's chat template.
        title: The label of the progress bar, which is shown only in a terminal.

    Returns:
        The accuracy, and a :class:`LikelihoodRecord` for each example. Examples that do not fit into the model's
        context are counted in `left_out`.

    Raises:
        ValueError: The task has no allowed answers for an example, the form has no {}, or no example fits.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from s2ft.text.examples import Example
        >>> from s2ft.text.likelihood import evaluate_likelihood
        >>> tokenizer = ByT5Tokenizer(chat_template="{{ messages[0]['content'] }}")
        >>> examples = [Example("2+3=", "5", choices=("5", "6"))]
        >>> result = evaluate_likelihood(model, tokenizer, examples, "choices")
        >>> sorted(result.records[0].logprobs)
        ['5', '6']
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    form = check_form(ANSWER_FORMS[task] if answer_form is None else answer_form)
    allowed = [allowed_answers(example, task) for example in examples]
    rights = [right_answer(example, task) for example in examples]
    start, room = time.perf_counter(), context_length(model) or 1 << 30
    encoded = [encode_answers(tokenizer, example, names, form, prompt) for example, names in zip(examples, allowed)]
    fits = [all(len(context) + len(ids) - 1 <= room for context, ids in pairs) for pairs in encoded]
    if not any(fits):
        raise ValueError(f"none of {len(examples)} rows fits into the model's context of {room} tokens")
    sequences = [pair for pairs, fit in zip(encoded, fits) if fit for pair in pairs]
    logprobs = iter(continuation_logprobs(model, sequences, batch_size, pad_id(tokenizer), title))
    records = []
    for example, names, right, fit in zip(examples, allowed, rights, fits):
        if fit:
            sums = {name: sum(next(logprobs)) for name in names}
            records.append(_record(example, sums, right, length_normalized))
    return Evaluation(task, records, fits.count(False), time.perf_counter() - start)


def check_form(form: str) -> str:
    """Return the form of an answer if it has the place of the answer once, else raise ValueError."""
    if form.count("{}") != 1:
        raise ValueError(f"answer_form must have {{}} once, where the answer stands, got {form!r}")
    return form


def _record(example: Example, sums: dict[str, float], right: str, length_normalized: bool) -> LikelihoodRecord:
    normalized = {name: value / len(name) for name, value in sums.items()}
    likeliest, likeliest_normalized = (max(values, key=values.__getitem__) for values in (sums, normalized))
    chosen = likeliest_normalized if length_normalized else likeliest
    return LikelihoodRecord(example.question, chosen, right, chosen == right, sums, likeliest_normalized == right)


def encode_answers(
    tokenizer, example: Example, answers: Sequence[str], form: str, prompt: PromptFormat | None = None
) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of the context and of each answer, with the ids that training has for the same text.

    The context is the prompt and the beginning of the form, as far as its tokens are those of all answers. So all
    answers are compared after the same tokens.

    Args:
        tokenizer: The model's tokenizer.
        example: The example.
        answers: The answers.
        form: The text of an answer, with {} in its place.
        prompt: The format of prompts. None uses the tokenizer's chat template.

    Returns:
        Context and continuation for each answer.
    """
    start = rendered_prompt(tokenizer, example.prompt_for(prompt or PromptFormat()), example.tools)
    before, after = form.split("{}")
    texts = [start.text, start.text + before, *(start.text + before + answer + after for answer in answers)]
    cuts = (*start.prompts, len(start.text))
    rows = encode_rendered(tokenizer, [Rendered(text, cuts, begin=start.begin) for text in texts])
    question, context, *wholes = [ids for ids, _ in rows]
    shared = max(len(question), min(in_common(context, whole) for whole in wholes))
    return [(whole[:shared], whole[shared:]) for whole in wholes]


# ---- log-probabilities of continuations ------------------------------------------------------------------


@dataclass
class _Sequence:
    """One row of a forward pass, and the pairs that read it."""

    ids: tuple[int, ...]
    pairs: list[int]


def continuation_logprobs(
    model,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int,
    padding: int = 0,
    title: str = "evaluating",
) -> list[list[float]]:
    """Return the natural log-probability of each token of continuations, each after its context.

    Args:
        model: A causal language model, with or without an attached adapter.
        pairs: Token ids of each context, at least one, and of its continuation.
        batch_size: Number of sequences in a forward pass.
        padding: The token id to pad with. Padding is masked.
        title: The label of the progress bar, which is shown only in a terminal.

    Returns:
        For each pair a number for each token of the continuation, computed in float32.

    Example:
        >>> from s2ft.text.likelihood import continuation_logprobs
        >>> ((first, second),) = continuation_logprobs(model, [([5, 6, 7], [8, 9])], batch_size=1)
        >>> expected = model(torch.tensor([[5, 6, 7, 8]])).logits.log_softmax(-1)[0, 2:]
        >>> torch.allclose(torch.tensor([first, second]), expected[[0, 1], [8, 9]])
        True
    """
    from tqdm.auto import tqdm

    same_length = rows_interact(model.config.get_text_config())  # the length of a batch changes what its rows compute
    sequences = _sequences(pairs, share=not same_length)
    found: list[list[float]] = [[] for _ in pairs]
    with generation_mode(model), tqdm(total=len(sequences), desc=title, dynamic_ncols=True, disable=None) as bar:
        for batch in _batches(sequences, batch_size, same_length):
            for pair, values in _run(model, pairs, batch, padding):
                found[pair] = values
            bar.update(len(batch))
    return found


def _sequences(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], share: bool) -> list[_Sequence]:
    """The sequences to run, longest first. A sequence that another one begins with is not run by itself."""
    inputs: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if continuation:
            inputs.setdefault((*context, *continuation[:-1]), []).append(number)
    ordered = sorted(inputs)  # what begins with a sequence comes right after it
    sequences: list[_Sequence] = []
    for ids in reversed(ordered):
        if share and sequences and sequences[-1].ids[: len(ids)] == ids:
            sequences[-1].pairs += inputs[ids]
        else:
            sequences.append(_Sequence(ids, list(inputs[ids])))
    return sorted(sequences, key=lambda one: -len(one.ids))


def _batches(sequences: Sequence[_Sequence], size: int, same_length: bool) -> Iterator[list[_Sequence]]:
    batch: list[_Sequence] = []
    for sequence in sequences:
        if len(batch) == size or (same_length and batch and len(batch[0].ids) != len(sequence.ids)):
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def _run(model, pairs, batch: Sequence[_Sequence], padding: int) -> Iterator[tuple[int, list[float]]]:
    """Run one batch. Yields the number of each pair that reads it, and its log-probabilities."""
    longest = max(len(one.ids) for one in batch)
    input_ids = torch.full((len(batch), longest), padding)
    mask = torch.zeros_like(input_ids)
    reads: list[tuple[int, int, int]] = []  # row, position, and the token that follows
    for row, one in enumerate(batch):
        input_ids[row, : len(one.ids)] = torch.tensor(one.ids)
        mask[row, : len(one.ids)] = 1
        for pair in one.pairs:
            context, continuation = pairs[pair]
            reads += [(row, len(context) - 1 + place, token) for place, token in enumerate(continuation)]
    rows, positions, tokens = (torch.tensor(column, device=model.device) for column in zip(*reads))
    with _output_at(model, rows, positions) as ran:
        output = model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    logits = output.logits[0] if ran else output.logits[rows, positions]
    parts = zip(logits.split(PART), tokens.split(PART))
    values = (value for part, chosen in parts for value in _logprobs(part, chosen))
    for one in batch:
        for pair in one.pairs:
            yield pair, [next(values) for _ in pairs[pair][1]]


def _logprobs(logits: Tensor, tokens: Tensor) -> list[float]:
    logits = logits.float()
    return (logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)).tolist()


@contextlib.contextmanager
def _output_at(model, rows: Tensor, positions: Tensor) -> Iterator[list[bool]]:
    """Let the output layer run at some positions only; its output then has the shape [1, positions, vocabulary].

    Yields a list that is empty if the model does not call its output layer as a module.
    """
    ran: list[bool] = []

    def pick(module, inputs):
        ran.append(True)
        return (inputs[0][rows, positions][None], *inputs[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield ran
    finally:
        hook.remove()
