"""Linear layers that tensor parallelism has split over ranks.

The weight stays the DTensor that the split made. `s2` is a plain parameter with all selected units, the same on every
rank of the tensor-parallel group. A rank adds the part of `s2` that belongs to its block to its part of the weight, and
the backward sums the gradients of `s2` over the group. So every rank has the whole gradient, and optimizers, clipping,
checkpoints and adapters need not know of the split.

The ranks exchange inputs and outputs as they did before: transformers' style is installed around the trainable layer,
and the hooks of torch's `parallelize_module` stay, because both layers share them.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft.distributed import Split, local_part, split_of
from s2ft.layers.base import S2Layer, beside, stamp
from s2ft.layers.linear import LinearKind, S2Linear, is_split, product
from s2ft.ops.sliced import columns_to_keep, delta_gradient


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
        self.register_buffer("own", beside(mine, self.weight), persistent=False)
        self.register_buffer("places", beside(places, self.weight), persistent=False)

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
        return type(found) is nn.Linear and is_split(found)

    def keep(self, layer: Any, x: Tensor, call: Any) -> Tensor:
        return x if layer.dim == 0 else columns_to_keep(x, layer.own_units, layer.places.numel())

    def grad_of_s2(self, layer: Any, grad: Tensor, kept: Tensor, s2: Tensor, call: Any, plain: bool) -> Tensor:
        """The whole gradient, summed over the ranks. Each of them calls this, also one without a unit."""
        split, whole = layer.split, torch.zeros_like(s2)
        if layer.own.numel():
            gradient = delta_gradient(
                grad, kept, s2.index_select(split.dim, layer.own), layer.own_units, layer.dim, plain
            )
            whole.index_copy_(split.dim, layer.own, gradient.to(s2.dtype))
        dist.all_reduce(whole, group=split.mesh.get_group())
        return whole

    def split(self, holder: Any) -> Split | None:
        return holder.split if isinstance(holder, S2SplitLinear) else split_of(holder.weight)


SPLIT_LINEAR = SplitLinearKind()
S2SplitLinear.kinds = (SPLIT_LINEAR,)
