"""To be written."""


def install() -> None:
    """Nothing yet."""


def enabled() -> bool:
    """Whether adapters are served as slices. Not yet."""
    return False
