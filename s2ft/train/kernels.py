"""Kernels of other packages for the frozen layers around the trained slices: Liger-Kernel's norms and rotary positions.

The FFN and the loss stay those of s2ft. Its FFN keeps as little for the backward as Liger's and runs trainable layers,
also those of experts, and its loss computes logits only where a label stands.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from s2ft.attached.hosts.compiled import unwrapped
from s2ft.packages import check_packages
from s2ft.train.options import KERNELS

LEFT_TO_S2FT = ("swiglu", "geglu", "relu_squared", "cross_entropy", "fused_linear_cross_entropy")
WAY_OUT = "leave out --kernels liger"
# What Liger-Kernel has replaced in modules of transformers: the original and the new value by module and name.
_replaced: dict[tuple[str, str], tuple[object, object]] = {}


def check_kernels(name: str) -> None:
    """Check that kernels can run here, before a model is loaded.

    Args:
        name: One of KERNELS.

    Raises:
        ValueError: The name is unknown, or there is no GPU for the kernels.
        MissingPackages: Their package is not installed.
    """
    if name not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, got {name!r}")
    if name == "s2ft":
        return
    check_packages("kernels liger", WAY_OUT)
    # Triton's interpreter runs kernels on the CPU, thousands of times slower, for tests.
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"kernels liger need a GPU, and PyTorch finds none here: {WAY_OUT}")


def apply_kernels(model, name: str) -> None:
    """Let the frozen layers of a model run on kernels of another package. It may be attached before or after.

    A model whose couplings are found by trials is attached before, since the trials run on the CPU.

    Liger-Kernel works on a GPU. Its rotary positions replace a function of transformers, so that other models of the
    same type in this process run on them too; its norms are those of this model only.

    Args:
        model: A model of transformers. Its device is the one to train on, or will be.
        name: "s2ft" changes nothing. "liger" takes norms and rotary positions from the package liger-kernel.

    Raises:
        ValueError: The name is unknown, or Liger-Kernel has nothing for this type of model, or there is no GPU.
        MissingPackages: The package liger-kernel is not installed.

    Example:
        >>> from s2ft.train.kernels import apply_kernels
        >>> apply_kernels(model, "s2ft")
    """
    check_kernels(name)
    if name == "s2ft":
        return
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    model = unwrapped(model)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"kernels liger: Liger-Kernel has none for models of type {kind!r}, only for "
            f"{', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}: {WAY_OUT}"
        )
    names = {type(layer).__module__ for layer in model.modules()}
    modules = [sys.modules[name] for name in sorted(names) if name.startswith("transformers.models.")]
    before = {module.__name__: dict(vars(module)) for module in modules}
    _apply_liger_kernel_to_instance(model=model, **dict.fromkeys(LEFT_TO_S2FT, False))
    for module in modules:
        _keep_functions_only(module, before[module.__name__])


def _keep_functions_only(module: ModuleType, before: dict[str, object]) -> None:
    """Restore the classes that were replaced in a module: the model has its norms, and later models are loaded plain.

    A replaced function stays, since the model's attention finds it by its name.
    """
    for name, original in before.items():
        new = getattr(module, name, original)
        if new is original:
            continue
        if isinstance(original, type):
            setattr(module, name, original)
        else:
            _replaced[module.__name__, name] = original, new


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Undo inside the context what Liger-Kernel has replaced in transformers, for models without data such as those of
    an estimate."""
    for (module, name), (original, _) in _replaced.items():
        setattr(sys.modules[module], name, original)
    try:
        yield
    finally:
        for (module, name), (_, new) in _replaced.items():
            setattr(sys.modules[module], name, new)
