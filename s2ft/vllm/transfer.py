"""To be written."""


def install() -> None:
    """Nothing yet."""
