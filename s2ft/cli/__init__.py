"""The `s2ft` command."""

from s2ft.cli.main import main

__all__ = ["main"]
