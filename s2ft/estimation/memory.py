"""Storages that are alive, and memory that is free."""

import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# which argument is the weight
NORMS = {aten.native_layer_norm.default: 2, aten.native_group_norm.default: 1, aten.native_batch_norm.default: 1}
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Memory(TorchDispatchMode):
    """Sees every operator. How many bytes of storages are alive on the device, those of the model itself left out, and
    the most at once by phase."""

    def __init__(self, twin: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.device, self.phase, self.alive, self.peaks = device, "", 0, Counter()
        own = (storage for tensor in [*twin.parameters(), *twin.buffers()] for storage in storages(tensor))
        self._own = {storage._cdata: storage for storage in own}  # alive, even where a layer replaces its weight
        self._seen: dict[str, set[int]] = {"alive": set(), "saved": set()}
        self._scalar: float | None = None

    def is_new(self, storage: torch.UntypedStorage, list_: str) -> bool:
        """Whether it is neither the model's nor on this list, where it then is for as long as it lives."""
        key, seen = storage._cdata, self._seen[list_]
        if key in self._own or key in seen:
            return False
        seen.add(key)
        weakref.finalize(storage, seen.discard, key)
        return True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:  # fake tensors ask this more often than anything
            return function(*args)
        if function is aten._local_scalar_dense.default and self._scalar is not None and type(args[0]) is not Tensor:
            return self._scalar
        output = self._run(function, args, kwargs or {})
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device.type:
                self.watch(leaf)
        return output

    def _run(self, function, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the operator gives, put right where PyTorch's fake one gives something else than the real one."""
        if function in INDEXED:
            args = (args[0], _numbered(args[1]), *args[2:])
        if function is aten._grouped_mm.default and self.device.type == "cpu":
            return _product(*args)  # the fake one takes bfloat16 only, the CPU's all
        output = function(*args, **kwargs)
        if function is aten.rand.default and len(args[0]) == 0:  # whether a layer is dropped: none is
            return output.fill_(1)
        if function in NORMS and self.device.type == "cpu" and args[NORMS[function]] is not None:
            statistics = args[NORMS[function]].dtype  # the weight's; the fake one takes the input's
            return output[0], *(tensor.to(statistics) for tensor in output[1:])
        return output

    def watch(self, tensor: Tensor) -> None:
        """Count it for as long as it lives, if it isn't counted."""
        for storage in storages(tensor):
            if self.is_new(storage, "alive"):
                self.alive += storage.nbytes()
                self.peaks[self.phase] = max(self.peaks[self.phase], self.alive)
                weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, number: int) -> None:
        self.alive -= number

    @contextmanager
    def scalars_are(self, value: float) -> Iterator[None]:
        """What a tensor without data is asked for as a number has this value inside."""
        self._scalar = value
        try:
            yield
        finally:
            self._scalar = None


def _numbered(indices: Any) -> Any:
    """Masks that are real as numbers: how many those are shows in the shape, and only a real one knows."""
    if not any(type(index) is Tensor and index.dtype == torch.bool for index in indices):
        return indices
    return [
        one
        for index in indices
        for one in (index.nonzero().unbind(1) if type(index) is Tensor and index.dtype == torch.bool else [index])
    ]


def _product(a: Tensor, b: Tensor, offs: Tensor | None = None, *others: Any) -> Tensor:
    """What a product of groups gives, each side stacked [groups, ...] or with its groups in a row."""
    groups = [offs.numel()] if a.dim() == b.dim() == 2 else [a.shape[0]] if a.dim() == b.dim() == 3 else []
    return a.new_empty(*groups, a.shape[-2], b.shape[-1])


def storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """One, or those of the tensors that a wrapper holds."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages(getattr(tensor, name))
    else:
        yield tensor.untyped_storage()


def bytes_of(tensors: Iterable[Tensor], seen: set[int] | None = None) -> int:
    """Of their storages, each once, without those already seen."""
    seen, total = set() if seen is None else seen, 0
    for tensor in tensors:
        for storage in storages(tensor):
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                total += storage.nbytes()
    return total


# ---- the machine -----------------------------------------------------------------------------------------


def resident(model: nn.Module, device: torch.device) -> int:
    """What of the model is on the device already."""
    return bytes_of(tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.device.type == device.type)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU, or available on the host, within its control group; None where nothing says so."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    return min((number for number in (_available_on_host(), _left_in_group()) if number is not None), default=None)


def _available_on_host() -> int | None:
    try:
        with open("/proc/meminfo") as file:
            found = re.search(r"^MemAvailable:\s+(\d+) kB", file.read(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    except OSError:
        return None


def _left_in_group() -> int | None:
    """Of version 2; files that were read count as used there and are given back when needed."""
    try:
        with (
            open("/sys/fs/cgroup/memory.max") as most,
            open("/sys/fs/cgroup/memory.current") as current,
            open("/sys/fs/cgroup/memory.stat") as stat,
        ):
            cached = re.search(r"^inactive_file (\d+)$", stat.read(), re.MULTILINE)
            return int(most.read()) - int(current.read()) + (int(cached[1]) if cached else 0)
    except (OSError, ValueError):  # no group, or one without a limit
        return None
