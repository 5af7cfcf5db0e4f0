"""Finds the weight of a projection in a model, and the update that is trained of it.

Code that reads or writes a weight finds it once, by :func:`weight_at`, and uses the handle. Only the file of a layer
contains how its weight is stored, see :class:`s2ft.layers.Kind`.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from s2ft.distributed import (
    Shard,
    full_shape,
    full_values,
    gathered_parameter,
    has_numbers,
    is_dtensor,
    is_sharded,
    own_shard,
    reads_weights,
)
from s2ft.layers import EXPERTS, LINEAR, OTHER, TRANSPOSED_EXPERTS, Kind, kind_of
from s2ft.layers.kind import Split
from s2ft.model.coupling import Coupling, Projection


def find(model: nn.Module, path: str) -> Any:
    """Find what has this name in a model.

    Returns:
        The module, parameter or buffer.

    Raises:
        AttributeError: Nothing has this name.
    """
    module: Any = model
    for name in path.split("."):  # faster than get_submodule: a switch of adapters looks up every layer
        module = module._modules.get(name)
        if module is None:
            break
    else:
        return module
    parent, _, name = path.rpartition(".")
    found = getattr(model.get_submodule(parent), name)
    if not isinstance(found, (nn.Module, Tensor)):
        raise AttributeError(f"{path} is neither a module nor a tensor")
    return found


@dataclass(slots=True)
class WeightHandle:
    """A weight of a model, found once.

    Attributes:
        path: Path of its layer or parameter in the model.
        holder: The layer that has the weight, plain or trainable, or the parameter with the weights of all experts.
        kind: Kind of the plain layer.
        expert: Number of the expert, for weights of several experts.
    """

    path: str
    holder: Any
    kind: Kind
    expert: int | None = None

    @property
    def tensor(self) -> Tensor:
        """The parameter as it is stored, with all experts."""
        return self.kind.weight(self.holder)

    @property
    def bias(self) -> Tensor | None:
        """The bias [outputs], or None."""
        return self.kind.bias(self.holder)

    @property
    def matrix(self) -> Tensor:
        """The weight as outputs × inputs (× taps), detached: a view, or for a quantized weight a dequantized copy."""
        return self.kind.matrix(self.holder, self.expert)

    @property
    def shape(self) -> torch.Size:
        """The shape of :attr:`matrix`, without reading the weight."""
        return self.kind.shape(self.holder, self.expert)

    @property
    def dtype_name(self) -> str:
        """The weight's dtype in words."""
        return self.kind.dtype_name(self.holder)

    @property
    def read_only(self) -> str | None:
        """Why values can't be written into the weight, as a sentence; None if they can."""
        return self.kind.read_only

    def view(self, tensor: Tensor) -> Tensor:
        """View a tensor of the stored weight's shape, for instance its gradient, as :attr:`matrix` views the weight."""
        return self.kind.view(tensor, self.expert)

    @property
    def split(self) -> Split | None:
        """How tensor parallelism has split the weight; None if it has not."""
        return self.kind.split(self.holder)

    def full(self) -> AbstractContextManager[Tensor]:
        """Open the complete weight for reading: as it is stored, with all experts, or dequantized.

        :meth:`view` of it is the matrix of this projection. A weight that is whole here is not copied. One that is
        spread over ranks is gathered, and every one of these ranks must call this. One on the meta device is read from
        its file, if it has one (`_s2ft_values`).

        Raises:
            ValueError: The weight is on the meta device, and there is no file to read it from.
        """
        return nullcontext(self.matrix) if self.read_only else full_values(self.tensor)

    @contextmanager
    def shard(self) -> Iterator[Shard]:
        """Open the part of :attr:`matrix` that this rank can write, in the weight's own memory.

        That is the full matrix, unless FSDP2 shards it. Under ZeRO-3 every rank must call this and write the same
        values.
        """
        weight = self.tensor
        with gathered_parameter(weight):
            yield self.kind.shard(own_shard(weight), self.expert) if is_dtensor(weight) else Shard(self.matrix)


def weight_at(model: nn.Module, projection: Projection) -> WeightHandle:
    """Find the weight of a projection.

    Raises:
        AttributeError: The model has no module or parameter of the projection's path.
    """
    found = find(model, projection.path)
    if type(found) is nn.Linear and type(found.weight) is nn.Parameter:  # nearly all are; a quantized tensor is not
        return WeightHandle(projection.path, found, LINEAR)
    kind = kind_of(found)
    if kind is EXPERTS and projection.transposed:  # nothing but the projection says it
        kind = TRANSPOSED_EXPERTS
    return WeightHandle(projection.path, found, LINEAR if kind is OTHER else kind, projection.expert)


def split_of_units(model: nn.Module, projection: Projection) -> Split | None:
    """How tensor parallelism has split the units of a projection; None if each of its ranks has all of them."""
    split = weight_at(model, projection).split
    return split if split is not None and split.dim == projection.dim else None


def tensors_of(model: nn.Module, coupling: Coupling) -> list[Tensor]:
    """The weights, biases and vectors that a new order of the coupling's units reorders."""
    tensors = [find(model, vector.path) for vector in coupling.vectors]
    for projection in coupling.projections:
        handle = weight_at(model, projection)
        bias = handle.bias if projection.dim == 0 else None
        tensors += [handle.tensor] + ([] if bias is None else [bias])
    return tensors


def have_numbers(model: nn.Module, couplings: Iterable[Coupling]) -> bool:
    """Whether this rank can read all weights, biases and vectors of these couplings."""
    tensors = [tensor for coupling in couplings for tensor in tensors_of(model, coupling)]
    return all(map(has_numbers, tensors)) and (reads_weights() or any(map(is_sharded, tensors)))


def can_run(model: nn.Module) -> bool:
    """Whether this rank can run a model on data before it is trained."""
    parameters = list(model.parameters())
    return not any(p.is_meta for p in parameters) and (reads_weights() or any(map(is_sharded, parameters)))


def count_parameters(model: nn.Module) -> int:
    """Count a model's parameters; a packed weight counts as the parameters that it stands for."""
    packed = {id(m.weight): count for m in model.modules() if (count := kind_of(m).parameters(m)) is not None}
    return sum(packed.get(id(parameter), full_shape(parameter).numel()) for parameter in model.parameters())


def layers_that_pack(model: nn.Module) -> list[str]:
    """The names of the layers that may pack their weight, for :func:`stop_packing` and :func:`allow_packing`."""
    return [name for name, module in model.named_modules() if kind_of(module).can_pack(module)]


def stop_packing(model: nn.Module, names: list[str]) -> None:
    """Unpack the weights of these layers and keep them unpacked from now on, see :meth:`Kind.can_pack`."""
    for name in names:
        module = model.get_submodule(name)
        kind_of(module).stop_packing(module)


def allow_packing(model: nn.Module, names: list[str]) -> None:
    """Allow these layers to pack their weights, at their next forward."""
    for name in names:
        module = model.get_submodule(name)
        kind_of(module).allow_packing(module)


def put(model: nn.Module, path: str, thing: nn.Module | nn.Parameter, position: int | None = None) -> None:
    """Replace the module or parameter of this name. An interrupt leaves the old one or the new one there.

    Args:
        model: The model.
        path: The name.
        thing: The module or parameter to put there. It may be there already.
        position: Where a parameter goes among the parameters of its module; default: last.
    """
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(thing, nn.Module):
        owner._modules[name] = thing
        owner._parameters.pop(name, None)
        return
    rest = [(key, parameter) for key, parameter in owner._parameters.items() if key != name]
    rest.insert(len(rest) if position is None else position, (name, thing))
    owner._parameters = dict(rest)  # one step: an interrupt between two could lose a parameter
    owner._modules.pop(name, None)


def parameter_position(model: nn.Module, path: str) -> int:
    """The position of a parameter among the parameters of its module, for :func:`put`."""
    parent, _, name = path.rpartition(".")
    return list(model.get_submodule(parent)._parameters).index(name)


# ---- the trained update of one projection ---------------------------------------------------------------------------


class Positions(NamedTuple):
    """Where the elements of a delta are in a weight.

    Attributes:
        move: The reordering of the weight's units for which they hold; None for the base's order.
        size: Number of elements of the weight along the delta's dimension.
        index: The elements, [n] int64 on the weight's device. They are in range, and none occurs twice.
    """

    move: Any
    size: int
    index: Tensor  # type: ignore[assignment]  # tuple has a method of this name


@dataclass
class Delta:
    """The effective weight is the base with `values` added at `index` along `dim`.

    Attributes:
        dim: 0 for outputs (rows), 1 for inputs (columns).
        index: Elements along `dim` in the base's order, ascending, [n] int64.
        values: [n, inputs] if `dim` is 0, [outputs, n] if `dim` is 1.
        positions: Where the elements were in the weight that they were written into last; None if they were not.
    """

    dim: int
    index: Tensor
    values: Tensor
    positions: Positions | None = field(default=None, repr=False, compare=False)
