"""The device of a command."""

import logging

import torch

logger = logging.getLogger(__name__)


def gpu_or_cpu() -> torch.device:
    """Return the GPU if there is one, else the CPU, and log the latter."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say_device(device)
    return device


def say_device(device: torch.device) -> None:
    """Log that the command runs on the CPU because PyTorch finds no GPU."""
    if device.type == "cpu":
        logger.info("running on the CPU: PyTorch %s finds no GPU", torch.__version__)
