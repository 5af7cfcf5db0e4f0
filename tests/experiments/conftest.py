"""The experiments are not part of the package: their folder is in the root of the repository."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)  # last, so that the s2ft under test stays the one that is found first
