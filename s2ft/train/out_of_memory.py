"""The error of a run for which memory was too small. Nothing here imports PyTorch, so that the command stays quick."""

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
