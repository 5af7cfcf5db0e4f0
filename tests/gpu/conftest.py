"""The command of bench/gpu imports its modules from its own folder."""

import sys
from pathlib import Path

FOLDER = str(Path(__file__).parents[2] / "bench" / "gpu")
if FOLDER not in sys.path:
    sys.path.append(FOLDER)  # last, so that no module of the tests is hidden
