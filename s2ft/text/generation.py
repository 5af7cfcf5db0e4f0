"""Greedy generation and beam search in batches."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from s2ft.model.modes import evaluation_mode
from s2ft.text.encoding import left_pad
from s2ft.text.prompts import end_ids, pad_id

# The generation_config of some checkpoints has other values for chats. They would hold for every value left open here.
PLAIN = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "min_length": 0,
    "num_return_sequences": 1,
}


def generate(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
    title: str = "generating",
    num_beams: int = 1,
) -> list[str]:
    """Answer prompts greedily or by beam search. Nothing is drawn, so that a call can be repeated.

    Penalties in the checkpoint's generation_config are not applied; its end tokens are.

    The longest prompts are answered first. The prompts of a batch then have similar lengths, and a batch that does
    not fit into memory fails at the start.

    Args:
        model: A causal language model, with or without an attached adapter.
        tokenizer: The model's tokenizer.
        prompts: Token ids of each prompt.
        batch_size: Number of prompts that are generated at once.
        max_new_tokens: Longest answer in tokens. A longer one is cut.
        title: The label of the progress bar, which is shown only in a terminal.
        num_beams: Number of beams. 1 is greedy. More beams keep so many beginnings of each answer, and the answer
            with the highest mean log-probability of a token is returned, as in transformers' beam search.

    Returns:
        The answers in the order of the prompts, without special tokens and outer white space.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from s2ft.text.generation import generate
        >>> texts = generate(model, ByT5Tokenizer(), [[5, 6, 7], [8]], batch_size=2, max_new_tokens=4)
        >>> len(texts)
        2
    """
    from tqdm.auto import tqdm

    with generation_mode(model), tqdm(total=len(prompts), desc=title, dynamic_ncols=True, disable=None) as bar:
        answers = answer_ids(model, tokenizer, prompts, batch_size, max_new_tokens, num_beams, bar.update)
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def answer_ids(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    on_batch: Callable[[int], Any] = int,
) -> list[list[int]]:
    """Return the token ids of answers, in the order of the prompts, with the end token and the padding after it.

    Args:
        model: As in :func:`generate`. Its modes are the caller's.
        tokenizer: As in :func:`generate`.
        prompts: As in :func:`generate`.
        batch_size: As in :func:`generate`.
        max_new_tokens: As in :func:`generate`.
        num_beams: As in :func:`generate`.
        on_batch: Called with the number of prompts of each batch, when they are answered.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        **PLAIN,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=end_ids(tokenizer, model.generation_config),
    )
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    answers: dict[int, list[int]] = {}
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        batch = left_pad([prompts[number] for number in numbers], pad_id(tokenizer))
        # model.generate computes the positions from the mask
        batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        output = model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :]
        answers.update(zip(numbers, output.tolist()))
        on_batch(len(numbers))
    return [answers[number] for number in range(len(prompts))]


@contextlib.contextmanager
def generation_mode(model) -> Iterator[None]:
    """Evaluation mode without gradients. Afterwards the modes of all modules are restored."""
    with evaluation_mode(model), torch.inference_mode(), contiguous_head(model):
        yield


@contextlib.contextmanager
def contiguous_head(model) -> Iterator[None]:
    """Make the input of the model's output layer contiguous inside the context.

    Models pass the positions whose logits are requested as a view with gaps. If the weight is frozen, torch computes
    such a view as a batched product and copies the weight once for each row of the batch: 5.4 GiB for 104 rows of a
    model with 135M parameters.

    Args:
        model: A language model of transformers.

    Example:
        >>> with s2ft.text.generation.contiguous_head(model):
        ...     model(input_ids, logits_to_keep=1).logits.shape
        torch.Size([2, 1, 96])
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: (inputs[0].contiguous(), *inputs[1:])
    )
    try:
        yield
    finally:
        hook.remove()
