"""What S²FT has to know about a kind of layer, the product of trainable layers in floating point, and linear layers.

A subclass of :class:`Kind` gives what its layers do otherwise than linear layers.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from s2ft.distributed import Shard, Split, full_shape, is_dtensor
from s2ft.foreign import check_mentioned
from s2ft.layers.base import S2Layer
from s2ft.ops import effective_units, indexed_linear
from s2ft.ops._library import autocast_input, is_dynamo_compiling, own_output, runs_directly, transforms_active
from s2ft.ops.sliced import columns_to_keep, delta_gradient

# ---- what S²FT has to know about a kind of layer --------------------------------------------------------------------


class Kind:
    """One kind of layer. This class itself describes a module that S²FT does not train.

    The formulas of the product are those of a linear layer; the kinds of other layers have their own.

    In its methods `module` is a plain layer. `holder` is anything that has a weight of this kind: a plain layer, a
    trainable layer, or the parameter with the weights of all experts.

    Attributes:
        name: Words for messages.
        layers: The classes that train its outputs and its inputs (column, row); None if S²FT has none.
        is_linear: Whether the output is one matrix product (and a bias), so that a second product can be added to it.
        transposed: Whether the weight is stored as [inputs, outputs].
        read_only: Why values can't be written into the weight, as a sentence; None if they can. Training, reordering
            units, merging and switching on an adapter write into the weight.
    """

    name = "no layer that S²FT trains"
    layers: tuple[type[Any], type[Any]] | None = None
    is_linear = False
    transposed = False
    read_only: str | None = None

    def matches(self, found: Any) -> bool:
        """Whether a module or parameter of a plain model is of this kind.

        Layers of derived classes have kinds of their own, because a trainable layer of the parent's kind would lose
        what the class adds to the forward.
        """
        return False

    # ---- the weight ------------------------------------------------------------------------------

    def weight(self, holder: Any) -> Tensor:
        """The parameter as it is stored."""
        return holder.weight

    def bias(self, holder: Any) -> Tensor | None:
        """The bias [outputs], or None. It is reordered with the outputs."""
        return getattr(holder, "bias", None)

    def view(self, tensor: Tensor, expert: int | None = None) -> Tensor:
        """View a tensor of the weight's shape, for instance its gradient, as outputs × inputs (× taps).

        Args:
            tensor: A tensor of the shape in which the weight is stored.
            expert: Number of the expert, for weights of several experts.
        """
        if self.transposed:
            return tensor.t()
        return tensor.view(*tensor.shape[:2], -1) if tensor.dim() > 2 else tensor

    def matrix(self, holder: Any, expert: int | None = None) -> Tensor:
        """The weight as outputs × inputs (× taps), detached: a view, or for a quantized weight a dequantized copy."""
        return self.view(self.weight(holder).detach(), expert)

    def shape(self, holder: Any, expert: int | None = None) -> torch.Size:
        """The shape of :meth:`matrix`, without reading the weight."""
        return self.view(torch.empty(full_shape(self.weight(holder)), device="meta"), expert).shape

    def shard(self, shard: Shard, expert: int | None = None) -> Shard:
        """View this rank's part of the stored weight as outputs × inputs (× taps).

        Args:
            shard: This rank's part of the weight as it is stored.
            expert: Number of the expert, for weights of several experts.
        """
        matrix, start = shard.tensor, cast("Sequence[int | Tensor]", shard.start)  # of a weight that is spread
        if matrix.numel() or self.transposed:
            matrix = self.view(matrix)
        return Shard(matrix, start[1::-1] if self.transposed else start if len(start) == matrix.dim() else start[:2])

    def split(self, holder: Any) -> Split | None:
        """How tensor parallelism has split the weight over ranks; None if it has not."""
        return None

    def dtype_name(self, module: nn.Module) -> str:
        """The weight's dtype in words, as fingerprints and messages have it."""
        return str(self.weight(module).dtype).removeprefix("torch.")

    def delta_dtype(self, module: Any) -> torch.dtype:
        """The dtype of a delta that is trained at the weight's own precision."""
        return module.weight.dtype

    # ---- running ---------------------------------------------------------------------------------

    def with_delta(self, weight: Tensor, delta: Tensor, index: Tensor, dim: int) -> Tensor:
        """Copy a weight with a delta added to its units, rounded once. Gradients flow to the delta.

        Args:
            weight: The weight as it is stored.
            delta: As in :meth:`run_with_delta`.
            index: The units [n] int64.
            dim: 0 for outputs, 1 for inputs.
        """
        base = self.view(weight.detach()).index_select(dim, index)
        return self.with_units(weight.detach(), index, effective_units(base, delta), dim)

    def with_units(self, weight: Tensor, index: Tensor, values: Tensor, dim: int) -> Tensor:
        """Copy a weight, in its own layout, with other values in some units. Gradients flow to the values."""
        if self.transposed:
            return weight.index_copy(1 - dim, index, values.t())
        return self.view(weight).index_copy(dim, index, values).view(weight.shape)

    def run_with_delta(self, module: Any, x: Tensor, delta: Tensor, index: Tensor, dim: int) -> Tensor:
        """Run a plain layer on its weight with a delta added, as PEFT's layers do.

        Args:
            module: The plain layer.
            x: Its input.
            delta: [n, inputs] if `dim` is 0, [outputs, n] if `dim` is 1; for a convolution with taps as last dimension.
            index: Outputs or inputs that the delta is added to, [n] int64.
            dim: 0 for outputs, 1 for inputs.

        Returns:
            The layer's output.
        """
        return indexed_linear(x, self.view(module.weight), delta, index, dim, module.bias)

    # ---- the product of a trainable layer, whose weight holds base + s2: see `product` below -----------------

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Any) -> Tensor:
        """The output of a layer.

        Args:
            x: The input, in the dtype of the product.
            weight: The effective weight as it is stored.
            bias: The bias, or None.
            call: What else this call needs: the padding of a convolution, the rows of experts.
        """
        weight = weight.t() if self.transposed else weight
        if weight.dtype is not x.dtype:  # autocast
            weight = weight.to(x.dtype)
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)
        return own_output(F.linear(x.contiguous(), weight, bias))

    def keep(self, layer: Any, x: Tensor, call: Any) -> Tensor:
        """What the gradient of s2 needs of x: x itself where outputs are trained, a copy of a part where inputs are."""
        return x if layer.dim == 0 else columns_to_keep(x, layer.own_units, layer.s2.shape[1])

    def grad_of_x(self, grad: Tensor, weight: Tensor, shape: torch.Size, call: Any) -> Tensor:
        """The gradient of x.

        Args:
            grad: Gradient of the output.
            weight: The effective weight as it is stored.
            shape: Shape of x.
            call: As in :meth:`run`.
        """
        return grad.contiguous() @ (weight.t() if self.transposed else weight).to(grad.dtype)

    def grad_of_s2(self, layer: Any, grad: Tensor, kept: Tensor, s2: Tensor, call: Any, plain: bool) -> Tensor:
        """The gradient of s2, given that of the output.

        If `plain`, nothing records or traces this call: the result may have the dtype of `grad`, and autograd casts it.
        """
        return delta_gradient(grad, kept, s2, layer.own_units, layer.dim, plain)

    def grad_of_bias(self, grad: Tensor) -> Tensor:
        """The gradient of the bias, given that of the output [..., outputs]."""
        return grad.reshape(-1, grad.shape[-1]).sum(0)

    def features_last(self, module: nn.Module, x: Tensor) -> Tensor:
        """The layer's input or output with the features (channels) in the last dimension."""
        return x

    def passes_gradient(self, module: nn.Module) -> bool:
        """Whether the gradient of the layer's output reaches its input."""
        return True

    # ---- what only quantized layers have ---------------------------------------------------------

    def shared(self, module: nn.Module) -> list[Any]:
        """Objects that a copy of the layer must share with it, because they describe how its weight is stored."""
        return []

    def state(self, module: nn.Module) -> dict[str, Any]:
        """Values by name, tensors among them, that the layer keeps in an object of its own. The dict can be changed."""
        return {}

    def scales(self, module: nn.Module) -> list[Tensor]:
        """Tensors that the layer needs to dequantize its weight."""
        return []


OTHER = Kind()  # of modules that S²FT does not train
KINDS: list[Kind] = []  # all others, in the order in which they are asked; s2ft/layers/__init__.py has the rows
CLASSES = ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Tensor", "PackedLinear")  # whose objects they may match


def kind_of(found: Any) -> Kind:
    """Find the kind of a module or parameter.

    Args:
        found: A plain layer, a parameter with the weights of experts, or a trainable layer, which has the kind of the
            plain layer that it replaces.

    Returns:
        The kind. For a module that S²FT does not train, its `layers` is None.
    """
    if isinstance(found, S2Layer):
        return found.kind
    is_known = any(one.__name__ in CLASSES for one in type(found).__mro__)
    return next((kind for kind in KINDS if is_known and kind.matches(found)), OTHER)


# ---- the product of a trainable layer -------------------------------------------------------------------------------
#
# The weight holds base + s2. Numbers are those of the merged model, bit for bit, because the same functions see the
# same operands. Only what the gradient of the slice needs is kept of x (S²FT paper, section 3.3).


def product(layer: Any, x: Tensor, call: Any = None) -> Tensor:
    """Run a trainable layer (S2Layer) on its weight, whose slice is written first if s2 has changed.

    Args:
        layer: The layer.
        x: Its input. Under autocast it is cast to autocast's dtype.
        call: What else the formulas of its kind need to know of this call.

    Returns:
        The output. Gradients of any order flow to x, s2 and the bias.

    Raises:
        TypeError: x and the weight differ in dtype outside autocast.
    """
    weight, bias, s2 = layer.tensors()
    x = autocast_input("this layer", x, weight)
    # Derivatives of torch.func and dual numbers can't look into the function below, and an exported program has no
    # layers that write their slices.
    if transforms_active() or forward_ad._current_level >= 0 or torch.compiler.is_exporting():
        return layer.kind.run(x, layer.effective_weight(s2, weight), bias, call)
    trains = torch.is_grad_enabled() and (
        s2.requires_grad or x.requires_grad or bias is not None and bias.requires_grad
    )
    is_held = _assert_held(s2, trains) if is_dynamo_compiling() else layer.write_if_changed(weight, s2)
    if not trains:
        return layer.kind.run(x, _multiplied(layer, weight, s2, is_held), bias, call)
    outputs = _Product.apply(layer, x, weight, s2, bias, call, is_held)
    return outputs[0] if type(outputs) is tuple else outputs


class _Product(torch.autograd.Function):
    """The product.

    The backward reads the columns of x that are kept. They are a second output, which nobody uses: so autograd knows
    that they depend on x, and second derivatives lack no term.
    """

    @staticmethod
    def forward(ctx, layer, x, weight, s2, bias, call, is_held):
        ctx.set_materialize_grads(False)
        kind = ctx.kind = layer.kind
        y = kind.run(x, _multiplied(layer, weight, s2, is_held), bias, call)
        kept = kind.keep(layer, x, call) if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(weight, s2, kept)
        ctx.layer, ctx.shape, ctx.call, ctx.bias_dtype = layer, x.shape, call, None if bias is None else bias.dtype
        # Hooks of saved tensors, such as save_on_cpu, give a copy back, of which nobody knows that it holds base + s2.
        ctx.held = weight if is_held and not is_dynamo_compiling() and not layer.is_managed else None
        # A compiled graph has no second derivatives.
        return (y, kept) if kept is not None and layer.dim == 1 and not is_dynamo_compiling() else y

    @staticmethod
    def backward(ctx, grad, grad_kept=None):
        _, of_x, _, of_s2, of_bias, *_ = ctx.needs_input_grad
        (weight, s2, kept), layer, kind = ctx.saved_tensors, ctx.layer, ctx.kind
        grad_x = grad_s2 = grad_bias = None
        weight = weight if ctx.held is None else ctx.held
        if grad is not None:
            records = torch.is_grad_enabled()
            if of_x:
                # The base may be back in the weight, inside disable_adapters. A second derivative has to see that the
                # weight depends on s2.
                is_held = _assert_held(s2, True) if is_dynamo_compiling() else not records and layer.is_held(weight, s2)
                multiplied = weight if is_held else layer.effective_weight(s2, weight)
                grad_x = kind.grad_of_x(grad, multiplied, ctx.shape, ctx.call)
            if of_s2:
                if not is_dynamo_compiling():  # the forward of a graph has said so
                    layer.write_before_next_forward()
                grad_s2 = kind.grad_of_s2(layer, grad, kept, s2, ctx.call, not records and runs_directly(grad, s2))
            if of_bias:
                grad_bias = kind.grad_of_bias(grad).to(ctx.bias_dtype)
        if grad_kept is not None and of_x:
            with torch.enable_grad():  # the copy is linear in x
                x = grad_kept.new_zeros(ctx.shape, requires_grad=True)
                kept = kind.keep(layer, x, ctx.call)
                through_kept = torch.autograd.grad(kept, x, grad_kept, create_graph=True)[0]
            grad_x = through_kept if grad_x is None else grad_x + through_kept
        return None, grad_x, None, grad_s2, grad_bias, None, None


def _assert_held(s2: Tensor, trains: bool) -> bool:
    """True. A compiled function can't compare versions itself, so the check is an op of its graph, which may raise."""
    torch.ops.s2ft.check_held(s2, trains)
    return True


def _multiplied(layer: Any, weight: Tensor, s2: Tensor, is_held: bool) -> Tensor:
    """The effective weight in a forward: the layer's own, or a copy if it does not hold base + s2."""
    return weight if is_held else layer.effective_weight(s2, weight).detach()


# ---- linear layers --------------------------------------------------------------------------------------------------


class S2Linear(S2Layer):
    """What S2ColumnLinear and S2RowLinear share: the forward is ``F.linear(x, weight, bias)``.

    `weight` is [out_features, in_features]. Made from a Conv1D of transformers, it stays [in_features, out_features];
    `s2` has the shape that it has on an nn.Linear.
    """

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
        if isinstance(bias, Tensor) and bias.shape != (out_features,):
            raise ValueError(f"bias must have shape ({out_features},), got {tuple(bias.shape)}")
        has_bias = bias is not None and bias is not False
        made = nn.Parameter(self.weight.new_empty(out_features), requires_grad=False) if has_bias else None
        self.register_parameter("bias", made)
        self._set_units(start, end, index, delta_dtype)
        if self.weight.is_meta:  # only an attached layer needs s2 elsewhere
            self.s2 = nn.Parameter(self.s2.to("meta"))
        self.reset_parameters()
        if made is not None and isinstance(bias, Tensor):
            with torch.no_grad():
                made.copy_(bias)

    def _copy_settings(self, module: nn.Module) -> None:
        self.transposed = CONV1D.matches(module)
        self.out_features, self.in_features = self.kind.shape(module)
        if type(module) is not nn.Linear:  # other modules may read the settings of a derived class
            self.__dict__.update(  # accelerate may have replaced the forward
                {key: one for key, one in vars(module).items() if key[0] != "_" and key not in ("forward", *vars(self))}
            )

    def reset_parameters(self) -> None:
        """Initialise weight and bias as nn.Linear does, and `s2` with zeros."""
        self.unfuse()  # else the units of the old base would come back
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)
        nn.init.zeros_(self.s2)

    def forward(self, input: Tensor) -> Tensor:
        """Run the layer: input [..., in_features] → output [..., out_features]."""
        return product(self, input) if self.enabled else F.linear(input, self.kind.view(self.weight), self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {super().extra_repr()}"
        )


class S2ColumnLinear(S2Linear):
    """Linear layer that trains outputs (q, k, v, up, gate): `s2` is added to ``weight[start:end, :]``.

    The name is that of the authors' code, and follows ColumnParallelLinear: it is about outputs, which are the rows of
    PyTorch's weight. `s2` is [end - start, in_features], or [n, in_features] with an index of n rows.

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

    The name is that of the authors' code, and follows RowParallelLinear: it is about inputs, which are the columns of
    PyTorch's weight. `s2` is [out_features, end - start], or [out_features, n] with an index of n columns. For the
    backward the layer keeps the selected part of its input, not the whole input.

    Example:
        >>> layer = s2ft.S2RowLinear(8, 16, index=torch.tensor([0, 3, 5]))
        >>> layer.s2.shape
        torch.Size([16, 3])
        >>> layer(torch.randn(2, 8)).shape
        torch.Size([2, 16])
    """

    dim = 1


class LinearKind(Kind):
    """nn.Linear."""

    name = "nn.Linear"
    layers: tuple[type[S2Linear], type[S2Linear]] = (S2ColumnLinear, S2RowLinear)
    is_linear = True

    def matches(self, found: Any) -> bool:
        return type(found) is nn.Linear and not (
            is_split(found) or type(found.weight.data).__module__.startswith("torchao.")
        )


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


def is_intercepted(module: nn.Module) -> bool:
    """Whether something else runs when the module is called: hooks, another forward, or a compiled one."""
    own = module.__dict__
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in own or own.get("_compiled_call_impl") is not None or any(own[name] for name in hooks)


def is_split(found: nn.Linear) -> bool:
    """Whether tensor parallelism has split a linear layer over ranks, see split_linear.py."""
    if not is_dtensor(found.weight):
        return False
    if "forward" in found.__dict__:  # transformers replaces it, torch marks the layer
        return True
    from torch.distributed.tensor import distribute_module

    purpose = "layers that tensor parallelism has split"
    check_mentioned(distribute_module, "_distribute_module_applied", "torch", purpose)
    return getattr(found, "_distribute_module_applied", False)


LINEAR, CONV1D = S2Linear.kinds = LinearKind(), Conv1DKind()
