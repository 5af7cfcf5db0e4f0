"""Linear layers that tensor parallelism has split over ranks: each rank has a block of the outputs or of the inputs.

The weight stays the DTensor that the split made. `s2` is a plain parameter with all selected units, the same on every
rank of the tensor-parallel group. A rank adds the part of `s2` that belongs to its block to its part of the weight, and
the backward sums the gradients of `s2` over the group. So every rank has the whole gradient, and optimizers, clipping,
checkpoints and adapters need not know of the split.

The ranks exchange inputs and outputs as they did before: transformers' style is installed around the trainable layer,
and the hooks of torch's `parallelize_module` stay, because both layers share them.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft.distributed import is_dtensor
from s2ft.layers.linear import LinearKind, S2Linear
from s2ft.layers.split import Split, split_of
from s2ft.ops import effective_units, indexed_linear, sliced_linear


class S2SplitLinear(S2Linear):
    """What S2ColumnSplitLinear and S2RowSplitLinear share.

    Attributes:
        split: How the weight is split over the tensor-parallel group.
        style: transformers' parallel style that is installed around the forward; None with torch's hooks.
        own: Positions in s2 along the split dimension that belong to this rank's block, [n] int64.
        places: Units of the rank's block to which they are added, [n] int64; None if they fill a range from `first`.
        first: Start of that range.
    """

    style: Any = None

    @property
    def kind(self) -> "SplitLinearKind":
        return SPLIT_LINEAR

    def _set_units(self, start, end, index, delta_dtype) -> None:
        super()._set_units(start, end, index, delta_dtype)
        self.split = split_of(self.weight)
        units = torch.arange(self.start, self.end) if self.index is None else self.index.cpu()
        if self.split.dim == self.dim:
            mine, places = self.split.local_places(units)
            by_place = places.argsort()
            mine, places = mine[by_place], places[by_place]
        else:  # the rank's block has all units, of which it has a part each
            mine, places = self.split.own_elements, units
        device = self.weight.device
        is_range = places.numel() and torch.equal(places, torch.arange(places.numel()) + places[0])
        self.first = int(places[0]) if is_range else None
        self.register_buffer("own", mine.to(device), persistent=False)
        self.register_buffer("places", None if is_range else places.to(device), persistent=False)

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
        shape = (*output.shape[:-1], self.out_features)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(output, self.split.mesh, [layout], run_check=False, shape=shape, stride=stride)

    def _run(self, x: Tensor) -> Tensor:
        weight, bias = local_part(self.weight), self.bias
        if self.split.dim == 1 and self.split.rank > 0:
            bias = None  # the outputs are summed over the ranks, and the bias counts once
        bias = None if bias is None else local_part(bias)
        if self.fused:
            self._check_fused()
        if self.fused or not self.enabled:
            return F.linear(x, weight, bias)
        s2 = self._own_s2(self.delta)
        if not self.own.numel():
            return _WithGradientOf.apply(F.linear(x, weight, bias), s2)
        if self.places is None:
            return sliced_linear(x, weight, s2, self.first, self.dim, bias)
        return indexed_linear(x, weight, s2, self.places, self.dim, bias)

    def _own_s2(self, s2: Tensor) -> Tensor:
        """The part of s2 that belongs to this rank's block."""
        return _OwnPart.apply(s2, self.own, self.split.dim, self.split.mesh.get_group())

    # ---- fuse and unfuse: every rank writes its own block ------------------------------------------

    def _units(self) -> Tensor:
        matrix = local_part(self.weight.detach())
        if self.places is None:
            return matrix.narrow(self.dim, self.first, self._length())
        return matrix.index_select(self.dim, self.places)

    def _length(self) -> int:
        return self.own.numel() if self.split.dim == self.dim else self.s2.shape[self.dim]

    def _effective(self, base: Tensor) -> Tensor:
        return effective_units(base, self.s2.detach().index_select(self.split.dim, self.own))

    def write_units_of(self, weight: Tensor, values: Tensor) -> None:
        matrix = local_part(weight.detach())
        if self.places is None:
            matrix.narrow(self.dim, self.first, self._length()).copy_(values)
        else:
            matrix.transpose(0, self.dim)[self.places] = values.transpose(0, self.dim)

    # ---- copies: an installed forward belongs to one layer -----------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> "S2SplitLinear":
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


def local_part(tensor: Tensor) -> Tensor:
    """The rank's own part of a tensor, in its own memory. Inside some of transformers' styles it is here already."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


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


class _WithGradientOf(torch.autograd.Function):
    """An output that does not depend on an empty part of s2, made to depend on it.

    The ranks of a group sum the gradient of s2 in the backward, so a rank without a unit must run it too.
    """

    @staticmethod
    def forward(ctx, output: Tensor, empty: Tensor) -> Tensor:
        ctx.save_for_backward(empty)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.zeros_like(ctx.saved_tensors[0])


class SplitLinearKind(LinearKind):
    """nn.Linear that tensor parallelism has split over ranks."""

    name = "nn.Linear, split by tensor parallelism"
    layers = (S2ColumnSplitLinear, S2RowSplitLinear)
    why_not_held = "tensor parallelism has split its weight over ranks"

    def matches(self, found: Any) -> bool:
        return type(found) is nn.Linear and is_dtensor(found.weight) and is_parallel(found)

    def split(self, holder: nn.Module | Tensor) -> Split | None:
        return holder.split if isinstance(holder, S2SplitLinear) else split_of(holder.weight)


def is_parallel(module: nn.Module) -> bool:
    """Whether tensor parallelism runs this module: transformers replaces its forward, torch marks it."""
    return "forward" in module.__dict__ or getattr(module, "_distribute_module_applied", False)


SPLIT_LINEAR = SplitLinearKind()
