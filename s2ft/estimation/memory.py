"""Counts storages that are alive, and reads how much memory is free."""

import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# the position of the weight among the arguments
NORMS = {aten.native_layer_norm.default: 2, aten.native_group_norm.default: 1, aten.native_batch_norm.default: 1}
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Memory(TorchDispatchMode):
    """Counts, at every operator, the bytes of storages that are alive on the device, and the largest number by phase.

    The storages of the model itself are not counted.
    """

    def __init__(self, shadow: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.device, self.phase, self.alive, self.peaks = device, "", 0, Counter()
        of_model = (storage for tensor in [*shadow.parameters(), *shadow.buffers()] for storage in storages(tensor))
        self._of_model = {storage._cdata: storage for storage in of_model}  # held, so that they stay alive
        self._seen: dict[str, set[int]] = {"alive": set(), "saved": set()}

    def is_new(self, storage: torch.UntypedStorage, purpose: str) -> bool:
        """Return True the first time that a storage is seen for a purpose, unless it belongs to the model."""
        key, seen = storage._cdata, self._seen[purpose]
        if key in self._of_model or key in seen:
            return False
        seen.add(key)
        weakref.finalize(storage, seen.discard, key)
        return True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:  # fake tensors call this more often than any other
            return function(*args)
        fake_number = function is aten._local_scalar_dense.default and type(args[0]) is not Tensor
        if fake_number and self.phase == "optimizer":  # a step may read a norm; its memory does not depend on the value
            return 1.0
        output = self._run(function, args, kwargs or {})
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device.type:
                self.watch(leaf)
        return output

    def _run(self, function, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the operator, and correct the result where PyTorch's fake operator differs from the real one."""
        if function in INDEXED:
            args = (args[0], _numbered(args[1]), *args[2:])
        if function is aten._grouped_mm.default and self.device.type == "cpu":
            return _product(*args)  # the fake one takes only bfloat16, the CPU's all dtypes
        output = function(*args, **kwargs)
        if function is aten.rand.default and len(args[0]) == 0:  # decides if a layer is dropped: none is
            return output.fill_(1)
        if function in NORMS and self.device.type == "cpu" and args[NORMS[function]] is not None:
            statistics = args[NORMS[function]].dtype  # the weight's dtype; the fake one uses the input's
            return output[0], *(tensor.to(statistics) for tensor in output[1:])
        return output

    def watch(self, tensor: Tensor) -> None:
        """Count a tensor's storages as long as they live. A storage is counted once."""
        for storage in storages(tensor):
            if self.is_new(storage, "alive"):
                self.alive += storage.nbytes()
                self.peaks[self.phase] = max(self.peaks[self.phase], self.alive)
                weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, number: int) -> None:
        self.alive -= number


def _numbered(indices: Any) -> Any:
    """Replace real masks by indices. The result's shape depends on their values, which a fake mask does not have."""
    if not any(type(index) is Tensor and index.dtype == torch.bool for index in indices):
        return indices
    return [
        one
        for index in indices
        for one in (index.nonzero().unbind(1) if type(index) is Tensor and index.dtype == torch.bool else [index])
    ]


def _product(a: Tensor, b: Tensor, offs: Tensor | None = None, *rest: Any) -> Tensor:
    """Return an empty result of a grouped product. A side has shape [groups, ...], or its groups in one dimension."""
    groups = [offs.numel()] if a.dim() == b.dim() == 2 else [a.shape[0]] if a.dim() == b.dim() == 3 else []
    return a.new_empty(*groups, a.shape[-2], b.shape[-1])


def storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Yield the storage of a tensor, or the storages of the tensors in a wrapper."""
    if is_traceable_wrapper_subclass(tensor):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        for part in parts:
            if isinstance(part, Tensor):  # a DTensor also has its mesh
                yield from storages(part)
    else:
        yield tensor.untyped_storage()


def bytes_of(tensors: Iterable[Tensor], seen: set[int] | None = None) -> int:
    """Return the bytes of the tensors' storages, without those in `seen`. A storage is counted once."""
    seen, total = set() if seen is None else seen, 0
    for tensor in tensors:
        for storage in storages(tensor):
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                total += storage.nbytes()
    return total


# ---- the machine -----------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a GPU, or of the host within its control group. None if they are not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    available = _number("/proc/meminfo", r"^MemAvailable:\s+(\d+) kB")
    most, current = (_number(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    free = [] if available is None else [available * 1024]
    if most is not None and current is not None:  # a control group of version 2; the cache of files counts as free
        free.append(most - current + (_number("/sys/fs/cgroup/memory.stat", r"^inactive_file (\d+)$") or 0))
    return min(free, default=None)


def _number(file: str, pattern: str = r"^(\d+)$") -> int | None:
    """Return the number in a file of the system; None if there is no such file, or no number in it."""
    try:
        found = re.search(pattern, Path(file).read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
