"""`python -m s2ft`, the same as the command `s2ft`, which torchrun and accelerate can launch as a module."""

import sys

from s2ft.cli.main import main

sys.exit(main())
