"""The memory of a training step, by running one on a shadow of the model."""

import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from s2ft.attached.record import Record
from s2ft.estimation.devices import MemoryPart, with_parts
from s2ft.layers import kind_of
from s2ft.model.running import call_model
from s2ft.packages import MissingPackages, is_installed

# ---- memory ---------------------------------------------------------------------------------------------------------

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
        self.device, self.phase, self.alive = device, "", 0
        self.peaks: Counter = Counter()
        self.of_model: set[int] = set()
        self._held = list(new_storages([*shadow.parameters(), *shadow.buffers()], self.of_model))
        self._seen = set(self.of_model)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:  # fake tensors call this more often than any other
            return function(*args)
        if function is aten._local_scalar_dense.default and type(args[0]) is not Tensor and self.phase == "optimizer":
            return 1.0  # a step may read a norm, a fake one here; its memory does not depend on the value
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
            # in the weight's dtype; the fake one uses the input's
            return output[0], *(tensor.to(args[NORMS[function]].dtype) for tensor in output[1:])
        return output

    def watch(self, tensor: Tensor) -> None:
        """Count a tensor's storages as long as they live. A storage is counted once."""
        for storage in new_storages([tensor], self._seen):
            self.alive += storage.nbytes()
            self.peaks[self.phase] = max(self.peaks[self.phase], self.alive)
            weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, number: int) -> None:
        self.alive -= number


def _numbered(indices: Any) -> Any:
    """Replace real masks by indices. The result's shape depends on their values, which a fake mask does not have."""
    return [
        one
        for index in indices
        for one in (index.nonzero().unbind(1) if type(index) is Tensor and index.dtype == torch.bool else [index])
    ]


def _product(a: Tensor, b: Tensor, offs: Tensor | None = None, *rest: Any) -> Tensor:
    """Return an empty result of a grouped product. A side has shape [groups, ...], or its groups in one dimension."""
    groups = (
        [cast(Tensor, offs).numel()] if a.dim() == b.dim() == 2 else [a.shape[0]] if a.dim() == b.dim() == 3 else []
    )
    return a.new_empty(*groups, a.shape[-2], b.shape[-1])


def storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Yield the storage of a tensor, or the storages of the tensors in a wrapper."""
    if is_traceable_wrapper_subclass(tensor):
        for part in (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]):
            if isinstance(part, Tensor):  # a DTensor also has its mesh
                yield from storages(part)
    else:
        yield tensor.untyped_storage()


def new_storages(tensors: Iterable[Tensor], seen: set[int]) -> Iterator[torch.UntypedStorage]:
    """Yield the tensors' storages that are not in `seen`, each once. They are in it from then on, while they live."""
    for tensor in tensors:
        for storage in storages(tensor):
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                weakref.finalize(storage, seen.discard, storage._cdata)
                yield storage


def bytes_of(tensors: Iterable[Tensor], seen: set[int] | None = None) -> int:
    """Return the bytes of the tensors' storages, without those in `seen`. A storage is counted once."""
    return sum(storage.nbytes() for storage in new_storages(tensors, set() if seen is None else seen))


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


# ---- a step ---------------------------------------------------------------------------------------------------------

Optimizer = str | Callable[[list[Tensor]], torch.optim.Optimizer]


def _bitsandbytes(name: str, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if not is_installed("bitsandbytes"):
        raise MissingPackages(f"optimizer {name}", ["bitsandbytes"])
    import bitsandbytes

    return getattr(bitsandbytes.optim, name)(parameters)


def _torch(kind: type, parameters: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    # On a GPU PyTorch updates all parameters at once, but only if their types are its own. These are fake tensors.
    return kind(parameters, foreach=True if parameters[0].device.type == "cuda" else None, **options)


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "adamw": partial(_torch, torch.optim.AdamW),
    "adam": partial(_torch, torch.optim.Adam),
    "adafactor": partial(_torch, torch.optim.Adafactor),
    "sgd": partial(_torch, torch.optim.SGD, lr=1e-3),
    "sgd-momentum": partial(_torch, torch.optim.SGD, lr=1e-3, momentum=0.9),
    "adamw-8bit": partial(_bitsandbytes, "AdamW8bit"),
    "paged-adamw-8bit": partial(_bitsandbytes, "PagedAdamW8bit"),
}


def maker(optimizer: Optimizer) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Return the function that makes the optimizer from a list of parameters.

    Raises:
        ValueError: The name is unknown.
        TypeError: `optimizer` is neither a name nor a class or function.
    """
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, or a class or function that makes "
                f"one, got {optimizer!r}"
            )
        return OPTIMIZERS[optimizer]
    if not callable(optimizer) or isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "optimizer must be a name, or a class or function that makes a torch.optim.Optimizer from a list "
            f"of parameters, got {type(optimizer).__name__}"
        )
    return optimizer


# ---- the step -------------------------------------------------------------------------------------------------

OUTSIDE = "model and loss"  # the part for tensors that only the model's own forward, or the loss, saves
COLUMNS = ("parameters", "buffers", "trained", "gradients", "optimizer", "kept")


class ShadowStep:
    """Registers hooks on the shadow model, runs it, and provides the numbers.

    Args:
        shadow: Shadow model on fake tensors of `device`, in training mode.
        record: Its record.
        inputs: Arguments of its forward.
        loss: Function of (shadow, inputs). Default: the model's own loss, or all its outputs.
        device: Device whose kernels are counted.
        autocast: Dtype of autocast, or None.
    """

    def __init__(
        self,
        shadow: nn.Module,
        record: Record,
        inputs: Any,
        loss: Callable | None,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:
        self.shadow, self.inputs, self.loss = shadow, inputs, loss
        self.autocast = _autocast(device, autocast)
        self.trained = {name: p for name, p in shadow.named_parameters() if p.requires_grad}
        self.part_of = _part_names(shadow)
        self.memory = Memory(shadow, device)
        self.saved = set(self.memory.of_model)  # storages that autograd has saved, and those of the model
        # Bytes by part and kind. "divided": those kept that tensor parallelism divides.
        self.sums: dict[str, Counter] = {part: Counter() for part in self.part_of.values()}
        self._count_weights()  # before anything runs, because a layer may replace its weights
        self.within: list[tuple[str, bool]] = []  # modules whose forward is running, the innermost last
        divided = with_parts(shadow)
        # Not on activations: a gated FFN runs its own forward if its activation has hooks.
        holders = {name: module for name, module in shadow.named_modules() if module._parameters or module._modules}
        for name, module in holders.items():
            module.register_forward_pre_hook(partial(self._enter, self.part_of[name], name in divided))
            module.register_forward_hook(self._leave, always_call=True)
        for path in {coupling.place for coupling in record.couplings if coupling.expert is not None}:
            shadow.get_submodule(path).register_forward_pre_hook(partial(_spread_tokens, device), with_kwargs=True)

    def _enter(self, part: str, divided: bool, module: nn.Module, inputs: tuple) -> None:
        self.within.append((part, divided or bool(self.within) and self.within[-1][1]))

    def _leave(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        self.within.pop()

    # ---- running ---------------------------------------------------------------------------------

    def run(self, make: Callable[[list[Tensor]], torch.optim.Optimizer], accumulation: int) -> None:
        """Run forward, backward and the optimizer's step. With accumulation, forward and backward run twice."""
        with self.memory:
            for number in range(min(accumulation, 2)):
                self.memory.phase = "forward"
                outputs = self._guarded(partial(self._forward, count=number == 0))
                self.memory.phase = "backward"
                self._guarded(partial(torch.autograd.backward, outputs, [torch.ones_like(one) for one in outputs]))
                del outputs
            self.memory.phase = "optimizer"
            self._guarded(partial(self._update, make))

    def _update(self, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        """Run the optimizer's step, and count its state and the gradients."""
        optimizer = make(list(self.trained.values()))
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must make a torch.optim.Optimizer, got {type(optimizer).__name__}")
        optimizer.step()
        seen: set[int] = set()
        for name, parameter in self.trained.items():
            counted, leaves = self._sums_of(name), tree_leaves(dict(optimizer.state.get(parameter, {})))
            counted["trained"] += parameter.numel()
            counted["gradients"] += 0 if parameter.grad is None else bytes_of([parameter.grad])
            counted["optimizer"] += bytes_of((leaf for leaf in leaves if isinstance(leaf, Tensor)), seen)

    def _forward(self, count: bool) -> list[Tensor]:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)
        with hooks if count else nullcontext(), self.autocast():
            output = (self.loss or call_model)(self.shadow, self.inputs)
        if self.loss is None and isinstance(output, Mapping) and output.get("loss") is not None:
            output = output["loss"]
        leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
        found = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not found:
            raise ValueError(f"no output of {type(self.shadow).__name__} depends on the trained parameters")
        return found

    def _save(self, tensor: Tensor) -> Tensor:
        for storage in new_storages([tensor], self.saved):
            part, divided = self.within[-1] if self.within else (OUTSIDE, False)
            self.sums[part]["kept"] += storage.nbytes()
            self.sums[part]["divided"] += storage.nbytes() * divided
        return tensor

    def _guarded(self, run: Callable[[], Any]) -> Any:
        """Return run(), with an error that names the model and the phase if it can't run without data."""
        try:
            return run()
        except (UnsupportedOperatorException, DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"{type(self.shadow).__name__} can't be estimated without running it on its weights: its "
                f"{self.memory.phase} can't run on tensors without data ({error})"
            ) from error

    # ---- the numbers -----------------------------------------------------------------------------

    def peak(self) -> tuple[int, str]:
        """Return the peak in bytes and its phase. In every step but the first, the optimizer's state exists already."""
        weights = self.total("parameters") + self.total("buffers")
        states = self.total("optimizer")
        most = {
            phase: weights + alive + (0 if phase == "optimizer" else states)
            for phase, alive in self.memory.peaks.items()
        }
        phase = max(most, key=most.__getitem__)
        return most[phase], phase

    def total(self, kind: str) -> int:
        """Return the bytes of one kind in all parts."""
        return sum(counted[kind] for counted in self.sums.values())

    def _sums_of(self, name: str) -> Counter:
        """Return the sums of the part of a parameter or buffer."""
        return self.sums[self.part_of[name.rpartition(".")[0]]]

    def _count_weights(self) -> None:
        """Count parameters and buffers. A storage is counted once."""
        seen: set[int] = set()
        for name, parameter in self.shadow.named_parameters():
            self._sums_of(name)["parameters"] += bytes_of([parameter], seen)
        for name, buffer in self.shadow.named_buffers():
            self._sums_of(name)["buffers"] += bytes_of([buffer], seen)
        for name, module in self.shadow.named_modules():
            self.sums[self.part_of[name]]["parameters"] += bytes_of(kind_of(module).scales(module), seen)

    def parts(self) -> list[MemoryPart]:
        """Return the parts in the order of the model, last what no module of it has."""
        return [
            MemoryPart(name, *(self.sums[name][column] for column in COLUMNS))
            for name in sorted(self.sums, key=lambda name: name == OUTSIDE)
            if self.sums[name].total()
        ]


def _autocast(device: torch.device, dtype: torch.dtype | None) -> Callable:
    if dtype is None:
        return nullcontext
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"autocast must be torch.bfloat16 or torch.float16, got {dtype!r}")
    return partial(torch.autocast, device.type, dtype)


def _spread_tokens(device: torch.device, experts: Any, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict]:
    """Give every expert the same number of tokens.

    The router's choice depends on weights, and the memory depends only on the number of all tokens.
    """

    def spread(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_floating_point():
            return value
        return torch.arange(value.numel(), device=device).reshape(value.shape) % experts.num_experts

    return tuple(map(spread, inputs)), {name: spread(value) for name, value in named.items()}


# ---- parts of a model ------------------------------------------------------------------------------------


def _part_names(model: nn.Module) -> dict[str, str]:
    """Return the part of each module, by name.

    For a module in a layer it is the layer: the name up to the first number. For another module it is the first piece
    of the name that no layer has. For the model itself it is OUTSIDE.
    """
    paths = [name for name, _ in model.named_modules(remove_duplicate=False)]
    layers = {found[0] for path in paths if (found := re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", path))}
    around = {"", *(layer[: dot.start()] for layer in layers for dot in re.finditer(r"\.", layer))}
    parts: dict[str, str] = {}
    for path in paths:  # a module comes before those in it
        above = path.rpartition(".")[0]
        parts[path] = path or OUTSIDE if above in around else parts[above]
    return parts
