"""Linear layers that train a few outputs or inputs of a frozen weight: nn.Linear and transformers' Conv1D."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft.layers.base import S2Layer
from s2ft.layers.kind import Kind
from s2ft.layers.product import product
from s2ft.ops import indexed_linear
from s2ft.ops._library import autocast_input, own_output
from s2ft.ops.sliced import columns_to_keep, delta_gradient


class S2Linear(S2Layer):
    """What S2ColumnLinear and S2RowLinear share: the forward is ``F.linear(x, weight, bias)``.

    `weight` is [out_features, in_features]. Made from a Conv1D of transformers, it stays [in_features, out_features];
    `s2` has the shape that it has on an nn.Linear.
    """

    transposed = False  # whether the weight is stored as [in_features, out_features]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool | Tensor | None = True,
        start: int | None = None,
        end: int | None = None,
        device=None,
        dtype=None,
        *,
        index: Tensor | None = None,
        delta_dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer with new weights, as nn.Linear does.

        Args:
            in_features: Number of inputs.
            out_features: Number of outputs.
            bias: Whether there is a bias, or its first values [out_features].
            start: First selected unit; default: 0.
            end: End of the selected units (exclusive); default: the number of units.
            device: Device of the weight and of `s2`.
            dtype: dtype of the weight.
            index: The selected units [n] int64, instead of `start` and `end`.
            delta_dtype: dtype of `s2`; default: `dtype`. For instance float32 on a bfloat16 weight, so that small
                updates are not lost by rounding.

        Raises:
            ValueError: The selection is empty, reversed, names a unit twice or lies outside the weight.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=dtype), requires_grad=False
        )
        self._add_bias(bias)
        self._set_units(start, end, index, delta_dtype)
        if self.weight.is_meta:  # only an attached layer needs s2 elsewhere
            self.s2 = nn.Parameter(self.s2.to("meta"))
        self.reset_parameters()
        if isinstance(bias, Tensor):
            with torch.no_grad():
                self.bias.copy_(bias)

    @property
    def kind(self) -> Kind:
        return CONV1D if self.transposed else LINEAR

    def _copy_settings(self, module: nn.Module) -> None:
        self.transposed = CONV1D.matches(module)
        self.out_features, self.in_features = self.kind.shape(module)
        if type(module) is not nn.Linear:  # other modules may read the settings of a derived class
            own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
            self.__dict__.update({name: value for name, value in own.items() if name not in vars(self)})

    def _add_bias(self, bias) -> None:
        if isinstance(bias, Tensor) and bias.shape != (self.out_features,):
            raise ValueError(f"bias must have shape ({self.out_features},), got {tuple(bias.shape)}")
        if bias is None or bias is False:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(self.weight.new_empty(self.out_features), requires_grad=False)

    def reset_parameters(self) -> None:
        """Initialise weight and bias as nn.Linear does, and `s2` with zeros."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)
        nn.init.zeros_(self.s2)

    def forward(self, input: Tensor) -> Tensor:
        """Run the layer: input [..., in_features] → output [..., out_features]."""
        if not self.enabled:
            return F.linear(input, self.kind.view(self.weight), self.bias)
        return product(self, autocast_input("this layer", input, self.tensors()[0]))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._selected()}"
        )


class S2ColumnLinear(S2Linear):
    """Linear layer that trains outputs (q, k, v, up, gate): `s2` is added to ``weight[start:end, :]``.

    `s2` is [end - start, in_features], or [n, in_features] with an index of n units.

    Example:
        >>> layer = s2ft.S2ColumnLinear(8, 16, start=4, end=8)
        >>> layer.s2.shape
        torch.Size([4, 8])
        >>> layer(torch.randn(2, 8)).sum().backward()
        >>> layer.weight.grad is None, layer.s2.grad.shape
        (True, torch.Size([4, 8]))
    """

    dim = 0


class S2RowLinear(S2Linear):
    """Linear layer that trains inputs (o, down): `s2` is added to ``weight[:, start:end]``.

    `s2` is [out_features, end - start], or [out_features, n] with an index of n units. For the backward the layer keeps
    the selected part of its input, not the whole input.

    Example:
        >>> layer = s2ft.S2RowLinear(8, 16, index=torch.tensor([0, 3, 5]))
        >>> layer.s2.shape
        torch.Size([16, 3])
        >>> layer(torch.randn(2, 8)).shape
        torch.Size([2, 16])
    """

    dim = 1


def is_intercepted(module: nn.Module) -> bool:
    """Whether something else runs when the module is called: hooks, another forward, or a compiled one."""
    own = module.__dict__
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in own or own.get("_compiled_call_impl") is not None or any(own[name] for name in hooks)


def _units(layer: nn.Module) -> int | Tensor:
    """The selected units as the functions of a slice need them: the first one, or an index."""
    index = layer._buffers["index"]
    return layer.start if index is None else index


class LinearKind(Kind):
    """nn.Linear."""

    name = "nn.Linear"
    layers = (S2ColumnLinear, S2RowLinear)
    is_linear = True

    def matches(self, found: Any) -> bool:
        return type(found) is nn.Linear

    def forward(self, module: nn.Module, x: Tensor, delta: Tensor, index: Tensor, dim: int) -> Tensor:
        return indexed_linear(x, self.view(module.weight), delta, index, dim, module.bias)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Any) -> Tensor:
        weight = weight.t() if self.transposed else weight
        if weight.dtype is not x.dtype:  # autocast
            weight = weight.to(x.dtype)
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)
        return own_output(F.linear(x.contiguous(), weight, bias))

    def keep(self, layer: nn.Module, x: Tensor, call: Any) -> Tensor:
        return x if layer.dim == 0 else columns_to_keep(x, _units(layer), layer.s2.shape[1])

    def grad_of_x(self, grad: Tensor, weight: Tensor, shape: torch.Size, call: Any) -> Tensor:
        return grad.contiguous() @ (weight.t() if self.transposed else weight).to(grad.dtype)

    def grad_of_s2(self, layer: nn.Module, grad: Tensor, kept: Tensor, s2: Tensor, call: Any, plain: bool) -> Tensor:
        return delta_gradient(grad, kept, s2, _units(layer), layer.dim, plain)


class Conv1DKind(LinearKind):
    """The linear layer of GPT-2, whose weight is stored as [inputs, outputs]."""

    name = "transformers' Conv1D"
    transposed = True

    def matches(self, found: Any) -> bool:
        return is_conv1d(found, derived=False)


def is_conv1d(found: Any, derived: bool = True) -> bool:
    """Whether a module is transformers' Conv1D, or of a class derived from it. Nothing is imported for that."""
    classes = type(found).__mro__ if derived else (type(found),)
    return any(one.__name__ == "Conv1D" and one.__module__ == "transformers.pytorch_utils" for one in classes)


LINEAR, CONV1D = LinearKind(), Conv1DKind()
