"""The error of a run for which memory was too small. Nothing here imports PyTorch, so that the command stays quick."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# in messages of PyTorch, whose CPU allocator raises a plain RuntimeError
MESSAGES = ("DefaultCPUAllocator", "not enough memory", "CUDA out of memory", "out of memory")


class OutOfMemory(MemoryError):
    """Memory was too small. The message says what failed, and its further lines what to change.

    Args:
        reason: What failed.
        advice: Lines with the changes that help.
        kept: What the run has kept, or "".
    """

    def __init__(self, reason: str, advice: list[str], kept: str = "") -> None:
        self.reason, self.advice, self.kept = reason, advice, kept
        super().__init__("\n".join([reason, *advice, *([kept] if kept else [])]))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory was too small: Python's, or one of PyTorch's allocators."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in MESSAGES)


def first_line(error: BaseException) -> str:
    """Return the first sentence of an allocator's message, which goes on with statistics and settings.

    The CPU allocator begins with the place in PyTorch's source, which is left out.
    """
    text = str(error).strip().split("\n")[0]
    text = text[text.index("DefaultCPUAllocator") :] if "DefaultCPUAllocator" in text else text
    return text.split(" GPU ")[0].strip().rstrip(".") or type(error).__name__


@contextmanager
def explain_out_of_memory(switch: str, kept: Callable[[], str] = str) -> Iterator[None]:
    """Turn an out-of-memory error inside the context into one that says what is free and which switch helps most.

    Args:
        switch: The options to give.
        kept: Returns a sentence about what the run has kept.

    Raises:
        OutOfMemory: Memory was too small.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory: {first_line(error)}{_free()}; {switch} needs less", [], kept()) from error


def _free() -> str:
    import torch

    from s2ft.estimation.memory import free_memory
    from s2ft.estimation.result import size

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = free_memory(device)
    return "" if free is None else f"; {size(free)} are free on {device}"


def smaller_answers(batch: int, dtype: str) -> str:
    """Return the options with which generated answers take less memory.

    Args:
        batch: Answers that are generated at once.
        dtype: Dtype of the weights.
    """
    if batch > 1:
        return f"--batch-size {max(1, batch // 4)}"
    return "--dtype bfloat16" if dtype == "torch.float32" else "a smaller --max-new-tokens"
