"""`python -m s2ft`, the same as the command `s2ft`."""

import sys

from s2ft.cli.main import main

sys.exit(main())
