"""Linear layers that train a few outputs or inputs beside a quantized weight, which does not change."""

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft.codecs.codec import Codec
from s2ft.foreign import check_mentioned
from s2ft.layers.base import S2Layer
from s2ft.layers.linear import Kind

NO_FUSE = (
    "an adapter can't be written into a quantized weight without quantizing it again: load it with trainable=True, "
    "which adds it in the forward, or load it on the unquantized base, or on the dequantized one (bitsandbytes: "
    "model.dequantize(), which gives the numbers it was trained with), by s2ft.load_adapter, and merge there"
)


def quantized_forward(
    module: Any,  # the quantized layer
    x: Tensor,  # [..., I]
    delta: Tensor,  # [n, I] if dim == 0 else [O, n]
    index: Tensor,  # [n] int64
    dim: int,
) -> Tensor:  # [..., O]
    """Run a quantized layer and add the product with the delta. Hooks on the layer are not run."""
    y, delta = module.forward(x), delta.to(x.dtype)
    if dim == 0:
        return y.index_add(-1, index, F.linear(x, delta).to(y.dtype))
    return y + F.linear(x.index_select(-1, index), delta).to(y.dtype)


class S2QuantizedLinear(S2Layer):
    """What S2QuantizedColumn and S2QuantizedRow share: the quantized layer's output plus the product with `s2`.

    The layer computes with the dequantized weight plus `s2` in the selected units. `linear` is the quantized layer.
    """

    linear: Any

    @property
    def kind(self) -> Kind:
        return next(kind for kind in QUANTIZED if kind.matches(self.linear))

    def _share(self, module: Any) -> None:
        # Hooks registered on the module see this layer's output, because forward runs the module without them. Those of
        # its state stay with it alone.
        self.__dict__.update({key: value for key, value in vars(nn.Module()).items() if "state_dict" in key})
        self.linear = module
        self.in_features, self.out_features = module.in_features, module.out_features

    def take_over(self, module: nn.Module) -> None:
        """Change nothing: this layer runs the quantized one, which keeps its weight and bias."""

    def give_back(self, module: nn.Module) -> None:
        """Change nothing."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The quantized weight."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.linear.bias

    def forward(self, input: Tensor) -> Tensor:
        """Run the layer: input [..., in_features] → output [..., out_features]."""
        if not self.enabled:
            return self.linear.forward(input)
        delta = self.s2 if self.rounding is None else self.rounding(self.s2) - self.rounding.base
        return quantized_forward(self.linear, input, delta, self.selected_units(), self.dim)


class S2QuantizedColumn(S2QuantizedLinear):
    """Quantized linear layer that trains outputs."""

    dim = 0


class S2QuantizedRow(S2QuantizedLinear):
    """Quantized linear layer that trains inputs. For the backward of `s2` it keeps the selected part of its input."""

    dim = 1


class QuantizedKind(Kind, ABC):
    """What the kinds of quantized linear layers share. `holder` may be the trainable layer around the plain one."""

    layers = (S2QuantizedColumn, S2QuantizedRow)
    is_linear = True
    read_only = NO_FUSE

    def shape(self, holder: Any, expert: int | None = None) -> torch.Size:
        return torch.Size((holder.out_features, holder.in_features))

    def matrix(self, holder: Any, expert: int | None = None) -> Tensor:
        return self.dequantized(plain_of(holder)).detach()

    @abstractmethod
    def dequantized(self, module: Any) -> Tensor:
        """A copy of the weight in floating point, [outputs, inputs]."""

    def dtype_name(self, module: nn.Module) -> str:
        return f"quantized {type(plain_of(module)).__name__}"

    def delta_dtype(self, module: nn.Module) -> torch.dtype:
        return torch.float32  # the weight's own dtype is that of bytes, which have no gradient

    def run_with_delta(self, module: nn.Module, x: Tensor, delta: Tensor, index: Tensor, dim: int) -> Tensor:
        return quantized_forward(module, x, delta, index, dim)


def plain_of(module: nn.Module) -> Any:
    """Return the quantized layer, given it or the trainable layer around it."""
    return module.linear if isinstance(module, S2QuantizedLinear) else module


def _is_of_bitsandbytes(module: Any, name: str) -> bool:
    return type(module).__name__ == name and type(module).__module__.startswith("bitsandbytes.")


class Linear4bitKind(QuantizedKind):
    """Linear4bit of bitsandbytes. It may repack its weight, see :func:`s2ft.model.weights.layers_that_repack`."""

    name = "Linear4bit of bitsandbytes"

    def matches(self, found: Any) -> bool:
        return _is_of_bitsandbytes(found, "Linear4bit")

    def dequantized(self, module: Any) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit  # installed, because the layer is of that package

        if module.weight.quant_state is None:
            raise ValueError("a Linear4bit is not quantized yet: move the model to its device first")
        packed = (module.weight.data, module.weight.quant_state)
        return dequantize_4bit(*(_unpacked(module) if _is_packed(module) else packed))

    def shared(self, module: nn.Module) -> list[Any]:
        found = (getattr(module.weight, "quant_state", None), getattr(module, "quant_state", None))
        return [state for state in found if state is not None]

    def scales(self, module: nn.Module) -> list[Tensor]:
        states = self.shared(module)
        states += [state.state2 for state in states if state.state2 is not None]
        return [tensor for state in states for tensor in vars(state).values() if isinstance(tensor, Tensor)]


def unpack(layer: Any) -> None:
    """Store the weight of a Linear4bit layer as it was loaded, if the layer has repacked it."""
    if _is_packed(layer):
        layer.weight.data, layer.weight.quant_state = _unpacked(layer)
        layer.quant_state = layer.weight.quant_state


def _is_packed(module: Any) -> bool:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu as pack

    check_mentioned(pack, "packing_format_for_cpu", "bitsandbytes", "weights that are repacked for the CPU")
    return getattr(module.weight.quant_state, "packing_format_for_cpu", False)


def _unpacked(module: Any) -> tuple[Tensor, Any]:
    """The bytes and the quant_state of a packed Linear4bit before it was packed, with scales rounded to bfloat16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

    state = copy.copy(module.weight.quant_state)
    state.original_nested = False  # scales stay unquantized: quantizing them again would change them
    state.state2 = state.offset = None
    scales = state.absmax.t().reshape(-1).float()  # unpack does not change them
    data, state = unpack(module.weight.data, state)
    state.absmax = scales
    return data, state


class Linear8bitKind(QuantizedKind):
    """Linear8bitLt of bitsandbytes with frozen weights (has_fp16_weights=False)."""

    name = "Linear8bitLt of bitsandbytes"

    def matches(self, found: Any) -> bool:
        return _is_of_bitsandbytes(found, "Linear8bitLt") and not found.state.has_fp16_weights

    def dequantized(self, module: Any) -> Tensor:
        scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB  # the first forward moves it
        if scale is None:
            raise ValueError("a Linear8bitLt is not quantized yet: move the model to its device first")
        return module.weight.data.float() * (scale.float() / 127)[:, None]

    def shared(self, module: nn.Module) -> list[Any]:
        return [value for value in self.state(module).values() if isinstance(value, Tensor)]

    def state(self, module: nn.Module) -> dict[str, Any]:
        return vars(plain_of(module).state)

    def scales(self, module: nn.Module) -> list[Tensor]:
        return [one for one in (self.state(module).get("SCB"), vars(module.weight).get("SCB")) if one is not None]


class TorchaoKind(QuantizedKind):
    """nn.Linear with a quantized tensor of torchao as its weight."""

    name = "nn.Linear with a weight of torchao"

    def matches(self, found: Any) -> bool:
        return type(found) is nn.Linear and type(found.weight.data).__module__.startswith("torchao.")

    def dequantized(self, module: Any) -> Tensor:
        return module.weight.data.dequantize()

    def dtype_name(self, module: nn.Module) -> str:
        return f"quantized {type(module.weight).__name__}"

    def passes_gradient(self, module: Any) -> bool:
        # A layer that quantizes its input too passes none, and PyTorch gives no error.
        weight = module.weight
        x = torch.zeros(1, module.in_features, dtype=weight.dtype, device=weight.device, requires_grad=True)
        with torch.enable_grad():
            return F.linear(x, weight.detach()).requires_grad


# ---- blocks of a file -----------------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A frozen linear layer with a packed weight. It computes in the dtype of its input.

    Attributes:
        weight: The blocks of each output, [outputs, bytes] uint8.
        bias: [outputs], or None.
    """

    def __init__(self, codec: Codec, weight: Tensor, in_features: int, bias: Tensor | None = None) -> None:
        """Make a layer.

        Args:
            codec: The codec of the weight.
            weight: The blocks of each output, [outputs, bytes] uint8.
            in_features: Number of inputs.
            bias: [outputs], or None.
        """
        super().__init__()
        self.codec, self.in_features, self.out_features = codec, in_features, weight.shape[0]
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Run the layer: input [..., in_features] → output [..., out_features]."""
        return _UnpackedProduct.apply(input, self)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight [outputs, inputs] in a floating-point dtype."""
        return self.codec.decode(self.weight.detach()).to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, codec={self.codec.name}"


class _UnpackedProduct(torch.autograd.Function):
    """A product that keeps neither its input nor the unpacked weight for the backward."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.unpacked(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.unpacked(grad.dtype), None


class PackedKind(QuantizedKind):
    """A linear layer in the blocks of a GGUF file."""

    name = "PackedLinear"

    def matches(self, found: Any) -> bool:
        return isinstance(found, PackedLinear)

    def dequantized(self, module: nn.Module) -> Tensor:
        return plain_of(module).unpacked(torch.float32)

    def dtype_name(self, module: nn.Module) -> str:
        return f"quantized {plain_of(module).codec.name}"


QUANTIZED = (Linear4bitKind(), Linear8bitKind(), TorchaoKind(), PackedKind())
