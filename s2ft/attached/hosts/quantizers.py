"""What transformers' Trainer asks of a quantized model.

It takes one that trains adapters of PEFT, and else one whose quantizer says that the model can be trained as it is.
That is for transformers to say of the bytes; while trainable layers stand beside them, and gradients pass, it holds.
"""

from functools import cache

from torch import nn

KNOWN = ("bitsandbytes", "torchao")  # whose layers were looked at, whether a gradient passes them


def allow_training(model: nn.Module) -> None:
    """Have the model's quantizer, if it has one, say that the model can be trained."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method in KNOWN:
        quantizer.__class__ = _that_trains(type(quantizer))


def restore_quantizer(model: nn.Module) -> None:
    """Have it say what it said before."""
    quantizer = getattr(model, "hf_quantizer", None)
    if hasattr(quantizer, "s2ft_original"):
        quantizer.__class__ = quantizer.s2ft_original


@cache
def _that_trains(kind: type) -> type:
    if hasattr(kind, "s2ft_original"):
        return kind
    return type(
        kind.__name__,
        (kind,),
        {
            "is_trainable": True,
            "is_qat_trainable": True,
            "s2ft_original": kind,
            "__reduce__": lambda self: (_again, (kind,), self.__dict__),
        },
    )  # found by no name, for copies and files


def _again(kind: type):
    made = _that_trains(kind)
    return made.__new__(made)
