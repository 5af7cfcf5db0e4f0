"""`python -m s2ft.cli`, which torchrun and accelerate can launch as a module."""

import sys

from s2ft.cli.main import main

sys.exit(main())
