"""Where slices of a checkpoint lie in the weights of a running engine.

An engine keeps its weights in its own form: queries, keys and values in one parameter, a shard on each rank, layers
wrapped by others. Its model has one function that knows this form: the loader, which copies each tensor of a checkpoint
to its place. Here the loader is called with tensors on the meta device, which have a shape but no numbers. Each copy
that it asks for is noted and not done. A note says which part of the checkpoint's tensor goes into which part of which
parameter. So no table of model families is needed, and no memory.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from s2ft.sync.wire import DTYPES, SliceSpec, factors, hashes_of, name_of

Loader = Callable[[Iterable[tuple[str, Tensor]]], Any]
_COPY = torch.ops.aten.copy_.default
# Of a tensor without numbers these make nothing new: the loader may move it to a device or make it contiguous
_SAME_NUMBERS = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)


class NoPlace(ValueError):
    """A slice can't be written into this engine's weights. The message says why."""


# The part of a live parameter that holds a block of a checkpoint's tensor, with the dimensions of that tensor; and
# where the block begins in the tensor, by dimension
Region = tuple[Tensor, tuple[int, ...]]


@dataclass
class Place:
    """The part of a slice that lies in one live parameter.

    Attributes:
        slice_number: Number of the slice in the list that it belongs to.
        view: Part of the live parameter, with the dimensions of the checkpoint's tensor.
        dim: Dimension of the slice's positions.
        here: Positions in `view`, int64 [m].
        mine: Numbers of these positions in the slice, int64 [m].
        across: The part of each dimension of the slice's values; the whole one for `dim`.
        original: The numbers that were there, [m] along `dim`.
        line: Some of the numbers at the first position, a view of the live parameter, [k].
    """

    slice_number: int
    view: Tensor
    dim: int
    here: Tensor
    mine: Tensor
    across: tuple[slice, ...]
    original: Tensor
    line: Tensor

    def write(self, values: Tensor) -> None:
        """Write this part of a slice's values, in the parameter's dtype."""
        self.view.index_copy_(self.dim, self.here, values[self.across].index_select(self.dim, self.mine))

    def restore(self) -> None:
        """Write back the original numbers."""
        self.view.index_copy_(self.dim, self.here, self.original)


def regions(
    load: Loader, model: nn.Module, tensors: Sequence[tuple[str, Sequence[int]]], dtype: torch.dtype
) -> dict[str, list[Region]]:
    """Find where tensors of a checkpoint lie in a model.

    Args:
        load: The model's loader. It takes pairs of a name and a tensor.
        model: The model, whose parameters and buffers the loader fills.
        tensors: Names and shapes of the tensors in the checkpoint.
        dtype: Dtype of the tensors.

    Returns:
        The blocks that this process holds of each tensor; an empty list for a tensor that it does not hold.

    Raises:
        NoPlace: The loader does not know a name, or changes the numbers of a tensor, or arranges them in another way.
            The model is as before.
    """
    carriers = {name: torch.empty(tuple(shape), dtype=dtype, device="meta") for name, shape in tensors}
    try:
        return _watched(load, model, carriers)
    except NoPlace:
        raise
    except Exception as error:
        raise NoPlace(
            f"weights of these names and shapes: the model's loader does not take them: {type(error).__name__}: {error}"
        ) from error


def _watched(load: Loader, model: nn.Module, carriers: dict[str, Tensor]) -> dict[str, list[Region]]:
    watch = _Watch(model, carriers)
    with torch.no_grad(), _parameters_kept(model), watch:
        load(iter(carriers.items()))
    return watch.found


class _Watch(TorchDispatchMode):
    """Note the copies from tensors without numbers, and let nothing write to the model."""

    def __init__(self, model: nn.Module, carriers: dict[str, Tensor]) -> None:
        super().__init__()
        self._live = {_storage(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())}
        self._names = {_storage(carrier): name for name, carrier in carriers.items()}
        self._carriers = carriers
        self.found: dict[str, list[Region]] = {name: [] for name in carriers}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _COPY and args[1].is_meta and not args[0].is_meta:
            self._note(args[0], args[1])
            return args[0]
        if func in _SAME_NUMBERS and self._is_carrier(args[0]) and kwargs.get("dtype") in (None, args[0].dtype):
            return args[0].detach()
        if not self._writes(func, args, kwargs):
            return func(*args, **kwargs)
        if func in _FILLS:  # padding
            return args[0]
        raise NoPlace(f"a trained weight: the model's loader computes ({func}), so that a slice has no place in it")

    def _note(self, destination: Tensor, source: Tensor) -> None:
        if not self._is_carrier(source):
            raise NoPlace("a trained weight: the model's loader makes new tensors of it, so that a slice has no place")
        name = self._names[_storage(source)]
        if _storage(destination) not in self._live:
            raise NoPlace(f"{name}: the model's loader copies it to a tensor that is no parameter of the model")
        found = _region(name, destination, source, self._carriers[name])
        if found is not None:
            self.found[name].append(found)

    def _is_carrier(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.is_meta and _storage(tensor) in self._names

    def _writes(self, func, args, kwargs) -> bool:
        """Whether an operator would write to a tensor of the model."""
        written = (
            args[number] if number < len(args) else kwargs.get(argument.name)
            for number, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        return any(isinstance(one, Tensor) and not one.is_meta and _storage(one) in self._live for one in written)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _region(name: str, destination: Tensor, source: Tensor, carrier: Tensor) -> Region | None:
    """The block that a copy moves, with the checkpoint's dimensions; None if it is empty."""
    reason = "arranges its numbers in another way, so that a slice of it has no place"
    if destination.shape != source.shape:
        raise NoPlace(f"{name}: the model's loader {reason}: {tuple(source.shape)} into {tuple(destination.shape)}")
    if not source.numel():
        return None
    by_stride = {stride: dim for dim, (stride, size) in enumerate(zip(carrier.stride(), carrier.shape)) if size > 1}
    sizes, strides = [1] * carrier.dim(), [1] * carrier.dim()  # of the part of the parameter
    for size, stride, live in zip(source.shape, source.stride(), destination.stride()):
        if size > 1 and stride not in by_stride:
            raise NoPlace(f"{name}: the model's loader {reason}: shape {tuple(source.shape)}, stride {source.stride()}")
        if size > 1:
            dim = by_stride.pop(stride)
            sizes[dim], strides[dim] = size, live
    starts, rest = [], source.storage_offset()
    for stride in carrier.stride():
        start, rest = divmod(rest, stride)
        starts.append(start)
    if any(start + size > whole for start, size, whole in zip(starts, sizes, carrier.shape)):
        raise NoPlace(f"{name}: the model's loader {reason}: shape {tuple(source.shape)}")
    return destination.detach().as_strided(sizes, strides, destination.storage_offset()), tuple(starts)


@contextmanager
def _parameters_kept(model: nn.Module) -> Iterator[None]:
    """Put parameters back that a loader replaces or gives other memory.

    Raises:
        NoPlace: It did so.
    """
    before = [
        (module, name, parameter, parameter.data)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    try:
        yield
    finally:
        changed = ""
        for module, name, parameter, data in before:
            if module._parameters.get(name) is not parameter or parameter.data_ptr() != data.data_ptr():
                changed = changed or name
                module._parameters[name] = parameter
                parameter.data = data
    if changed:
        raise NoPlace(f"{changed}: the model's loader replaces the parameter instead of filling it")


def places(load: Loader, model: nn.Module, specs: Sequence[SliceSpec], dtype: torch.dtype) -> list[Place]:
    """Find the places of slices in a model, and keep the numbers that are there.

    Args:
        load: The model's loader. It takes pairs of a name and a tensor.
        model: The model.
        specs: The slices.
        dtype: Dtype of the slices' numbers, which the model's parameters must have.

    Returns:
        The places in the order of the slices. A slice of a weight that another rank holds has none here.

    Raises:
        NoPlace: See :func:`regions`; or a parameter has another dtype or no numbers.
    """
    if len({spec.name for spec in specs}) != len(specs):
        raise NoPlace("a weight is named twice in the description of the slices")
    blocks = regions(load, model, [(spec.name, spec.shape) for spec in specs], dtype)
    found = []
    for number, spec in enumerate(specs):
        for view, starts in blocks[spec.name]:
            if view.dtype not in DTYPES.values():
                raise NoPlace(
                    f"{spec.name} is {name_of(view.dtype)} in this engine, which is quantized or packed: "
                    "serve the base without quantization"
                )
            if view.dtype != dtype:
                raise NoPlace(
                    f"{spec.name} is {name_of(view.dtype)} in this engine, and the slices are sent as "
                    f"{name_of(dtype)}: send them in the engine's dtype"
                )
            place = _place(number, spec, view, starts)
            if place is not None:
                found.append(place)
    return found


def _place(number: int, spec: SliceSpec, view: Tensor, starts: tuple[int, ...]) -> Place | None:
    start, size = starts[spec.dim], view.shape[spec.dim]
    mine = ((spec.index >= start) & (spec.index < start + size)).nonzero().squeeze(1)
    if not mine.numel():
        return None
    here = (spec.index[mine] - start).to(view.device)
    across = tuple(
        slice(None) if dim == spec.dim else slice(first, first + extent)
        for dim, (first, extent) in enumerate(zip(starts, view.shape))
    )
    original = view.index_select(spec.dim, here)
    line = view.select(spec.dim, int(here[0]))
    while line.dim() > 1:
        line = line[0]
    return Place(number, view, spec.dim, here, mine.to(view.device), across, original, torch.atleast_1d(line))


# What one rank says about one of its places: the number of the slice, which part it is (parts with the same key on
# several ranks are copies of each other), the numbers of its positions in the slice, how many numbers it holds of each
# unit, and the hash of each of its units' parts.
Part = tuple[int, tuple, Tensor, int, Tensor]


def parts_of(found: Iterable[Place], specs: Sequence[SliceSpec]) -> list[Part]:
    """Describe the places of one rank, for :func:`check_base`.

    Args:
        found: The places.
        specs: The slices.
    """
    parts = []
    for place in found:
        others = [size for dim, size in enumerate(specs[place.slice_number].shape) if dim != place.dim]
        across = tuple(one for dim, one in enumerate(place.across) if dim != place.dim)
        hashes = hashes_of(place.original, place.dim, factors(math.prod(others)).reshape(others)[across])
        mine = place.mine.cpu()
        key = int(mine[0]), int(mine[-1]), *((one.start, one.stop) for one in across)
        parts.append((place.slice_number, key, mine, place.original.numel() // place.here.numel(), hashes.cpu()))
    return parts


def check_base(parts: Iterable[Part], specs: Sequence[SliceSpec]) -> None:
    """Check that all ranks together hold every slice, with the numbers of the trainer's base.

    Args:
        parts: The parts of all ranks. Copies of the same part are compared with each other and counted once.
        specs: The slices, with the hashes of the trainer's base.

    Raises:
        NoPlace: No rank holds a slice, or a part of it.
        ValueError: The numbers are those of another base. The message names the first weight.
    """
    known: dict[tuple, Tensor] = {}
    sums = [torch.zeros_like(spec.hashes) for spec in specs]
    counts = [torch.zeros_like(spec.hashes) for spec in specs]
    for number, key, mine, numbers, hashes in parts:
        first = known.setdefault((number, key), hashes)
        if first is not hashes:
            if not torch.equal(first, hashes):
                raise ValueError(f"{specs[number].name}: two ranks of this engine hold different numbers")
            continue
        sums[number][mine] += hashes
        counts[number][mine] += numbers
    for spec, count in zip(specs, counts):
        if bool((count != spec.numel // spec.index.numel()).any()):
            held = "no place" if not bool(count.any()) else "no place for all of it"
            raise NoPlace(
                f"{spec.name}: this engine has {held}. A tied weight is sent under the one name that the checkpoint "
                "has, and all weights must be of the served model"
            )
    wrong = [spec.name for spec, found in zip(specs, sums) if not torch.equal(found, spec.hashes)]
    if wrong:
        raise ValueError(
            f"the engine's base is not that of the slices: {len(wrong)} of {len(specs)} slices differ, the first is "
            f"{wrong[0]}. Serve the base that is trained, in the dtype in which the slices are sent, and not quantized"
        )
