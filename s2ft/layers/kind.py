"""What S²FT has to know about a kind of layer. The file of each layer has a subclass, and `KINDS` lists them all."""

from typing import Any

import torch
from torch import Tensor, nn

from s2ft.distributed import Shard
from s2ft.layers.split import Split
from s2ft.ops import effective_units


def as_matrix(weight: Tensor, transposed: bool = False) -> Tensor:
    """View a weight as [outputs, inputs], or, with more dimensions (convolutions), as [outputs, inputs, taps].

    Args:
        weight: Weight of one layer, [outputs, inputs, ...].
        transposed: Whether it is stored as [inputs, outputs] instead.
    """
    if transposed:
        return weight.t()
    return weight.view(*weight.shape[:2], -1) if weight.dim() > 2 else weight


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
    layers: tuple[type[nn.Module], type[nn.Module]] | None = None
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

    def weight(self, holder: nn.Module | Tensor) -> Tensor:
        """The parameter as it is stored."""
        return holder.weight

    def bias(self, holder: nn.Module | Tensor) -> Tensor | None:
        """The bias [outputs], or None. It is reordered with the outputs."""
        return getattr(holder, "bias", None)

    def view(self, tensor: Tensor, expert: int | None = None) -> Tensor:
        """View a tensor of the weight's shape, for instance its gradient, as outputs × inputs (× taps).

        Args:
            tensor: A tensor of the shape in which the weight is stored.
            expert: Number of the expert, for weights of several experts.
        """
        return as_matrix(tensor, self.transposed)

    def matrix(self, holder: nn.Module | Tensor, expert: int | None = None) -> Tensor:
        """The weight as outputs × inputs (× taps), detached: a view, or for a quantized weight a dequantized copy."""
        return self.view(self.weight(holder).detach(), expert)

    def shape(self, holder: nn.Module | Tensor, expert: int | None = None) -> torch.Size:
        """The shape of :meth:`matrix`, without reading the weight."""
        weight = self.weight(holder)
        shape = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3: weight.shape is empty while it is partitioned
        return self.view(torch.empty(shape, device="meta"), expert).shape

    def shard(self, shard: Shard, expert: int | None = None) -> Shard:
        """View this rank's part of the stored weight as outputs × inputs (× taps).

        Args:
            shard: This rank's part of the weight as it is stored.
            expert: Number of the expert, for weights of several experts.
        """
        matrix, start = shard.tensor, shard.start
        if matrix.numel():
            matrix = self.view(matrix)
        elif self.transposed:
            matrix = matrix.t()
        if self.transposed:
            return Shard(matrix, start[1::-1])
        return Shard(matrix, start if len(start) == matrix.dim() else start[:2])

    def split(self, holder: nn.Module | Tensor) -> Split | None:
        """How tensor parallelism has split the weight over ranks; None if it has not."""
        return None

    def parameters(self, module: nn.Module) -> int | None:
        """The number of parameters that a packed weight stands for; None for a weight that is not packed."""
        return None

    def dtype_name(self, module: nn.Module) -> str:
        """The weight's dtype in words, as fingerprints and messages have it."""
        return str(self.weight(module).dtype).removeprefix("torch.")

    def delta_dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype of a delta that is trained at the weight's own precision."""
        return module.weight.dtype

    # ---- running ---------------------------------------------------------------------------------

    def with_delta(self, weight: Tensor, delta: Tensor, index: Tensor, dim: int) -> Tensor:
        """Copy a weight with a delta added to its units, rounded once. Gradients flow to the delta.

        Args:
            weight: The weight as it is stored.
            delta: As in :meth:`forward`.
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

    def forward(self, module: nn.Module, x: Tensor, delta: Tensor, index: Tensor, dim: int) -> Tensor:
        """Run a plain layer on its weight with a delta added.

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

    # ---- the product of a trainable layer, whose weight holds base + s2: see s2ft.layers.product -----------

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Any) -> Tensor:
        """The output of a layer.

        Args:
            x: The input, in the dtype of the product.
            weight: The effective weight as it is stored.
            bias: The bias, or None.
            call: What else this call needs: the padding of a convolution, the rows of experts.
        """
        raise NotImplementedError(self.name)

    def keep(self, layer: nn.Module, x: Tensor, call: Any) -> Tensor:
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

    def grad_of_s2(self, layer: nn.Module, grad: Tensor, kept: Tensor, s2: Tensor, call: Any, plain: bool) -> Tensor:
        """The gradient of s2, given that of the output. If `plain`, autograd casts it to the dtype of s2."""
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

    def can_pack(self, module: nn.Module) -> bool:
        """Whether the layer may store its weight in another way when it runs, which then passes no gradient."""
        return False

    def stop_packing(self, module: nn.Module) -> None:
        """Unpack the weight and keep it unpacked from now on."""

    def allow_packing(self, module: nn.Module) -> None:
        """Allow the layer to pack its weight at its next forward."""

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
