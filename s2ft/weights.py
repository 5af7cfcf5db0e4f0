"""The tensors behind a projection, whatever holds them, as outputs × inputs.

Linear layers and convolutions have (O, I, ...) weights; transformers' Conv1D has (I, O); experts are stacked,
[experts, O, I], in a parameter of their own. Everything else asks here.
"""
from typing import List, Optional, Union

import torch
from torch import Tensor, nn

from s2ft.coupling import Coupling, Projection


def find(model: nn.Module, path: str) -> Union[nn.Module, Tensor]:
    """The module, parameter or buffer of this name. Raises: AttributeError where there is none."""
    parent, _, name = path.rpartition(".")
    found = getattr(model.get_submodule(parent), name)
    if not isinstance(found, (nn.Module, Tensor)):
        raise AttributeError(f"{path} is neither a module nor a tensor")
    return found


def is_conv1d(module) -> bool:
    """Whether this is the linear layer of GPT-2, whose weight is stored as inputs × outputs."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_quantized(module) -> bool:
    """Whether this is a linear layer of bitsandbytes, or one whose weight is a quantized tensor of torchao."""
    return _bitsandbytes(module) is not None or (
        type(module) is nn.Linear and type(module.weight.data).__module__.startswith("torchao."))


def _bitsandbytes(module) -> Optional[str]:
    name = type(module).__name__
    return name if type(module).__module__.startswith("bitsandbytes.") and name in ("Linear4bit", "Linear8bitLt") else None


def dequantized(module: nn.Module) -> Tensor:
    """The weight of a quantized linear layer in floating point, [O, I], as a copy."""
    weight, kind = module.weight.data, _bitsandbytes(module)
    if kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit   # only where such a layer is
        if module.weight.quant_state is None:
            raise ValueError("a Linear4bit is not quantized yet: move the model to its device first")
        return dequantize_4bit(weight, module.weight.quant_state)
    if kind == "Linear8bitLt":
        scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB   # the first forward moves it
        if scale is None:
            raise ValueError("a Linear8bitLt is not quantized yet: move the model to its device first")
        return weight.float() * (scale.float() / 127)[:, None]
    return weight.dequantize()


def shape_of(model: nn.Module, projection: Projection) -> torch.Size:
    """Of :func:`matrix_of`, without dequantizing anything."""
    found = find(model, projection.path)
    if is_quantized(getattr(found, "linear", found)):
        return torch.Size((found.out_features, found.in_features))
    return matrix_of(model, projection).shape


def weight_of(model: nn.Module, projection: Projection) -> Tensor:
    """The parameter as it is stored, all experts of it."""
    found = find(model, projection.path)
    return found.weight if isinstance(found, nn.Module) else found


def as_matrix(weight: Tensor, expert: Optional[int] = None, transposed: bool = False) -> Tensor:
    """A view [O, I], or [O, I, taps] of a convolution's weight [O, I, ...]."""
    weight = weight if expert is None else weight[expert]
    if transposed:
        return weight.t()
    return weight.view(*weight.shape[:2], -1) if weight.dim() > 2 else weight


def matrix_of(model: nn.Module, projection: Projection) -> Tensor:
    """The projection's weight as :func:`as_matrix` has it, detached, in the weight's own memory; of a quantized one
    a dequantized copy."""
    found = find(model, projection.path)
    found = getattr(found, "linear", found)   # of an S2QuantizedLinear
    if is_quantized(found):
        return dequantized(found).detach()
    return like_matrix(model, projection, weight_of(model, projection).detach())


def like_matrix(model: nn.Module, projection: Projection, tensor: Tensor) -> Tensor:
    """The view that :func:`matrix_of` takes of the weight, of a tensor of the weight's shape, its gradient say."""
    found = find(model, projection.path)
    return as_matrix(tensor, projection.expert, is_conv1d(found) or getattr(found, "transposed", False))


def bias_of(model: nn.Module, projection: Projection) -> Optional[Tensor]:
    """[O], where the layer has one; it moves with a producer's outputs."""
    return getattr(find(model, projection.path), "bias", None)


def moving_tensors(model: nn.Module, coupling: Coupling) -> List[Tensor]:
    """What a new order of the coupling's units is written to."""
    tensors = [find(model, vector.path) for vector in coupling.vectors]
    for projection in coupling.projections:
        bias = bias_of(model, projection) if projection.dim == 0 else None
        tensors += [weight_of(model, projection)] + ([] if bias is None else [bias])
    return tensors


def put(model: nn.Module, path: str, thing: Union[nn.Module, nn.Parameter], position: Optional[int] = None) -> None:
    """Put a module or parameter in the place of what has this name; a parameter at `position` of its owner's."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(thing, nn.Module):
        owner._parameters.pop(name, None)
        owner.register_module(name, thing)
        return
    del owner._modules[name]
    owner.register_parameter(name, thing)
    for other in [other for other in owner._parameters if other != name][position:]:
        owner._parameters[other] = owner._parameters.pop(other)


def position(model: nn.Module, path: str) -> int:
    """Where a parameter stands among its owner's, so that it can come back there."""
    parent, _, name = path.rpartition(".")
    return list(model.get_submodule(parent)._parameters).index(name)
