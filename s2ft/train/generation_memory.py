"""Out of memory while answers are generated: what the weights and the keys and values take, and which switch helps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from s2ft.attached.hosts.compiled import unwrapped
from s2ft.estimation.memory import free_memory, resident
from s2ft.estimation.result import size
from s2ft.train.out_of_memory import OutOfMemory, first_line, is_out_of_memory


@contextmanager
def explain_generation(model: nn.Module, batch: int, tokens: int, beams: int = 1) -> Iterator[None]:
    """Turn an out-of-memory error inside the context into one that says which switch helps.

    Args:
        model: The model. It may be moved to a device in the context.
        batch: Answers that are generated at once.
        tokens: Tokens of the longest answer. 0 if nothing is generated.
        beams: Beams of an answer.

    Raises:
        OutOfMemory: Memory was too small.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory: {first_line(error)}", _advice(unwrapped(model), batch, tokens, beams)
        ) from error


def _advice(model: nn.Module, batch: int, tokens: int, beams: int) -> list[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    one = cache_bytes(model, tokens) if tokens else None
    cache = None if one is None else one * beams
    free = free_memory(device)
    there = "" if free is None else f"; {size(free + resident(model, device))} are there for both"
    lines = [f"the weights take {size(weights)}{_of_answers(cache, batch, tokens)}{there}"]
    if batch > 1:
        fewer = max(1, batch // 4)
        lines.append(f"  --batch-size {fewer}{_keeps(cache, fewer)}")
    if beams > 1:
        lines.append(f"  --num-beams 1{_keeps(one, batch)}; the answers are then greedy")
    if next(model.parameters()).dtype == torch.float32:
        lines.append(f"  --dtype bfloat16: {size(weights // 2)} of weights, and answers may differ by rounding")
    if tokens > 1:
        lines.append(f"  --max-new-tokens {tokens // 2}{_keeps(cache, batch / 2)}")
    return lines


def _keeps(cache: int | None, answers: float) -> str:
    return "" if cache is None else f": {size(int(cache * answers))} of keys and values"


def _of_answers(cache: int | None, batch: int, tokens: int) -> str:
    if cache is None:
        return ""
    answers = f"{batch} answers" if batch > 1 else "an answer"
    return f", the keys and values of {answers} of {tokens:,} tokens {size(cache * batch)}, and prompts add to them"


def cache_bytes(model: nn.Module, tokens: int) -> int | None:
    """Return the bytes of the keys and values of one sequence, or None if the config does not say their sizes.

    Args:
        model: The model.
        tokens: Tokens of the sequence.
    """
    config = model.config.get_text_config()
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if not layers or not heads:
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    return 2 * layers * shared * width * tokens * next(model.parameters()).dtype.itemsize
