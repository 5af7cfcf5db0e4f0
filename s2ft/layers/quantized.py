"""Linear layers that train a few outputs or inputs beside a quantized weight, which is left as it is."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft.layers.base import S2Layer

NO_FUSE = (
    "a quantized weight can't take an adapter in without being quantized again: put the adapter on the base "
    "unquantized, or dequantized (for bitsandbytes model.dequantize(), the very numbers it was trained with), "
    "by s2ft.load_adapter, and merge there"
)


def quantized_forward(
    module: nn.Module,  # as it was
    x: Tensor,  # [..., I]
    delta: Tensor,  # [n, I] if dim == 0 else [O, n]
    index: Tensor,  # [n] int64
    dim: int,
) -> Tensor:  # [..., O]
    """The output of the quantized `module`, plus the part of the delta; hooks on the module are not run."""
    y, delta = module.forward(x), delta.to(x.dtype)
    if dim == 0:
        return y.index_add(-1, index, F.linear(x, delta).to(y.dtype))
    return y + F.linear(x.index_select(-1, index), delta).to(y.dtype)


class S2QuantizedLinear(S2Layer):
    """What S2QuantizedColumn and S2QuantizedRow share: y = the quantized layer's output plus s2's part, two products.

    The effective weight is the dequantized one, with s2 added to the selected units. `linear` is the layer as it was.
    """

    @classmethod
    def from_module(
        cls, module: nn.Module, start=None, end=None, *, index=None, delta_dtype=None
    ) -> "S2QuantizedLinear":
        """A layer around `module` itself, which becomes frozen; delta_dtype: default float32."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        # hooks registered on the module see this layer's output: forward runs the module without them
        self.__dict__.update(
            {key: value for key, value in module.__dict__.items() if "_hook" in key and "state_dict" not in key}
        )
        self.linear = module.requires_grad_(False)
        self.in_features, self.out_features = module.in_features, module.out_features
        self._select(start, end, index, delta_dtype or torch.float32)  # bytes have no gradient
        self.train(module.training)
        return self

    @property
    def weight(self) -> Tensor:
        """The quantized weight."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor:
        return self.linear.bias

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features] → [..., out_features]."""
        return (
            quantized_forward(self.linear, input, self.s2, self._where(), self.dim)
            if self.enabled
            else self.linear.forward(input)
        )

    def _where(self) -> Tensor:
        """The selected units' numbers."""
        return torch.arange(self.start, self.end, device=self.s2.device) if self.index is None else self.index

    def fuse(self) -> None:
        """Raises: RuntimeError, always."""
        raise RuntimeError(NO_FUSE)

    def extra_repr(self) -> str:
        return self._selected()


class S2QuantizedColumn(S2QuantizedLinear):
    """Trains outputs."""

    dim = 0


class S2QuantizedRow(S2QuantizedLinear):
    """Trains inputs. For the backward of s2 it keeps those of its input, not the input."""

    dim = 1
