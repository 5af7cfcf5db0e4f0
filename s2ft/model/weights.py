"""The tensors behind a projection, whatever holds them, as outputs × inputs.

Linear layers and convolutions have (O, I, ...) weights; transformers' Conv1D has (I, O); experts are stacked,
[experts, O, I], in a parameter of their own. Everything else asks here.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import ContextManager

import torch
from torch import Tensor, nn

from s2ft.distributed import Shard, gathered_parameter, is_dtensor, is_partitioned, own_shard
from s2ft.model.coupling import Coupling, Projection


def find(model: nn.Module, path: str) -> nn.Module | Tensor:
    """The module, parameter or buffer of this name. Raises: AttributeError where there is none."""
    module = model
    for name in path.split("."):  # faster than get_submodule, for a switch of adapters asks for every layer
        module = module._modules.get(name)
        if module is None:
            break
    else:
        return module
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
        type(module) is nn.Linear and type(module.weight.data).__module__.startswith("torchao.")
    )


def _bitsandbytes(module) -> str | None:
    name = type(module).__name__
    if not type(module).__module__.startswith("bitsandbytes.") or name not in ("Linear4bit", "Linear8bitLt"):
        return None
    return None if name == "Linear8bitLt" and module.state.has_fp16_weights else name  # such weights train


def dequantized(module: nn.Module) -> Tensor:
    """The weight of a quantized linear layer in floating point, [O, I], as a copy."""
    weight, kind = module.weight.data, _bitsandbytes(module)
    if kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit  # only where such a layer is

        if module.weight.quant_state is None:
            raise ValueError("a Linear4bit is not quantized yet: move the model to its device first")
        return dequantize_4bit(*(_unpacked(module) if _is_packed(module) else (weight, module.weight.quant_state)))
    if kind == "Linear8bitLt":
        scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB  # the first forward moves it
        if scale is None:
            raise ValueError("a Linear8bitLt is not quantized yet: move the model to its device first")
        return weight.float() * (scale.float() / 127)[:, None]
    return weight.dequantize()


def passes_gradient(module: nn.Module) -> bool:
    """Whether the gradient of a quantized linear layer's output comes to its input. With torchao's that quantize
    their inputs too it does not, and nothing says so."""
    if _bitsandbytes(module) is not None:
        return True
    x = torch.zeros(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device, requires_grad=True)
    with torch.enable_grad():
        return nn.functional.linear(x, module.weight.detach()).requires_grad


# ---- Linear4bit on CPUs with AVX512-BF16 -----------------------------------------------------------------
# There the first forward in evaluation mode packs the weight in another way, for a product in bfloat16 that passes no
# gradient, in training mode neither: one evaluation, and training goes wrong silently.


def layers_that_pack(model: nn.Module) -> list[str]:
    """The names of the layers that would be packed, for :func:`stop_packing` and :func:`allow_packing`."""
    return [
        name
        for name, module in model.named_modules()
        if _bitsandbytes(module) == "Linear4bit" and getattr(module, "support_avx512bf16_for_cpu", False)
    ]


def stop_packing(model: nn.Module, names: list[str]) -> None:
    """Unpack what is packed of these layers and have nothing packed from now on."""
    for name in names:
        module = model.get_submodule(name)
        module.support_avx512bf16_for_cpu = False
        if _is_packed(module):
            module.weight.data, module.weight.quant_state = _unpacked(module)
            module.quant_state = module.weight.quant_state


def allow_packing(model: nn.Module, names: list[str]) -> None:
    """Allow these layers to be packed, at their next forward."""
    for name in names:
        model.get_submodule(name).support_avx512bf16_for_cpu = True


def _is_packed(module: nn.Module) -> bool:
    return getattr(module.weight.quant_state, "packing_format_for_cpu", False)


def _unpacked(module: nn.Module) -> tuple:
    """The bytes and the quant_state of a packed Linear4bit as they were, but for scales rounded to bfloat16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

    state = copy.copy(module.weight.quant_state)
    state.original_nested = False  # scales that were quantized stay plain: each further quantization would move them
    state.state2 = state.offset = None
    scales = state.absmax.t().reshape(-1).float()  # unpack leaves them as they are
    data, state = unpack(module.weight.data, state)
    state.absmax = scales
    return data, state


def shape_of(model: nn.Module, projection: Projection) -> torch.Size:
    """Of :func:`matrix_of`, without dequantizing anything."""
    found = find(model, projection.path)
    if is_quantized(getattr(found, "linear", found)):
        return torch.Size((found.out_features, found.in_features))
    weight = weight_of(model, projection)
    shape = getattr(weight, "ds_shape", weight.shape)  # of all of it, where ZeRO-3 holds it
    return as_matrix(torch.empty(shape, device="meta"), projection.expert, _is_transposed(found)).shape


def parameters_of(model: nn.Module) -> int:
    """How many there are; of a weight that is packed, what it stands for."""
    packed = {id(module.weight): module for module in model.modules() if is_quantized(module)}
    return sum(
        packed[id(p)].in_features * packed[id(p)].out_features if id(p) in packed else p.numel()
        for p in model.parameters()
    )


def weight_of(model: nn.Module, projection: Projection) -> Tensor:
    """The parameter as it is stored, all experts of it."""
    found = find(model, projection.path)
    return found.weight if isinstance(found, nn.Module) else found


def as_matrix(weight: Tensor, expert: int | None = None, transposed: bool = False) -> Tensor:
    """A view [O, I], or [O, I, taps] of a convolution's weight [O, I, ...]."""
    weight = weight if expert is None else weight[expert]
    if transposed:
        return weight.t()
    return weight.view(*weight.shape[:2], -1) if weight.dim() > 2 else weight


def matrix_of(model: nn.Module, projection: Projection) -> Tensor:
    """The projection's weight as :func:`as_matrix` has it, detached, in the weight's own memory; of a quantized one
    a dequantized copy."""
    found = find(model, projection.path)
    if type(found) is nn.Linear and type(found.weight) is nn.Parameter:  # nearly all are: no quantized tensor
        return found.weight.detach()
    plain = getattr(found, "linear", found)  # of an S2QuantizedLinear
    if is_quantized(plain):
        return dequantized(plain).detach()
    weight = found.weight if isinstance(found, nn.Module) else found
    return as_matrix(weight.detach(), projection.expert, _is_transposed(found))


def part_of(model: nn.Module, projection: Projection) -> ContextManager[Shard]:
    """What this rank can write of :func:`matrix_of`, in the weight's own memory: all of it, but where it is sharded.

    Under ZeRO-3 every rank must come, and write the same.
    """
    found = find(model, projection.path)
    weight = found.weight if isinstance(found, nn.Module) else found
    if is_partitioned(weight):
        return _opened_matrix(model, projection, weight)
    if is_dtensor(weight):
        return nullcontext(_own_part(found, weight, projection.expert))
    return nullcontext(Shard(matrix_of(model, projection)))


@contextmanager
def _opened_matrix(model: nn.Module, projection: Projection, weight: Tensor) -> Iterator[Shard]:
    with gathered_parameter(weight):
        yield Shard(matrix_of(model, projection))


def _own_part(found, weight: Tensor, expert: int | None) -> Shard:
    part = own_shard(weight)
    matrix, start = part.tensor, part.start
    if expert is not None:
        at = expert - start[0]
        matrix, start = matrix[at] if 0 <= at < matrix.shape[0] else matrix.new_empty(0, *matrix.shape[2:]), start[1:]
    transposed = _is_transposed(found)
    if matrix.numel():
        matrix = as_matrix(matrix, transposed=transposed)
    elif transposed:
        matrix = matrix.t()
    return Shard(matrix, start[1::-1] if transposed else start[:2])


def _is_transposed(found) -> bool:
    return is_conv1d(found) or getattr(found, "transposed", False)


def like_matrix(model: nn.Module, projection: Projection, tensor: Tensor) -> Tensor:
    """The view that :func:`matrix_of` takes of the weight, of a tensor of the weight's shape, its gradient say."""
    found = find(model, projection.path)
    return as_matrix(tensor, projection.expert, _is_transposed(found))


def bias_of(model: nn.Module, projection: Projection) -> Tensor | None:
    """[O], where the layer has one; it moves with a producer's outputs."""
    return getattr(find(model, projection.path), "bias", None)


def tensors_of(model: nn.Module, coupling: Coupling) -> list[Tensor]:
    """What a new order of the coupling's units is written to: weights, biases and vectors."""
    tensors = [find(model, vector.path) for vector in coupling.vectors]
    for projection in coupling.projections:
        bias = bias_of(model, projection) if projection.dim == 0 else None
        tensors += [weight_of(model, projection)] + ([] if bias is None else [bias])
    return tensors


def put(model: nn.Module, path: str, thing: nn.Module | nn.Parameter, position: int | None = None) -> None:
    """Put a module or parameter in the place of what has this name. An interrupt leaves one of the two there.

    Args:
        model: the model.
        path: the name.
        thing: what comes there; being there already is fine.
        position: of a parameter among its owner's.
    """
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(thing, nn.Module):
        owner._modules[name] = thing
        owner._parameters.pop(name, None)
        return
    others = {other: parameter for other, parameter in owner._parameters.items() if other != name}
    ordered = list(others.items())
    ordered.insert(len(ordered) if position is None else position, (name, thing))
    owner._parameters = dict(ordered)  # one step: taking them out and in again could lose one
    owner._modules.pop(name, None)


def position(model: nn.Module, path: str) -> int:
    """Where a parameter stands among its owner's, so that it can come back there."""
    parent, _, name = path.rpartition(".")
    return list(model.get_submodule(parent)._parameters).index(name)
