"""Linear layers that train a few outputs or inputs of a frozen weight: nn.Linear and transformers' Conv1D."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from s2ft.layers.base import S2Layer
from s2ft.layers.held import Formulas, held_product
from s2ft.layers.kind import Kind
from s2ft.ops import _linear, indexed_linear
from s2ft.ops._library import autocast_input, own_output, runs_directly
from s2ft.ops._one_input import Factors, can_share, linears
from s2ft.ops.indexed_linear import _ops as INDEXED
from s2ft.ops.sliced_linear import _ops as SLICED


class S2Linear(S2Layer):
    """What S2ColumnLinear and S2RowLinear share: the forward is ``F.linear(x, effective weight, bias)``.

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
        weight, bias, s2, index, base = self._tensors()
        if self.effective == "step" and self.enabled:
            return self._run_held(autocast_input("effective='step'", input, weight), weight, bias, s2, index)
        matrix = weight.t() if self.transposed else weight
        if base is not None:
            self._check_fused()
        if base is not None or not self.enabled:
            return F.linear(input, matrix, bias)
        ops, units = (SLICED, self.start) if index is None else (INDEXED, index)
        if not runs_directly(input, weight, s2, bias):
            return _linear.call(ops, input, matrix, self.checked(s2, weight), units, self.dim, bias)
        # What `checked` finds in the usual case, in 3 µs less.
        is_known = weight.data_ptr() == self._looked_at and s2.dtype is self._made
        if not is_known or weight.requires_grad or self.awaits_order:
            self.checked(s2, weight)
        return _linear.call_directly(ops, input, matrix, s2, units, self.dim, bias)

    def _run_held(self, x: Tensor, weight: Tensor, bias: Tensor | None, s2: Tensor, index: Tensor | None) -> Tensor:
        """Run the layer on its weight, which holds base + s2. x is in the dtype of the product.

        Where it can, it uses the autograd node of the ops, which takes less of the host than that of held_product.
        """
        if not runs_directly(x, weight, s2, bias):
            return held_product(self, x, LinearFormulas(self))
        self.hold()
        units, matrix = self.start if index is None else index, weight.t() if self.transposed else weight
        products = _linear.Products(_held_forward, partial(_held_grad_x, self))
        return _linear.run_directly(products, x, matrix, s2, units, self.dim, bias)

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """The weight, bias, s2, index and base. As attributes, each takes an exception inside nn.Module, 0.6 µs."""
        parameters, buffers = self._parameters, self._buffers
        try:
            return parameters["weight"], parameters["bias"], parameters["s2"], buffers["index"], buffers["base"]
        except KeyError:  # something else holds them, such as a parametrization
            return self.weight, self.bias, self.s2, self.index, self.base

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._selected()}"
        )


def _held_forward(x: Tensor, matrix: Tensor, delta: Tensor, units, dim: int, bias: Tensor | None) -> Tensor:
    """The forward of a linear op, with the delta in the matrix already."""
    matrix, bias = matrix.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return own_output(F.linear(x.contiguous(), matrix, bias))


def _held_grad_x(layer: S2Linear, grad: Tensor, matrix: Tensor, delta: Tensor, units, dim: int, plain: bool) -> Tensor:
    """The gradient of x of a linear op, with the delta in the matrix unless the layer has put the base back."""
    if layer.is_held and not torch.is_grad_enabled():
        return grad.contiguous() @ matrix.to(grad.dtype)
    return LinearFormulas(layer).call_gradient_of_x(grad, layer.base_weight(), delta)


class LinearFormulas(Formulas):
    """Formulas of a linear layer: those of :mod:`s2ft.ops._linear`."""

    def __init__(self, layer: S2Linear) -> None:
        self.transposed, self.dim = layer.transposed, layer.dim
        self.units = layer.start if layer.index is None else layer.index

    def _matrix(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return (weight.t() if self.transposed else weight).to(dtype)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        return own_output(F.linear(x.contiguous(), self._matrix(weight, x.dtype), bias))

    def keep(self, x: Tensor, s2: Tensor) -> Tensor:
        return x if self.dim == 0 else _linear._columns_to_keep(x, self.units, s2.shape[1])

    def gradient_of_x(self, grad: Tensor, weight: Tensor) -> Tensor:
        return grad.contiguous() @ self._matrix(weight, grad.dtype)

    def gradient_of_s2(self, grad: Tensor, kept: Tensor, s2: Tensor) -> Tensor:
        return _linear._delta_gradient(grad, kept, s2, self.units, self.dim)

    def gradient_of_bias(self, grad: Tensor) -> Tensor:
        return grad.reshape(-1, grad.shape[-1]).sum(0)

    def call_gradient_of_x(self, grad: Tensor, base: Tensor, s2: Tensor) -> Tensor:
        ops = torch.ops.s2ft
        op = ops.sliced_linear_grad_x if isinstance(self.units, int) else ops.indexed_linear_grad_x
        return op(grad, base.t() if self.transposed else base, s2, self.units, self.dim)


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


def run_on_one_input(x: Tensor, *modules: nn.Module) -> tuple[Tensor, ...]:
    """Run layers on one input. If all of them are plain or trainable linear layers, its gradient is one buffer.

    Args:
        x: Input of all layers, [..., inputs].
        modules: The layers. With hooks, a replaced forward, quantized or spread weights, a bias that trains, or under
            autocast or torch.compile, they run one by one.

    Returns:
        The outputs. They are the same in both cases, bit for bit.
    """
    layers = [_factors(module) for module in modules]
    if None not in layers and not _has_any_global_hook() and can_share(x, layers):
        return linears(x, layers)
    return tuple(module(x) for module in modules)


def _factors(module: nn.Module) -> Factors | None:
    """What a layer multiplies its input by; None if it has a call of its own or does more."""
    if torch.compiler.is_compiling() or is_intercepted(module):
        return None
    if type(module) is nn.Linear:
        return Factors(module.weight, module.bias)
    if type(module) is not S2ColumnLinear or not module.enabled:
        return None
    held = None
    if module.effective == "step":
        module.hold()
        held = _HeldMatrix(module)
    weight, bias, s2, index, base = module._tensors()
    if base is not None and held is None:
        return None
    s2 = module.checked(s2, weight)
    matrix = weight.t() if module.transposed else weight
    return Factors(matrix, bias, s2, module.start if index is None else index, held)


class _HeldMatrix:
    """What :class:`s2ft.ops._one_input.Factors` needs to know of a layer whose weight holds base + s2."""

    def __init__(self, layer: S2Linear) -> None:
        self.layer = layer

    @property
    def is_held(self) -> bool:
        return self.layer.is_held

    def base(self) -> Tensor:
        """The matrix [outputs, inputs] with the base's values."""
        weight = self.layer.base_weight()
        return weight.t() if self.layer.transposed else weight


def is_intercepted(module: nn.Module) -> bool:
    """Whether something else runs when the module is called: hooks, another forward, or a compiled one."""
    own = module.__dict__
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in own or own.get("_compiled_call_impl") is not None or any(own[name] for name in hooks)


class LinearKind(Kind):
    """nn.Linear."""

    name = "nn.Linear"
    layers = (S2ColumnLinear, S2RowLinear)
    is_linear = True

    def matches(self, found: Any) -> bool:
        return type(found) is nn.Linear

    def forward(self, module: nn.Module, x: Tensor, delta: Tensor, index: Tensor, dim: int) -> Tensor:
        return indexed_linear(x, self.view(module.weight), delta, index, dim, module.bias)


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
