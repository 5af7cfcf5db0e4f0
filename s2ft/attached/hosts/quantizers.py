"""Quantized models in transformers' Trainer.

Trainer accepts a quantized model if PEFT trains adapters in it, or if its quantizer reports that it can be trained.
While trainable layers are mounted and gradients pass the quantized ones, that report is right.
"""

from functools import cache

from torch import nn

KNOWN = ("bitsandbytes", "torchao")  # quantizers whose layers are known to pass gradients, or not to


def allow_training(model: nn.Module) -> None:
    """Make the model's quantizer, if it has one, report that the model can be trained."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method in KNOWN:
        quantizer.__class__ = _trainable_class(type(quantizer))


def restore_quantizer(model: nn.Module) -> None:
    """Undo :func:`allow_training`."""
    quantizer = getattr(model, "hf_quantizer", None)
    if hasattr(quantizer, "s2ft_original"):
        quantizer.__class__ = quantizer.s2ft_original


@cache
def _trainable_class(kind: type) -> type:
    """Return a subclass of a quantizer's class that reports that the model can be trained."""
    if hasattr(kind, "s2ft_original"):
        return kind
    return type(
        kind.__name__,
        (kind,),
        {
            "is_trainable": True,
            "is_qat_trainable": True,
            "s2ft_original": kind,
            # The class has no name in a module, so copies and files rebuild it from the original class.
            "__reduce__": lambda self: (_rebuild, (kind,), self.__dict__),
        },
    )


def _rebuild(kind: type) -> object:
    """Make an object of the trainable class of `kind`, without its attributes."""
    made = _trainable_class(kind)
    return made.__new__(made)
