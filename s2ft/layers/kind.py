"""What S²FT has to know about one kind of layer; the file of the layer has a subclass, `KINDS` lists them all."""

from typing import Any

import torch
from torch import Tensor, nn

from s2ft.distributed import Shard


def as_matrix(weight: Tensor, transposed: bool = False) -> Tensor:
    """View a weight as [outputs, inputs], or as [outputs, inputs, taps] where it has more dimensions (convolutions).

    Args:
        weight: Weight of one layer, [outputs, inputs, ...].
        transposed: Whether it is stored as [inputs, outputs] instead.
    """
    if transposed:
        return weight.t()
    return weight.view(*weight.shape[:2], -1) if weight.dim() > 2 else weight


class Kind:
    """One kind of layer. The class itself describes a module that S²FT does not train.

    `holder` is what has the weight: the plain layer, the trainable layer in its place, or, for experts, the parameter
    with the weights of all experts.

    Attributes:
        name: Words for messages.
        layers: The trainable layers that train outputs and inputs (column, row); None where there are none.
        is_linear: Whether the layer maps the last dimension of its input by a matrix product, so that a second
            product can be added to its output.
        transposed: Whether the weight is stored as [inputs, outputs].
        read_only: Why no value can be written into the weight, as a sentence; None where it can. Units that move,
            adapters that are switched on, fused or merged all need a weight that can be written.
    """

    name = "no layer that S²FT trains"
    layers: tuple[type[nn.Module], type[nn.Module]] | None = None
    is_linear = False
    transposed = False
    read_only: str | None = None

    def matches(self, found: Any) -> bool:
        """Whether a module or parameter of a plain model is of this kind. Subclasses of a module's class are not:
        what they add to the forward would be lost."""
        return False

    # ---- the weight ------------------------------------------------------------------------------

    def weight(self, holder: nn.Module | Tensor) -> Tensor:
        """The parameter as it is stored."""
        return holder.weight

    def bias(self, holder: nn.Module | Tensor) -> Tensor | None:
        """The bias [outputs], where there is one. It moves with the outputs."""
        return getattr(holder, "bias", None)

    def view(self, tensor: Tensor, expert: int | None = None) -> Tensor:
        """View a tensor of the weight's shape, for instance its gradient, as outputs × inputs (× taps).

        Args:
            tensor: Of the shape in which the weight is stored.
            expert: Which of the experts, for weights of many.
        """
        return as_matrix(tensor, self.transposed)

    def matrix(self, holder: nn.Module | Tensor, expert: int | None = None) -> Tensor:
        """The weight as outputs × inputs (× taps), detached: a view, or a copy in floating point if it is read-only."""
        return self.view(self.weight(holder).detach(), expert)

    def shape(self, holder: nn.Module | Tensor, expert: int | None = None) -> torch.Size:
        """The shape of :meth:`matrix`, without reading the weight."""
        weight = self.weight(holder)
        shape = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3: weight.shape is empty while it is partitioned
        return self.view(torch.empty(shape, device="meta"), expert).shape

    def shard(self, shard: Shard, expert: int | None = None) -> Shard:
        """The same part of the weight as outputs × inputs (× taps).

        Args:
            shard: This rank's part of the weight as it is stored.
            expert: Which of the experts, for weights of many.
        """
        matrix, start = shard.tensor, shard.start
        if matrix.numel():
            matrix = self.view(matrix)
        elif self.transposed:
            matrix = matrix.t()
        return Shard(matrix, start[1::-1] if self.transposed else start[:2])

    def parameters(self, module: nn.Module) -> int | None:
        """How many parameters the weight stands for, where it is packed; else None."""
        return None

    def dtype_name(self, module: nn.Module) -> str:
        """The weight's dtype in words, as fingerprints and messages have it."""
        return str(self.weight(module).dtype).removeprefix("torch.")

    def delta_dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype of a delta that is trained at the weight's own precision."""
        return module.weight.dtype

    # ---- running ---------------------------------------------------------------------------------

    def forward(self, module: nn.Module, x: Tensor, delta: Tensor, index: Tensor, dim: int) -> Tensor:
        """Run a plain layer on its weight with a delta added.

        Args:
            module: The plain layer.
            x: Its input.
            delta: [n, inputs] if dim is 0, [outputs, n] if dim is 1; a convolution's has taps behind.
            index: Outputs or inputs that the delta belongs to, [n] int64.
            dim: 0 for outputs, 1 for inputs.

        Returns:
            The layer's output.
        """
        raise NotImplementedError(self.name)

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
        """What a copy of the plain layer must share with it, because the layer reads there how its weight is stored."""
        return []

    def state(self, module: nn.Module) -> dict[str, Any]:
        """Tensors by name, and other values, that the plain layer keeps in an object of its own; it can be changed."""
        return {}

    def scales(self, module: nn.Module) -> list[Tensor]:
        """Tensors that the plain layer has besides its weight, to read it."""
        return []


OTHER = Kind()  # of modules that S²FT does not train
