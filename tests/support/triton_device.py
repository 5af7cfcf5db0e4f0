"""Where the tests of the Triton kernels run: on the CPU in Triton's interpreter, on a GPU without it."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

marks = [
    pytest.mark.triton,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no GPU, and no TRITON_INTERPRET=1"),
    # The interpreter computes with NumPy, which warns about what a GPU does silently.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning"),
]


def kernels():
    """What the dispatcher calls, by op. A failure of a kernel is raised, where a user's call would go on in PyTorch."""
    from s2ft.ops import _triton

    return {op: kernel.launch for op, kernel in _triton.kernels().items()}
