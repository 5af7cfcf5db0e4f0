"""What S²FT has to know about a kind of layer, and the product that all trainable layers run.

The file of each layer has a subclass of :class:`Kind`, which gives the formulas of its product. The weight holds base +
s2. Numbers are those of the merged model, bit for bit, because the same functions see the same operands. Only what the
gradient of the slice needs is kept of x (S²FT paper, section 3.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad

from s2ft.distributed import Shard, cut_by, full_shape, is_dtensor
from s2ft.ops import effective_units
from s2ft.ops._library import autocast_input, is_dynamo_compiling, runs_directly, transforms_active

# ---- how tensor parallelism splits a weight -------------------------------------------------------------------------


@dataclass
class Split:
    """A weight [outputs, inputs] or bias [outputs] that is split over the ranks of a tensor-parallel group.

    Attributes:
        mesh: Device mesh of the group, with one dimension.
        dim: Dimension of the weight that is split.
        elements: The elements along it that each rank has, in the order of its part, a tensor [n] int64 for each rank.
    """

    mesh: Any
    dim: int
    elements: list[Tensor]

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return self.mesh.get_local_rank()

    @property
    def own_elements(self) -> Tensor:
        """The elements that this rank has."""
        return self.elements[self.rank]

    @cached_property
    def owners(self) -> Tensor:
        """The rank that has each element, [extent] int64."""
        owners = torch.empty(sum(part.numel() for part in self.elements), dtype=torch.int64, device="cpu")
        for rank, part in enumerate(self.elements):
            owners[part] = rank
        return owners

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks of the group. Each of them must call this."""
        total = tensor.to(self.mesh.device_type, copy=True)
        dist.all_reduce(total, group=self.mesh.get_group())
        return total

    def local_places(self, elements: Tensor) -> tuple[Tensor, Tensor]:
        """Find elements in this rank's part.

        Args:
            elements: Elements of the whole dimension, [n] int64.

        Returns:
            Which of them the rank has, as positions in `elements` [m] int64, and their places in its part [m] int64.
        """
        places = torch.full_like(self.owners, -1)
        places[self.own_elements] = torch.arange(self.own_elements.numel(), device="cpu")
        places = places[elements]
        return (places >= 0).nonzero().squeeze(1), places[places >= 0]


def split_of(tensor: Tensor) -> Split | None:
    """Describe how tensor parallelism has split a DTensor.

    FSDP2 puts its own dimensions of a mesh first, so the last dimension of the mesh is that of tensor parallelism.

    Args:
        tensor: A weight or bias of a layer that tensor parallelism runs.

    Returns:
        The split; None for a plain tensor, and for one that every rank of the group has in full.
    """
    if not is_dtensor(tensor) or tensor.placements[-1].is_replicate():
        return None
    mesh, placement = tensor.device_mesh, tensor.placements[-1]
    if mesh.ndim > 1:
        mesh = mesh[mesh.mesh_dim_names[-1]]
    dim = placement.dim % tensor.dim()
    return Split(mesh, dim, cut_by(placement, torch.arange(tensor.shape[dim], device="cpu"), mesh.size()))


# ---- what S²FT has to know about a kind of layer --------------------------------------------------------------------


class Kind:
    """One kind of layer. This class itself describes a module that S²FT does not train.

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

    def run_with_delta(self, module: nn.Module, x: Tensor, delta: Tensor, index: Tensor, dim: int) -> Tensor:
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
        raise NotImplementedError(self.name)

    # ---- the product of a trainable layer, whose weight holds base + s2: see `product` below -----------------

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Any) -> Tensor:
        """The output of a layer.

        Args:
            x: The input, in the dtype of the product.
            weight: The effective weight as it is stored.
            bias: The bias, or None.
            call: What else this call needs: the padding of a convolution, the rows of experts.
        """
        raise NotImplementedError(self.name)

    def keep(self, layer: Any, x: Tensor, call: Any) -> Tensor:
        """What the gradient of s2 needs of x: x itself where outputs are trained, a copy of a part where inputs are."""
        raise NotImplementedError(self.name)

    def grad_of_x(self, grad: Tensor, weight: Tensor, shape: torch.Size, call: Any) -> Tensor:
        """The gradient of x.

        Args:
            grad: Gradient of the output.
            weight: The effective weight as it is stored.
            shape: Shape of x.
            call: As in :meth:`run`.
        """
        raise NotImplementedError(self.name)

    def grad_of_s2(self, layer: Any, grad: Tensor, kept: Tensor, s2: Tensor, call: Any, plain: bool) -> Tensor:
        """The gradient of s2, given that of the output.

        If `plain`, nothing records or traces this call: the result may have the dtype of `grad`, and autograd casts it.
        """
        raise NotImplementedError(self.name)

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


class TrainableLayer(nn.Module):
    """What says the kind of a trainable layer.

    Attributes:
        kinds: The kind of the plain layer, and that of one whose weight is stored as [inputs, outputs].
        transposed: Whether the weight is stored so.
    """

    kinds: ClassVar[tuple[Kind, ...]]
    transposed = False

    @property
    def kind(self) -> Kind:
        """What S²FT knows about the plain layer."""
        return self.kinds[self.transposed]


def kind_of(found: Any) -> Kind:
    """Find the kind of a module or parameter.

    Args:
        found: A plain layer, a parameter with the weights of experts, or a trainable layer, which has the kind of the
            plain layer that it replaces.

    Returns:
        The kind. For a module that S²FT does not train, its `layers` is None.
    """
    if isinstance(found, TrainableLayer):
        return found.kind
    is_known = any(one.__name__ in CLASSES for one in type(found).__mro__)
    return next((kind for kind in KINDS if is_known and kind.matches(found)), OTHER)


# ---- the product of a trainable layer -------------------------------------------------------------------------------


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
