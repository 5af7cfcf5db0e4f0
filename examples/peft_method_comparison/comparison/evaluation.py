"""Answers GSM8K's problems, and scores the answers."""

import json
import time
from pathlib import Path

from transformers import GenerationConfig

from comparison.answers import is_right
from comparison.clock import Clock
from comparison.settings import TrainingParams
from s2ft.files.writing import replace_file
from s2ft.text.encoding import left_pad
from s2ft.text.generation import generation_mode
from s2ft.text.scoring import TOLERANCE, last_number


def answers(
    model,
    tokenizer,
    pairs: list[tuple[str, str]],
    params: TrainingParams,
    clock: Clock,
    part: str,
    file: Path | None = None,
    reserve: float = 0.0,
) -> list[str]:
    """Let a model answer problems.

    Args:
        model: The model.
        tokenizer: Its tokenizer; the end token pads.
        pairs: Questions and worked answers. Only the questions are used.
        params: Prompt, length, batch and the arguments of the generation.
        clock: Measures the time under `part`, and has the limit.
        part: Name of the part.
        file: File in which the texts are kept, so that an interrupted run goes on. None keeps nothing.
        reserve: Seconds that must be left at the limit.

    Returns:
        The generated text of each problem, without special tokens.

    Raises:
        OutOfTime: The time limit is near; the texts so far are in the file.
    """
    prompts = [params.query_template.format(query=question) for question, _ in pairs]
    encoded = [ids[: params.max_seq_length] for ids in tokenizer(prompts)["input_ids"]]
    texts = json.loads(file.read_text("utf-8"))[: len(pairs)] if file and file.is_file() else []
    longest = 0.0
    while len(texts) < len(encoded):
        clock.check(2 * longest + reserve)
        start = time.perf_counter()
        with clock.part(part):
            texts += _generate(model, tokenizer, encoded[len(texts) : len(texts) + params.batch_size_eval], params)
        longest = max(longest, time.perf_counter() - start)
        if file:
            replace_file(file, json.dumps(texts).encode())
    return texts


def _generate(model, tokenizer, prompts: list[list[int]], params: TrainingParams) -> list[str]:
    end = tokenizer.eos_token_id
    batch = left_pad(prompts, end)
    batch.pop("position_ids")  # model.generate computes the same positions from the mask
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    config = generation_config(params.generation_kwargs, batch["input_ids"].shape[1], end)
    with generation_mode(model):
        output = model.generate(**batch, generation_config=config)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def generation_config(kwargs: dict, length: int, pad: int) -> GenerationConfig:
    """Return the arguments of a generation. Of `max_length` and `max_new_tokens` the smaller limit holds.

    Args:
        kwargs: Arguments of `GenerationConfig`; those that are None are left to the model's own config.
        length: Length of the prompts in tokens.
        pad: Id of the token that pads.

    Returns:
        The arguments.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    if "max_length" in given and "max_new_tokens" in given:
        given["max_length"] = min(given["max_length"], length + given.pop("max_new_tokens"))
    if given.get("do_sample") is False:  # the model's own config may have values for sampling, which warn
        given |= {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
    return GenerationConfig(**given, pad_token_id=pad)


def accuracy(texts: list[str], pairs: list[tuple[str, str]]) -> float:
    """Share of right answers by the rules of PEFT's comparison.

    Args:
        texts: The generated texts.
        pairs: Questions and worked answers, in the same order.

    Returns:
        The share, from 0 to 1.
    """
    return sum(is_right(text, right) for text, (_, right) in zip(texts, pairs, strict=True)) / len(pairs)


def accuracy_of_numbers(texts: list[str], pairs: list[tuple[str, str]]) -> float:
    """Share of texts whose last number is the right one, as `s2ft eval` counts it: 1,200 is 1200.

    Args:
        texts: The generated texts.
        pairs: Questions and worked answers, in the same order.

    Returns:
        The share, from 0 to 1.
    """
    found = [(last_number(text), last_number(right)) for text, (_, right) in zip(texts, pairs, strict=True)]
    return sum(None not in both and abs(both[0] - both[1]) <= TOLERANCE for both in found) / len(pairs)
