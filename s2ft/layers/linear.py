"""Linear layers that train a few outputs or inputs of a frozen weight, also where it is split over ranks.

Where tensor parallelism splits the layer, the weight stays the DTensor that the split made. `s2` is a plain parameter
with all selected units, the same on every rank of the tensor-parallel group. A rank adds the part of `s2` that belongs
to its block to its part of the weight, and the backward sums the gradients of `s2` over the group. So every rank has
the whole gradient, and optimizers, clipping, checkpoints and adapters need not know of the split.

The ranks exchange inputs and outputs as they did before: transformers' style is installed around the trainable layer,
and the hooks of torch's `parallelize_module` stay, because both layers share them.
"""

import math
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft.distributed import is_dtensor, local_part
from s2ft.layers.base import S2Layer, stamp
from s2ft.layers.kind import Kind, Split, product, split_of
from s2ft.ops import indexed_linear
from s2ft.ops._library import own_output
from s2ft.ops.sliced import columns_to_keep, delta_gradient


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
            own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
            self.__dict__.update({name: value for name, value in own.items() if name not in vars(self)})

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


def is_intercepted(module: nn.Module) -> bool:
    """Whether something else runs when the module is called: hooks, another forward, or a compiled one."""
    own = module.__dict__
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in own or own.get("_compiled_call_impl") is not None or any(own[name] for name in hooks)


def _units(layer: Any) -> int | Tensor:
    """The selected units as the functions of a slice need them: the first one, or an index."""
    index = layer._buffers["index"]
    return layer.start if index is None else index


class LinearKind(Kind):
    """nn.Linear."""

    name = "nn.Linear"
    layers: tuple[type[S2Linear], type[S2Linear]] = (S2ColumnLinear, S2RowLinear)
    is_linear = True

    def matches(self, found: Any) -> bool:
        return type(found) is nn.Linear and not type(found.weight.data).__module__.startswith("torchao.")

    def run_with_delta(self, module: Any, x: Tensor, delta: Tensor, index: Tensor, dim: int) -> Tensor:
        return indexed_linear(x, self.view(module.weight), delta, index, dim, module.bias)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Any) -> Tensor:
        weight = weight.t() if self.transposed else weight
        if weight.dtype is not x.dtype:  # autocast
            weight = weight.to(x.dtype)
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)
        return own_output(F.linear(x.contiguous(), weight, bias))

    def keep(self, layer: Any, x: Tensor, call: Any) -> Tensor:
        return x if layer.dim == 0 else columns_to_keep(x, _units(layer), layer.s2.shape[1])

    def grad_of_x(self, grad: Tensor, weight: Tensor, shape: torch.Size, call: Any) -> Tensor:
        return grad.contiguous() @ (weight.t() if self.transposed else weight).to(grad.dtype)

    def grad_of_s2(self, layer: Any, grad: Tensor, kept: Tensor, s2: Tensor, call: Any, plain: bool) -> Tensor:
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


LINEAR, CONV1D = S2Linear.kinds = LinearKind(), Conv1DKind()


# ---- linear layers that tensor parallelism has split over ranks -----------------------------------------------------


class S2SplitLinear(S2Linear):
    """What S2ColumnSplitLinear and S2RowSplitLinear share.

    Attributes:
        split: How the weight is split over the tensor-parallel group.
        style: transformers' parallel style that is installed around the forward; None with torch's hooks.
        own: Positions in s2 along the split dimension that belong to this rank's block, [n] int64.
        places: Units of the rank's block to which they are added, [n] int64.
    """

    style: Any = None
    own: Tensor
    places: Tensor

    def _set_units(self, start, end, index, delta_dtype) -> None:
        super()._set_units(start, end, index, delta_dtype)
        self.split = cast(Split, split_of(self.weight))
        units = torch.arange(self.start, self.end, device="cpu") if self.index is None else self.index.cpu()
        if self.split.dim == self.dim:
            mine, places = self.split.local_places(units)
            by_place = places.argsort()
            mine, places = mine[by_place], places[by_place]
        else:  # the rank's block has all units, of which it has a part each
            mine, places = self.split.own_elements, units
        is_range = places.numel() and torch.equal(places, torch.arange(places.numel(), device="cpu") + places[0])
        self.first: Any = int(places[0]) if is_range else None
        self.register_buffer("own", mine.to(self.weight.device), persistent=False)
        self.register_buffer("places", places.to(self.weight.device), persistent=False)

    def install(self, style: Any) -> None:
        """Install transformers' parallel style around the forward, as it was around that of the plain layer."""
        self.style = style
        style.install_forward(self, self.split.mesh)

    @torch.compiler.disable  # graphs of two ranks would sum gradients in different orders, as their units differ
    def forward(self, input: Tensor) -> Tensor:
        """Run this rank's block. A compiled model runs it uncompiled.

        Args:
            input: [..., inputs] as a DTensor, replicated for split outputs and split for split inputs. For split
                outputs a plain tensor, which counts as replicated.

        Returns:
            A DTensor, split along the outputs or partial; for a plain input the rank's own outputs [..., n].

        Raises:
            RuntimeError: A layer with split inputs got a plain tensor.
        """
        from torch.distributed.tensor import DTensor, Partial, Shard

        if not isinstance(input, DTensor):
            if self.split.dim == 1:
                raise RuntimeError("this layer's inputs are split over ranks: it needs a DTensor, got a plain tensor")
            return self._run(input)
        splits_outputs = self.split.dim == 0  # then the gradient of x is partial, else the output
        output = self._run(input.to_local(grad_placements=[Partial()] if splits_outputs else input.placements))
        layout = Shard(output.dim() - 1) if splits_outputs else Partial()
        shape = torch.Size((*output.shape[:-1], self.out_features))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(output, self.split.mesh, [layout], run_check=False, shape=shape, stride=stride)

    def _run(self, x: Tensor) -> Tensor:
        return product(self, x) if self.enabled else F.linear(x, *self.tensors()[:2])

    # ---- this rank's block of the weight -------------------------------------------------------------

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor]:
        # The outputs of split inputs are summed over ranks, so the bias counts once.
        bias = None if self.bias is None or self.split.dim == 1 and self.split.rank > 0 else local_part(self.bias)
        return local_part(self.weight), bias, self.s2

    def _may_be_gathered(self, weight: Tensor, s2: Tensor) -> bool:
        return self._whole != stamp(local_part(self.weight))[1]  # FSDP2 has put another parameter here

    def has_written(self, s2: tuple[int, Any]) -> bool:
        is_known = self._may_be_gathered(self.weight, self.s2) or not self._is_current or self._written[0] == s2
        return is_known and super().has_written(s2)

    @property
    def own_units(self) -> int | Tensor:
        return self.places if self.first is None else self.first

    def effective_weight(self, s2: Tensor, weight: Tensor) -> Tensor:
        own = _OwnPart.apply(s2, self.own, self.split.dim, self.split.mesh.get_group())
        return super().effective_weight(own, weight)

    def _units(self, weight: Tensor) -> Tensor:
        return weight.index_select(self.dim, self.places)

    def _with_units(self, weight: Tensor, values: Tensor) -> Tensor:
        return weight.index_copy(self.dim, self.places, values)

    # ---- copies: an installed forward belongs to one layer -----------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> S2Layer:
        made = super().__deepcopy__({**memo, id(self.split): self.split, id(self.style): self.style})
        memo[id(self)] = made
        return made

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "forward"})
        if self.style is not None:
            self.install(self.style)


class S2ColumnSplitLinear(S2SplitLinear):
    """Split linear layer that trains outputs."""

    dim = 0


class S2RowSplitLinear(S2SplitLinear):
    """Split linear layer that trains inputs."""

    dim = 1


class _OwnPart(torch.autograd.Function):
    """The rank's own part of s2. The backward sums over the ranks, so that each has the whole gradient."""

    @staticmethod
    def forward(ctx, s2: Tensor, own: Tensor, dim: int, group: Any) -> Tensor:
        ctx.save_for_backward(own)
        ctx.shape, ctx.dim, ctx.group = s2.shape, dim, group
        return s2.index_select(dim, own)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (own,) = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.shape).index_copy_(ctx.dim, own, gradient)
        dist.all_reduce(whole, group=ctx.group)
        return whole, None, None, None


class SplitLinearKind(LinearKind):
    """nn.Linear that tensor parallelism has split over ranks."""

    name = "nn.Linear, split by tensor parallelism"
    layers = (S2ColumnSplitLinear, S2RowSplitLinear)

    def matches(self, found: Any) -> bool:
        if type(found) is not nn.Linear or not is_dtensor(found.weight):
            return False
        # transformers replaces the forward of a layer that tensor parallelism runs, torch marks the layer
        return "forward" in found.__dict__ or getattr(found, "_distribute_module_applied", False)

    def keep(self, layer: Any, x: Tensor, call: Any) -> Tensor:
        return x if layer.dim == 0 else columns_to_keep(x, layer.own_units, layer.places.numel())

    def grad_of_s2(self, layer: Any, grad: Tensor, kept: Tensor, s2: Tensor, call: Any, plain: bool) -> Tensor:
        """The whole gradient, summed over the ranks. Each of them calls this, also one without a unit."""
        split, whole = layer.split, torch.zeros_like(s2)
        if layer.own.numel():
            own = s2.index_select(split.dim, layer.own)
            gradient = delta_gradient(grad, kept, own, layer.own_units, layer.dim, plain)
            whole.index_copy_(split.dim, layer.own, gradient.to(s2.dtype))
        dist.all_reduce(whole, group=split.mesh.get_group())
        return whole

    def split(self, holder: Any) -> Split | None:
        return holder.split if isinstance(holder, S2SplitLinear) else split_of(holder.weight)


SPLIT_LINEAR = SplitLinearKind()
S2SplitLinear.kinds = (SPLIT_LINEAR,)
