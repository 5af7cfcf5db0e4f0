"""`python -m s2ft`, the same as the command `s2ft`, which torchrun and accelerate can launch as a module."""

from s2ft.cli.main import entry

entry()
