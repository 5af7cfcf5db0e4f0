"""``python -m tests.docs.count``: how many blocks README.md and docs/ have, run and left out, and why."""

from .blocks import blocks_of, pages


def report() -> str:
    """The numbers, then a line for each block that is left out."""
    blocks = [block for page in pages() for block in blocks_of(page)]
    left_out = [block for block in blocks if block.reason]
    numbers = ", ".join(
        f"{language}: {sum(block.language == language for block in blocks)}" for language in ("python", "bash")
    )
    head = f"{len(blocks)} blocks ({numbers}), {len(blocks) - len(left_out)} run, {len(left_out)} left out"
    return "\n".join([head, *(f"{block.page}:{block.line}: {block.language}: {block.reason}" for block in left_out)])


if __name__ == "__main__":
    print(report())
